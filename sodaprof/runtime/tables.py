"""Conditioning tables: what of the blocks' programs does not depend on the latents is computed ahead, not step by step.

What depends on what is found by probing, not by model names: the transformer is called again with its blocks standing
still, once with other latents and block outputs (an argument of a block that stays equal does not depend on them), then
at every timestep (one that stays equal holds for the whole run). Each program falls into three parts: for a run, for a
step, and the rest. They are the program's own operators at the step's own shapes, so the bits are the same.

A first run notes how the pipeline calls the transformer at each step; tables serve from the second run on.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ..models.clock import Moment
from ..models.discover import hidden_states
from .capture import Capture
from .collapse import Collapse
from .fill import Filler, same
from .loop import Branch, Loop
from .lower import BlockCall, LoweredBlock, kind_of

LARGEST = 65_536  # numbers in an argument that changes from step to step: a larger one is no conditioning


class Tables(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a transformer whose blocks are lowered; it stands inside the clock's."""

    def __init__(
        self, moment: Moment, blocks: list[LoweredBlock], steps: int, collapse: Collapse | None, capture: Capture | None
    ) -> None:
        super().__init__()
        self.moment, self.blocks, self.steps = moment, blocks, steps
        self.collapse, self.capture = collapse, capture
        self.loop: Loop | None = None  # takes the steps after the first
        self.seen: dict[Any, dict[int, list[Any]]] = {}  # (looks of a call, branch) -> step -> its arguments
        self.filler = Filler()
        self.learned: dict[
            Any, list[tuple[set[int], bool, dict[int, int]]]
        ] = {}  # looks -> of each block: late, handed, arguments that are the transformer's own
        self.first: dict[int, list[Any]] = {}  # branch -> arguments at step 0 of the run under way

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, step, branch = self.fn_ref.original_forward, self.moment.step, self.moment.branch
        leaves, spec = tree_flatten((args, kwargs))
        latents = next(i for i, leaf in enumerate(leaves) if leaf is hidden_states(args, kwargs))
        kinds = tuple(kind_of(leaf) for leaf in leaves)
        looks = spec, kinds, branch, torch.is_autocast_enabled(), torch.get_default_dtype()
        if self.capture is not None and not step and not branch:
            self.capture.begin((spec, kinds))
        seen = self.seen.setdefault(looks, {})
        if len(seen) < self.steps:
            seen[step] = [_kept(leaf) if i != latents else None for i, leaf in enumerate(leaves)]
            return forward(*args, **kwargs)
        if step and self.loop is not None and self.loop.wants(leaves[latents]):
            return self.loop.run()
        if step:
            known = branch in self.first and self._as_noted(leaves, latents, seen[step], self.first[branch])
            self.moment.tabled = known
            if known and self.capture is not None:
                return self.capture.run(forward, leaves, spec, looks)
            return forward(*args, **kwargs)
        moving = {i for i in range(len(leaves)) if any(not same(seen[0][i], seen[s][i]) for s in range(1, self.steps))}
        if any(torch.is_tensor(leaves[i]) and leaves[i].numel() > LARGEST for i in moving):
            return forward(*args, **kwargs)
        calls = [BlockCall(block) for block in self.blocks]
        for call in calls:
            call.block.listener = call
        try:
            out = forward(*args, **kwargs)
        finally:
            for call in calls:
                call.block.listener = None
        with torch.no_grad():
            moved = {s: {i: seen[s][i] for i in moving} for s in seen}
            self._probe(looks, forward, spec, leaves, latents, calls, moved, out)
            for call in calls:
                self.filler.fill(call, self.steps, branch)
            if self.collapse is not None:
                self.collapse.join(calls, self.steps, branch)
        self.first[branch] = leaves
        if self.loop is not None:
            self.loop.branches.append(Branch(forward, leaves, spec, latents, moved, looks, out))
        return out

    def reset(self) -> None:
        self.first.clear()

    def _as_noted(self, leaves: list[Any], latents: int, noted: list[Any], first: list[Any]) -> bool:
        """Whether the arguments of this step are what the tables were made for: told without waiting for a device."""
        for i, (leaf, then, start) in enumerate(zip(leaves, noted, first, strict=True)):
            if (
                i == latents
                or leaf is start
                or (torch.is_tensor(leaf) and leaf.device.type != "cpu" and leaf.numel() == 1)
            ):
                continue
            on_host = not torch.is_tensor(leaf) or leaf.device.type == "cpu"
            if not on_host or not (same(leaf, then) or same(leaf, start)):
                return False
        return True

    def _probe(
        self, looks: Any, forward: Any, spec: TreeSpec, leaves: list[Any], latents: int, calls: list[BlockCall],
        moved: dict[int, dict[int, Any]], out: Any,
    ) -> None:  # fmt: skip
        """Calls the transformer with its blocks standing still: with other latents, then at every other timestep."""
        noise = torch.Generator().manual_seed(0)

        def stirred(leaf: Any) -> Any:
            if not torch.is_tensor(leaf) or not leaf.is_floating_point():
                return leaf
            return leaf + torch.randn(leaf.shape, generator=noise).to(leaf)

        def arguments(changed: dict[int, Any], answers: list[Any]) -> list[list[Any]]:
            """Returns the arguments of every block, and last what the transformer returns."""
            for call, answer in zip(calls, answers, strict=True):
                call.block.answer = (answer,)
            args, kwargs = tree_unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
            result = forward(*args, **kwargs)
            return [*(call.block.asked for call in calls), tree_flatten(result)[0]]

        others_hooks = tuple((*c.block.block._forward_hooks, *c.block.block._forward_pre_hooks) for c in calls)
        looks = looks, others_hooks  # by what is hooked to the blocks, which may make detours
        if known := self.learned.get(looks):  # all that changes is handed through: no need to ask again
            for call, (late, handed, through) in zip(calls, known, strict=True):
                call.late, call.handed = late, handed
                call.changed = {step: {i: values[j] for i, j in through.items()} for step, values in moved.items()}
            return
        try:
            others = arguments({latents: stirred(leaves[latents])}, [tree_map(stirred, call.out) for call in calls])
            for call, other in zip(calls, others[:-1], strict=True):
                call.late = {i for i, (a, b) in enumerate(zip(call.leaves, other, strict=True)) if not same(a, b)}
            self._follow(calls, out, lambda answers: arguments({}, answers), stirred)
            for step in range(1, self.steps):
                others = arguments(moved[step], [call.out for call in calls])
                for call, other in zip(calls, others[:-1], strict=True):
                    pairs = enumerate(zip(call.leaves, other, strict=True))
                    call.changed[step] = {i: b for i, (a, b) in pairs if i not in call.late and not same(a, b)}
        finally:
            for call in calls:
                call.block.answer, call.block.asked = None, []
        numbers = {id(leaf): i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)}
        own = [{i: numbers[id(c.leaves[i])] for i in c.moving if id(c.leaves[i]) in numbers} for c in calls]
        if all(set(found) == c.moving for found, c in zip(own, calls, strict=True)):
            self.learned[looks] = [(c.late, c.handed, found) for c, found in zip(calls, own, strict=True)]

    def _follow(self, calls: list[BlockCall], out: Any, arguments: Any, stirred: Any) -> None:
        """Notes which blocks' outputs the next block takes, and nobody else: no later block, nor the transformer itself."""
        taken = []
        for call, after in pairwise(calls):
            own = {id(leaf) for leaf in tree_flatten(call.out)[0] if torch.is_tensor(leaf)}
            taken.append({i for i, leaf in enumerate(after.leaves) if id(leaf) in own} if own else set())
        onward = [places >= after.late and bool(places) for places, after in zip(taken, calls[1:], strict=True)]
        answers = [
            tree_map(stirred, call.out) if on else call.out for call, on in zip(calls, [*onward, False], strict=True)
        ]
        before = [call.leaves for call in calls] + [tree_flatten(out)[0]]
        expected = [set(), *taken, set()]
        for places, was, now in zip(expected, before, arguments(answers), strict=True):
            if any(i not in places and not same(a, b) for i, (a, b) in enumerate(zip(was, now, strict=True))):
                return
        for call, on in zip(calls, onward, strict=False):
            call.handed = on


def _kept(leaf: Any) -> Any:
    """Returns a copy of a small tensor, expanded as it is: programs are bound to strides."""
    if not torch.is_tensor(leaf) or leaf.numel() > LARGEST:
        return leaf
    once = leaf[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in leaf.stride())]
    return once.clone().expand(leaf.shape)
