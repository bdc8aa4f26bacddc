"""What a first run showed of the arguments of a transformer's calls, and whether a later run's are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .buffers import expanded_copy
from .precompute import same
from .trace import kind_of

LARGEST = 65_536  # numbers in an argument that changes from step to step: a larger one is no conditioning


@dataclass(frozen=True, eq=False)
class Noted:
    """The arguments that change from step to step."""

    moving: frozenset[int]
    moved: dict[int, dict[int, Any]]  # step, from the second on -> argument -> value

    @property
    def conditions(self) -> bool:
        """Whether all of them are small enough to be conditioning."""
        values = (value for changed in self.moved.values() for value in changed.values())
        return not any(torch.is_tensor(value) and value.numel() > LARGEST for value in values)


def kept(leaf: Any) -> Any:
    """Returns a copy of an argument to compare later ones with; a large tensor itself."""
    return expanded_copy(leaf) if torch.is_tensor(leaf) and leaf.numel() <= LARGEST else leaf


def noted(seen: dict[int, list[Any]], steps: Sequence[int]) -> Noted:
    """Returns what changes in the arguments {step: leaves} of a run; waits for the device."""
    begin, *later = steps
    pairs = range(len(seen[begin]))
    moving = frozenset(i for i in pairs if any(not same(seen[begin][i], seen[step][i]) for step in later))
    return Noted(moving, {step: {i: seen[step][i] for i in moving} for step in later})


def on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


class Comparison:
    """Compares the arguments of a run with expected ones: on the host at once, on a device into a flag read after the run."""

    def __init__(self) -> None:
        self.different: torch.Tensor | None = None  # bool [], on the device

    def same(self, leaf: Any, expected: Any) -> bool:
        """Returns whether they are equal; True of tensors on a device, for which `differed` gives the result of the run."""
        if leaf is expected or not torch.is_tensor(leaf) or on_host(leaf):
            return same(leaf, expected)
        if not torch.is_tensor(expected) or kind_of(leaf) != kind_of(expected):
            return False
        found = torch.ne(leaf, expected).any()
        self.different = found if self.different is None else self.different.logical_or_(found)
        return True

    def differed(self) -> bool:
        """Returns whether an argument on a device was another than expected; waits for the device if one was compared."""
        return self.different is not None and bool(self.different)

    def reset(self) -> None:
        self.different = None
