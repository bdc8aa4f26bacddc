"""What the arguments of a transformer's blocks depend on, found by calling the transformer with stubbed blocks.

It is found by probing, not by model names. In the first probe the latents and the blocks' outputs are changed: an argument of a
block that stays equal does not depend on them. Then the transformer is called once with the arguments of every step: an
argument that stays equal holds for the whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .identity import same, signature_of
from .trace import TracedBlock

Changes = dict[int, dict[int, Any]]  # step -> argument -> value
Arguments = list[list[Any]]  # of every block: the leaves of its call


@dataclass(kw_only=True)
class Call:
    """A call of a module at the first step of a run, and which of its arguments change from step to step."""

    leaves: list[Any]
    changed: Changes = field(default_factory=dict)

    @property
    def changing(self) -> set[int]:
        """Arguments that change from step to step."""
        return {i for values in self.changed.values() for i in values}

    def at(self, step: int) -> list[Any]:
        """Returns the arguments at a step; those that depend on the latents are those of the first."""
        changed = self.changed.get(step, {})
        return [changed.get(i, leaf) for i, leaf in enumerate(self.leaves)]


@dataclass(kw_only=True)
class TransformerCall(Call):
    """A call of the transformer."""

    forward: Callable[..., Any]
    spec: TreeSpec
    latents: int  # number of the latents among the leaves

    def output(self, leaves: Sequence[Any]) -> Any:
        """Returns the output of the transformer for these arguments."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.forward(*args, **kwargs)


@dataclass(kw_only=True)
class BlockCall(Call):
    """A call of a block."""

    block: TracedBlock
    out: Any = None  # its output, or the stub of it
    late: set[int] = field(default_factory=set)  # arguments that depend on the latents
    feeds_next: bool = False  # the next block takes its output, and nothing else does

    def of_run(self) -> list[Any]:
        """Returns the arguments that hold for the run, None for the others."""
        others = self.late | self.changing
        return [None if i in others else leaf for i, leaf in enumerate(self.leaves)]

    def inputs(self, step: int, places: Sequence[int]) -> list[Any]:
        """Returns these arguments at a step, None for a number beyond the arguments."""
        leaves = self.at(step)
        return [leaves[i] if i < len(leaves) else None for i in places]


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


def recorded_calls(
    blocks: Sequence[TracedBlock], call: Callable[[], Any], stubs: Sequence[Any] | None = None
) -> tuple[list[BlockCall], Any]:
    """Returns how every block is called in call(), and its result; stubs: what the blocks return instead of running."""
    calls = [BlockCall(block=block, leaves=[]) for block in blocks]
    try:
        for i, (block, recorded) in enumerate(zip(blocks, calls, strict=True)):
            block.recorded, block.stub = recorded, None if stubs is None else (stubs[i],)
        return calls, call()
    finally:
        for block in blocks:
            block.recorded = block.stub = None


def stubbed_arguments(blocks: Sequence[TracedBlock], call: Callable[[], Any], stubs: Sequence[Any]) -> Arguments:
    """Returns the arguments of every block in call() while the blocks return the stubs."""
    return [recorded.leaves for recorded in recorded_calls(blocks, call, stubs)[0]]


class DependenceProbe:
    """Finds what the blocks' arguments depend on; fills in `late`, `feeds_next` and `changed` of the calls."""

    def __init__(self, call: TransformerCall, calls: list[BlockCall], out: Any) -> None:
        self.call, self.calls, self.out = call, calls, out
        self.outputs = [c.out for c in calls]
        self.noise = torch.Generator().manual_seed(0)

    def run(self) -> None:
        """Calls the transformer with stubbed blocks: with other latents, with other outputs, then with each step's arguments."""
        call = self.call
        others = list(call.leaves)
        others[call.latents] = self._perturbed(others[call.latents])
        found = self._arguments(others, [tree_map(self._perturbed, out) for out in self.outputs])
        for block, other in zip(self.calls, found, strict=False):
            block.late = _unequal(block.leaves, other)
        self._follow_outputs()
        for step in call.changed:
            for block, other in zip(self.calls, self._arguments(call.at(step), self.outputs), strict=False):
                block.changed[step] = {i: other[i] for i in _unequal(block.leaves, other) - block.late}

    def _perturbed(self, leaf: Any) -> Any:
        if not torch.is_tensor(leaf) or not leaf.is_floating_point():
            return leaf
        return leaf + torch.randn(leaf.shape, generator=self.noise).to(leaf)

    def _arguments(self, leaves: list[Any], outputs: Sequence[Any]) -> Arguments:
        """Returns the arguments of every block while the blocks return `outputs`; last the transformer's own output."""
        calls, out = recorded_calls([c.block for c in self.calls], lambda: self.call.output(leaves), outputs)
        return [*(c.leaves for c in calls), tree_flatten(out)[0]]

    def _follow_outputs(self) -> None:
        """Finds the blocks whose output goes to the next block only, neither to a later block nor to the transformer."""
        taken = list[set[int]]()
        for before, after in pairwise(self.calls):
            own = {id(leaf) for leaf in tree_flatten(before.out)[0] if torch.is_tensor(leaf)}
            taken.append({i for i, leaf in enumerate(after.leaves) if id(leaf) in own})
        feeds = [bool(places) and places >= after.late for places, after in zip(taken, self.calls[1:], strict=True)]
        feeds.append(False)
        outputs = [
            tree_map(self._perturbed, c.out) if feed else c.out for c, feed in zip(self.calls, feeds, strict=True)
        ]
        expected = [*(c.leaves for c in self.calls), tree_flatten(self.out)[0]]
        found = self._arguments(self.call.leaves, outputs)
        allowed = [set(), *taken, set()]
        if any(_unequal(*pair) - places for places, *pair in zip(allowed, expected, found, strict=True)):
            return
        for call, feed in zip(self.calls, feeds, strict=True):
            call.feeds_next = feed


def _unequal(one: Sequence[Any], other: Sequence[Any]) -> set[int]:
    """Returns the numbers of the arguments in which two calls differ."""
    return {i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not same(a, b)}
