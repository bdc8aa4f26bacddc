"""Conditioning tables: what of the blocks' programs does not depend on the latents is computed ahead, not step by step.

What depends on what is found by probing, not by model names: the transformer is called again with its blocks standing
still, once with other latents and block outputs (an argument of a block that stays equal does not depend on them), then
at every timestep (one that stays equal holds for the whole run). Each program falls into three parts: for a run, for a
step, and the rest. They are the program's own operators at the step's own shapes, so the bits are the same.

A first run notes how the pipeline calls the transformer at each step. A second probes at its first step and serves the
others. From the third on the tables are filled before the first step, without running a block, and serve that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from ...pipelines.clock import Moment
from ...pipelines.recording import latents_of
from .graphs import Capture
from .loop import Branch, Loop
from .noted import Comparison, Noted, kept, noted
from .outside import Outside, OutsideProgram, stand_still
from .precompute import Filler, same
from .sums import Collapse
from .trace import BlockCall, LoweredBlock, kind_of


@dataclass(frozen=True, eq=False)
class Call:
    """How the transformer is called at its first step of the run under way, and what changes at the others."""

    forward: Any
    leaves: list[Any]
    spec: TreeSpec
    moved: dict[int, dict[int, Any]]  # step, from the second on -> argument -> value

    @property
    def moving(self) -> set[int]:
        return {i for values in self.moved.values() for i in values}

    def at(self, step: int) -> list[Any]:
        """Returns the arguments at a step; the latents are those of the first."""
        changed = self.moved.get(step, {})
        return [changed.get(i, leaf) for i, leaf in enumerate(self.leaves)]

    def outputs(self, changed: dict[int, Any]) -> Any:
        """Returns what the transformer returns with some arguments changed."""
        args, kwargs = tree_unflatten([changed.get(i, leaf) for i, leaf in enumerate(self.leaves)], self.spec)
        return self.forward(*args, **kwargs)


class Learned(NamedTuple):
    """How a block is called in calls of one kind, as probing found."""

    out: Any  # stands in for its output: the same looks
    late: set[int]
    handed: bool
    moving: set[int]  # arguments that change from step to step


class Tables(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a transformer whose blocks are lowered; it stands inside the clock's."""

    def __init__(
        self,
        moment: Moment,
        blocks: list[LoweredBlock],
        steps: list[int],  # at which the pipeline calls this transformer
        collapse: Collapse | None,
        capture: Capture | None,
        near: bool = False,  # tables equal except for rounding, filled at once
    ) -> None:
        super().__init__()
        self.moment, self.blocks, self.steps = moment, blocks, steps
        self.collapse, self.capture = collapse, capture
        self.loop: Loop | None = None  # takes the steps after the first
        self.seen: dict[Any, dict[int, list[Any]]] = {}  # (looks of a call, branch) -> step -> its arguments
        self.noted: dict[Any, Noted] = {}  # (looks of a call, branch) -> what changes in it, once all steps are seen
        self.unsteady: set[Any] = set()  # (looks of a call, branch) whose arguments were others in a later run
        self.comparison = Comparison()
        self.filler = Filler(near)
        self.learned: dict[Any, list[Learned]] = {}  # looks of a call -> of each block
        self.stand_ins: dict[Any, torch.Tensor] = {}  # by number of the output and looks
        self.transformer: nn.Module | None = None
        self.programs: dict[
            Any, OutsideProgram | None
        ] = {}  # around the blocks, by looks of a call and how that is built
        self.held: dict[Any, list[Any]] = {}  # looks of a call -> what each block holds of what a graph fills
        self.numbers: dict[Any, int] = {}  # of looks
        self.first: dict[int, list[Any]] = {}  # branch -> arguments at its first step of the run under way
        self.kinds: dict[int, tuple[Any, int]] = {}  # branch -> looks of its calls in the run under way, their number

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, step, branch = self.fn_ref.original_forward, self.moment.step, self.moment.branch
        self.transformer = module
        begin = self.steps[0]
        leaves, spec = tree_flatten((args, kwargs))
        given = latents_of(module, args, kwargs)
        if not torch.is_tensor(given):  # a list, one tensor a sample: the traced blocks run whole
            if self.capture is not None:
                self.capture.refused = "the pipeline hands over its latents as a list"
            return forward(*args, **kwargs)
        latents = next(i for i, leaf in enumerate(leaves) if leaf is given)
        kinds = tuple(kind_of(leaf) for leaf in leaves)
        looks = spec, kinds, branch, torch.is_autocast_enabled(), torch.get_default_dtype()
        if self.capture is not None and step == begin and not branch:
            self.capture.begin((spec, kinds))
        seen = self.seen.setdefault(looks, {})
        if len(seen) < len(self.steps):
            seen[step] = [kept(leaf) if i != latents else None for i, leaf in enumerate(leaves)]
            if self.capture is not None:
                self.capture.settle([step])
            return forward(*args, **kwargs)
        if step != begin and self.loop is not None and self.loop.wants(leaves[latents]):
            return self.loop.run()
        if step != begin:
            self.moment.tabled = self._as_noted(looks, leaves, latents)
            if self.capture is None:
                return forward(*args, **kwargs)
            if self.moment.tabled:
                return self.capture.run(forward, leaves, spec, self.kinds[branch][1])
            self.capture.settle([step])
            return forward(*args, **kwargs)
        if looks not in self.noted:
            self.noted[looks] = noted(seen, self.steps)
        if not self.noted[looks].conditions or looks in self.unsteady:
            return forward(*args, **kwargs)
        moved = self.noted[looks].moved
        hooked = tuple((*b.block._forward_hooks, *b.block._forward_pre_hooks) for b in self.blocks)  # may make detours
        call, kind = Call(forward, leaves, spec, moved), (looks, hooked)
        self.kinds[branch] = looks, self.numbers.setdefault(kind, len(self.numbers))
        if kind in self.learned:
            with torch.no_grad():
                self._fill(call, kind, branch)
            self.moment.tabled = True
            number = self.kinds[branch][1]
            out = forward(*args, **kwargs) if self.capture is None else self.capture.run(forward, leaves, spec, number)
        else:
            out = self._learn(call, latents, kind, branch)
        self.first[branch] = leaves
        if self.loop is not None:
            self.loop.branches.append(Branch(forward, leaves, spec, latents, moved, kind, out))
        return out

    def reset(self) -> None:
        self.first.clear()
        self.kinds.clear()
        self.comparison.reset()

    def differed(self) -> bool:
        """Returns whether arguments on a device were not those of the tables in the run that ends; then there are none again."""
        if not self.comparison.differed():
            return False
        self.unsteady.update(looks for looks, _ in self.kinds.values())
        return True

    def _as_noted(self, looks: Any, leaves: list[Any], latents: int) -> bool:
        """Whether the arguments of this step are what the tables were made for; does not wait for a device."""
        step, branch = self.moment.step, self.moment.branch
        if branch not in self.first or self.kinds[branch][0] != looks:
            return False
        moved, first = self.noted[looks].moved[step], self.first[branch]
        return all(i == latents or self.comparison.same(leaf, moved.get(i, first[i])) for i, leaf in enumerate(leaves))

    def _learn(self, whole: Call, latents: int, kind: Any, branch: int) -> Any:
        """Returns the transformer's output at its first step, with which it learns how blocks are called; fills the others."""
        calls = [BlockCall(block) for block in self.blocks]
        for call in calls:
            call.block.listener = call
        try:
            out = whole.outputs({})
        finally:
            for call in calls:
                call.block.listener = None
        with torch.no_grad():
            self._probe(whole, latents, calls, out)
            steps = self.steps[1:]
            for call in calls:
                for filled in self.filler.fill(call, steps, branch):
                    filled.hold(call.block, branch)
            if self.collapse is not None:
                self.collapse.join(calls, steps, branch)
            self.learned[kind] = [Learned(self._stand_in(c.out), c.late, c.handed, c.moving) for c in calls]
            self._around(whole, kind)
        return out

    def _probe(self, whole: Call, latents: int, calls: list[BlockCall], out: Any) -> None:
        """Calls the transformer with its blocks standing still: with other latents, then at every other timestep."""
        noise = torch.Generator().manual_seed(0)

        def stirred(leaf: Any) -> Any:
            if not torch.is_tensor(leaf) or not leaf.is_floating_point():
                return leaf
            return leaf + torch.randn(leaf.shape, generator=noise).to(leaf)

        answers = [call.out for call in calls]
        others = self._asked(whole, {latents: stirred(whole.leaves[latents])}, [tree_map(stirred, a) for a in answers])
        for call, other in zip(calls, others, strict=False):
            call.late = {i for i, (a, b) in enumerate(zip(call.leaves, other, strict=True)) if not same(a, b)}
        self._follow(calls, out, lambda answers: self._asked(whole, {}, answers), stirred)
        for step, values in whole.moved.items():
            for call, other in zip(calls, self._asked(whole, values, answers), strict=False):
                pairs = enumerate(zip(call.leaves, other, strict=True))
                call.changed[step] = {i: b for i, (a, b) in pairs if i not in call.late and not same(a, b)}

    def _asked(self, whole: Call, changed: dict[int, Any], answers: Sequence[Any]) -> list[list[Any]]:
        """Returns the arguments of every block while they return `answers`, and last what the transformer returns."""
        asked, out = stand_still(self.blocks, answers, lambda: whole.outputs(changed))
        return [*asked, tree_flatten(out)[0]]

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

    def _stand_in(self, out: Any) -> Any:
        """Returns what looks like a block's output; blocks whose outputs look alike share it."""
        leaves, spec = tree_flatten(out)
        return tree_unflatten([self._alike(leaf, i) for i, leaf in enumerate(leaves)], spec)

    def _alike(self, leaf: Any, number: int | None = None) -> Any:
        """Returns zeros that look like a tensor: the same ones for all that look alike and have the same number."""
        if not torch.is_tensor(leaf):
            return leaf
        key = number, kind_of(leaf)
        if key not in self.stand_ins:
            empty = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
            self.stand_ins[key] = empty.zero_()
        return self.stand_ins[key]

    def _fill(self, whole: Call, kind: Any, branch: int) -> None:
        """Fills the tables of all steps without running a block; by a graph, where there are graphs."""
        known, steps, late = self.learned[kind], self.steps, list[dict[int, Any]]()

        def body(leaves: list[Any]) -> list[Any]:
            call = Call(whole.forward, leaves, whole.spec, whole.moved)
            begun, *others = self._arguments(call, program, parameters, [one.out for one in known])
            found = []
            for number, (block, one, of_block) in enumerate(zip(self.blocks, known, begun, strict=True)):
                at_steps = [of_block, *(arguments[number] for arguments in others)]
                mine = {s: {i: at_step[i] for i in one.moving} for s, at_step in zip(steps, at_steps, strict=True)}
                as_called = BlockCall(block, of_block, one.out, one.late, one.handed, mine)
                early = [None if i in one.late else leaf for i, leaf in enumerate(of_block)]
                found.append((early, mine, self.filler.fill(as_called, steps, branch)))
            late[:] = [{i: of_block[i] for i in one.late} for one, of_block in zip(known, begun, strict=True)]
            return found

        if self.capture is not None and self.capture.refill(kind, branch, whole.leaves):
            for block, (ready, runs) in zip(self.blocks, self.held[kind], strict=True):
                block.ready.update(ready)
                block.runs.update(runs)
                for run in runs.values():
                    run.at = 0  # whatever happened in the run before
            return
        program, parameters = self._around(whole, kind)
        found, lasting = body(whole.leaves), None
        if self.capture is not None and all(sum(len(f.steps) for f in filled) == len(steps) for _, _, filled in found):
            steps_of = [
                ([None] * len(early), {s: dict.fromkeys(m, s) for s, m in mine.items()}, [f.steps_of() for f in filled])
                for early, mine, filled in found
            ]
            lasting = self.capture.fill(kind, branch, whole.leaves, body, found, steps_of)
        calls = []
        for block, one, (early, mine, filled), others in zip(self.blocks, known, lasting or found, late, strict=True):
            arguments = [others.get(i, leaf) for i, leaf in enumerate(early)]
            calls.append(BlockCall(block, arguments, one.out, one.late, one.handed, mine))
            for values in filled:
                values.hold(block, branch)
        if self.collapse is not None:
            self.collapse.join(calls, steps, branch)
        if lasting is not None:
            ats = [(step, branch) for step in steps]
            self.held[kind] = [
                tuple({at: of[at] for at in ats if at in of} for of in (block.ready, block.runs))
                for block in self.blocks
            ]

    def _arguments(
        self, call: Call, program: OutsideProgram | None, parameters: list[torch.Tensor], answers: list[Any]
    ) -> list[list[list[Any]]]:
        """Returns the arguments of every block at each step; those that depend on the latents only look like it."""
        if program is None:
            return [self._asked(call, call.moved.get(step, {}), answers)[:-1] for step in self.steps]
        return program.arguments(self.filler, parameters, [call.at(step) for step in self.steps])

    def _around(self, whole: Call, kind: Any) -> tuple[OutsideProgram | None, list[torch.Tensor]]:
        """Returns what is around the blocks as a program, None where that cannot be, and the parameters there."""
        assert self.transformer is not None
        if (
            getattr(whole.forward, "__func__", None) is not type(self.transformer).forward
        ):  # somebody's: offloading, say
            return None, []
        outside = Outside(self.transformer, self.blocks)
        if (built := outside.built()) is None:
            return None, []
        key = kind, built
        if key not in self.programs:
            self.programs[key] = self._traced(outside, whole, self.learned[kind])
        return self.programs[key], outside.parameters()

    def _traced(self, outside: Outside, whole: Call, known: list[Learned]) -> OutsideProgram | None:
        """Returns what is around the blocks as a program where it gives what calls give, else None."""
        moving, answers, late = whole.moving, [one.out for one in known], [one.late for one in known]
        looks = {tuple(kind_of(at_step[i]) for i in moving) for at_step in map(whole.at, self.steps)}
        if len(looks) > 1 or not all(torch.is_tensor(whole.leaves[i]) for i in moving):
            return None
        program = outside.program(whole.forward, whole.leaves, whole.spec, answers, moving, late)
        if program is None:
            return None
        parameters, asked = outside.parameters(), self._arguments(whole, None, [], answers)
        own = {id(leaf) for leaf in tree_leaves(answers) if torch.is_tensor(leaf)}
        program.template = [
            [self._alike(leaf) if i in one.late and id(leaf) not in own else leaf for i, leaf in enumerate(of_block)]
            for one, of_block in zip(known, asked[0], strict=True)
        ]
        for _ in range(2):  # step by step, then all at once
            for was, now in zip(asked, self._arguments(whole, program, parameters, answers), strict=True):
                for one, before, after in zip(known, was, now, strict=True):
                    pairs = enumerate(zip(before, after, strict=True))
                    if any(kind_of(a) != kind_of(b) or (i not in one.late and not same(a, b)) for i, (a, b) in pairs):
                        return None
        return program
