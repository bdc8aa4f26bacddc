"""The arguments of a transformer's calls: what changes between the steps of a run, and whether a later run has the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .buffers import expanded_copy
from .dependence import Changes
from .identity import same, signature_of

LARGEST = 65_536  # elements of an argument that changes from step to step: a larger one is no conditioning


class RunArguments:
    """The arguments of a transformer's calls by signature: recorded in one run, compared in later ones.

    steps: those at which the pipeline calls the transformer. Arguments on a device are compared there, in a flag that is read
    after the run.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps
        self.recorded: dict[Any, dict[int, list[Any]]] = {}  # signature -> step -> arguments
        self.changes: dict[Any, Changes | None] = {}  # signature -> what changes; None: it is no conditioning
        self.first: dict[int, tuple[Any, list[Any]]] = {}  # branch -> signature and arguments at the run's first step
        self.different: torch.Tensor | None = None  # bool [], on the device

    def is_recorded(self, signature: Any) -> bool:
        """Returns whether a run has shown the arguments of all steps."""
        return len(self.recorded.get(signature, ())) == len(self.steps)

    def record(self, signature: Any, step: int, leaves: list[Any], latents: int) -> None:
        """Keeps copies of the arguments of a step except the latents; of a large tensor the tensor itself."""
        kept = [
            expanded_copy(leaf) if torch.is_tensor(leaf) and leaf.numel() <= LARGEST and i != latents else leaf
            for i, leaf in enumerate(leaves)
        ]
        kept[latents] = None
        self.recorded.setdefault(signature, {})[step] = kept

    def changes_of(self, signature: Any) -> Changes | None:
        """Returns what changes in recorded calls, None if it is no conditioning; waits for the device the first time."""
        if signature not in self.changes:
            recorded = self.recorded[signature]
            first, later = recorded[self.steps[0]], self.steps[1:]
            changing = [i for i, leaf in enumerate(first) if any(not same(leaf, recorded[step][i]) for step in later)]
            values = [recorded[step][i] for step in later for i in changing]
            large = any(torch.is_tensor(value) and value.numel() > LARGEST for value in values)
            self.changes[signature] = None if large else {s: {i: recorded[s][i] for i in changing} for s in later}
        return self.changes[signature]

    def begin(self, branch: int, signature: Any, leaves: list[Any]) -> None:
        """Keeps the arguments of a branch at the run's first step."""
        self.first[branch] = signature, leaves

    def is_expected(self, signature: Any, leaves: list[Any], latents: int, step: int, branch: int) -> bool:
        """Returns whether the arguments of a later step are those that were recorded; does not wait for a device."""
        known, first = self.first.get(branch, (None, []))
        changes = self.changes.get(signature)
        if known != signature or changes is None:
            return False
        changed = changes[step]
        return all(i == latents or self.is_same(leaf, changed.get(i, first[i])) for i, leaf in enumerate(leaves))

    def is_same(self, leaf: Any, expected: Any) -> bool:
        """Returns whether they are equal; True for tensors on a device, for which `differed` gives the result of the run."""
        if leaf is expected or not torch.is_tensor(leaf) or on_host(leaf):
            return same(leaf, expected)
        if not torch.is_tensor(expected) or signature_of(leaf) != signature_of(expected):
            return False
        found = torch.ne(leaf, expected).any()
        self.different = found if self.different is None else self.different.logical_or_(found)
        return True

    def reset(self) -> None:
        """Ends a run."""
        self.first.clear()
        self.different = None

    def differed(self) -> bool:
        """Returns whether arguments on a device were others than recorded in the run that ends; waits for the device.

        Calls with these signatures have no conditioning tables from then on.
        """
        if self.different is None or not bool(self.different):
            return False
        self.changes.update({signature: None for signature, _ in self.first.values()})
        return True


def on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"
