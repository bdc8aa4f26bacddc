"""What the arguments of a transformer's blocks depend on, found by calling the transformer with stubbed blocks.

It is found by probing, not by model names. In the first probe the latents and the blocks' outputs are changed: an argument of a
block that stays equal does not depend on them. Then the transformer is called once with the arguments of every step: an
argument that stays equal holds for the whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .identity import same, signature_of
from .trace import RecordedCall, TracedBlock

Arguments = list[list[Any]]  # of every block: the leaves of its call


@dataclass(frozen=True, eq=False)
class TransformerCall:
    """A call of the transformer, and which arguments change at later steps of the run."""

    module: nn.Module
    forward: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    latents: int  # number of the latents among the leaves
    changed: dict[int, dict[int, Any]] = field(default_factory=dict)  # step, from the second on -> argument -> value

    @property
    def changing(self) -> set[int]:
        """Arguments that change from step to step."""
        return {i for values in self.changed.values() for i in values}

    def at(self, step: int) -> list[Any]:
        """Returns the arguments at a step; the latents are those of the first."""
        changed = self.changed.get(step, {})
        return [changed.get(i, leaf) for i, leaf in enumerate(self.leaves)]

    def output(self, changed: dict[int, Any]) -> Any:
        """Returns the output of the transformer with some arguments changed."""
        args, kwargs = tree_unflatten([changed.get(i, leaf) for i, leaf in enumerate(self.leaves)], self.spec)
        return self.forward(*args, **kwargs)


@dataclass
class BlockCall:
    """How one block is called in a run."""

    block: TracedBlock
    leaves: list[Any]  # its arguments at the first step
    out: Any  # its output at the first step, or the stub of it
    late: set[int] = field(default_factory=set)  # arguments that depend on the latents
    handed_on: bool = False  # the next block takes its output, and nothing else does
    changed: dict[int, dict[int, Any]] = field(default_factory=dict)  # step -> argument -> value, if it changes

    @property
    def changing(self) -> set[int]:
        """Arguments that change from step to step."""
        return {i for values in self.changed.values() for i in values}

    def inputs(self, step: int, places: Sequence[int]) -> list[Any]:
        """Returns these arguments at a step, None for a number beyond the arguments.

        Arguments that depend on the latents are those of the first step.
        """
        changed = self.changed.get(step, {})
        return [changed.get(i, self.leaves[i]) if i < len(self.leaves) else None for i in places]


class Stubs:
    """Zeros with the signatures of given tensors; equal signatures share a tensor."""

    def __init__(self) -> None:
        self.tensors: dict[Any, torch.Tensor] = {}

    def like(self, leaf: Any, number: int | None = None) -> Any:
        """Returns zeros like a tensor, the same ones for the same signature and number; other leaves as they are."""
        if not torch.is_tensor(leaf):
            return leaf
        key = number, signature_of(leaf)
        if key not in self.tensors:
            empty = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
            self.tensors[key] = empty.zero_()
        return self.tensors[key]

    def of_output(self, out: Any) -> Any:
        """Returns a stub of a block's output, each tensor of it another one."""
        leaves, spec = tree_flatten(out)
        return tree_unflatten([self.like(leaf, i) for i, leaf in enumerate(leaves)], spec)

    def of_call(self, call: BlockCall) -> BlockCall:
        """Returns what is known of a call without its tensors: no arguments, and stubs for the output and what changes."""
        changed = {s: {i: self.like(leaf) for i, leaf in values.items()} for s, values in call.changed.items()}
        return replace(call, leaves=[], out=self.of_output(call.out), changed=changed)


def with_stubbed_blocks(
    blocks: Sequence[TracedBlock], outputs: Sequence[Any], call: Callable[[], Any]
) -> tuple[Arguments, Any]:
    """Returns the arguments of every block in call() while the blocks return `outputs`, and the result of call()."""
    try:
        for block, output in zip(blocks, outputs, strict=True):
            block.stub = (output,)
        out = call()
        return [block.recorded_inputs for block in blocks], out
    finally:
        for block in blocks:
            block.stub, block.recorded_inputs = None, []


def with_recorded_blocks(blocks: Sequence[TracedBlock], call: Callable[[], Any]) -> tuple[list[BlockCall], Any]:
    """Returns how every block is called in call(), which runs them, and the result of call()."""
    for block in blocks:
        block.recorded = RecordedCall([])
    try:
        out = call()
        return [BlockCall(b, b.recorded.leaves, b.recorded.out) for b in blocks if b.recorded is not None], out
    finally:
        for block in blocks:
            block.recorded = None


class DependenceProbe:
    """Finds what the blocks' arguments depend on; fills in `late`, `handed_on` and `changed` of the calls."""

    def __init__(self, call: TransformerCall, calls: list[BlockCall], out: Any) -> None:
        self.call, self.calls, self.out = call, calls, out
        self.blocks, self.outputs = [c.block for c in calls], [c.out for c in calls]
        self.noise = torch.Generator().manual_seed(0)

    def run(self) -> None:
        """Calls the transformer with stubbed blocks: with other latents, with other outputs, then with each step's arguments."""
        call, latents = self.call, self.call.latents
        others = self._arguments(
            {latents: self._perturbed(call.leaves[latents])}, [tree_map(self._perturbed, out) for out in self.outputs]
        )
        for block, other in zip(self.calls, others, strict=False):
            block.late = {i for i, (a, b) in enumerate(zip(block.leaves, other, strict=True)) if not same(a, b)}
        self._follow_outputs()
        for step, values in call.changed.items():
            for block, other in zip(self.calls, self._arguments(values, self.outputs), strict=False):
                pairs = enumerate(zip(block.leaves, other, strict=True))
                block.changed[step] = {i: b for i, (a, b) in pairs if i not in block.late and not same(a, b)}

    def _perturbed(self, leaf: Any) -> Any:
        if not torch.is_tensor(leaf) or not leaf.is_floating_point():
            return leaf
        return leaf + torch.randn(leaf.shape, generator=self.noise).to(leaf)

    def _arguments(self, changed: dict[int, Any], outputs: Sequence[Any]) -> Arguments:
        """Returns the arguments of every block while the blocks return `outputs`; last the transformer's own output."""
        arguments, out = with_stubbed_blocks(self.blocks, outputs, lambda: self.call.output(changed))
        return [*arguments, tree_flatten(out)[0]]

    def _follow_outputs(self) -> None:
        """Finds the blocks whose output goes to the next block only, neither to a later block nor to the transformer."""
        taken = []
        for before, after in pairwise(self.calls):
            own = {id(leaf) for leaf in tree_flatten(before.out)[0] if torch.is_tensor(leaf)}
            taken.append({i for i, leaf in enumerate(after.leaves) if id(leaf) in own})
        handed_on = [bool(places) and places >= after.late for places, after in zip(taken, self.calls[1:], strict=True)]
        handed_on.append(False)
        outputs = [
            tree_map(self._perturbed, out) if handed else out
            for out, handed in zip(self.outputs, handed_on, strict=True)
        ]
        before_change = [call.leaves for call in self.calls] + [tree_flatten(self.out)[0]]
        expected = [set(), *taken, set()]
        for places, was, now in zip(expected, before_change, self._arguments({}, outputs), strict=True):
            if any(i not in places and not same(a, b) for i, (a, b) in enumerate(zip(was, now, strict=True))):
                return
        for call, handed in zip(self.calls, handed_on, strict=True):
            call.handed_on = handed
