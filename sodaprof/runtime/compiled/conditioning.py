"""Conditioning tables: what the blocks' programs compute from the timestep and the prompt is computed ahead of the loop.

Each program falls into three parts (`precompute`): for a run, for a step, and the rest. They are the program's own operators at
the step's own shapes, so the bits are the same. What depends on what is found by probing (`dependence`).

The first run records how the pipeline calls the transformer at each step. The second one probes at its first step and serves
the others from the tables. From the third run on the tables are filled before the first step, without running a block, and
serve that step, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn
from torch.utils._pytree import tree_flatten

from ...pipelines.clock import Moment
from ...pipelines.recording import latents_of
from .arguments import RunArguments
from .dependence import BlockCall, DependenceProbe, Stubs, TransformerCall, recorded_calls
from .graphs import Graphs
from .identity import signature_of
from .loop import Branch, Loop
from .outside import BlockArguments
from .precompute import Filler
from .sums import Member, Sums
from .trace import Position, Ready, TracedBlock, settings_now


@dataclass
class BlockTables:
    """What one block takes from the tables at the steps of a run on a branch."""

    ready: dict[Position, Ready]
    sums: dict[Position, Member]
    rows: dict[Position, torch.Tensor]  # of the table in which the values of `ready` and `sums` have their places

    def give_to(self, block: TracedBlock) -> None:
        block.ready |= self.ready
        block.sums |= self.sums
        block.table_rows |= self.rows


@dataclass
class Variant:
    """What is known of calls with one signature and one set of hooks on the blocks."""

    number: int
    blocks: list[BlockCall] = field(default_factory=list)  # without arguments; empty until they are probed
    tables: list[BlockTables] = field(default_factory=list)  # of each block, if a graph fills their values


class ConditioningTables(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a transformer with traced blocks; it runs inside the clock's.

    steps: those at which the pipeline calls this transformer. near: tables equal except for rounding, filled at once.
    """

    def __init__(
        self,
        transformer: nn.Module,
        moment: Moment,
        blocks: list[TracedBlock],
        steps: list[int],
        sums: Sums | None,
        capture: Graphs | None,
        near: bool,
    ) -> None:
        super().__init__()
        self.moment, self.blocks, self.steps = moment, blocks, steps
        self.sums, self.capture = sums, capture
        self.loop: Loop | None = None  # runs the steps after the first
        self.arguments = RunArguments(steps)
        self.filler, self.stubs = Filler(near), Stubs()
        self.block_arguments = BlockArguments(transformer, blocks, steps, self.filler, self.stubs)
        self.variants: dict[Any, Variant] = {}  # by signature and the blocks' hooks
        self.current: dict[int, Variant] = {}  # of the run that runs now, by branch

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        latents = latents_of(module, args, kwargs)
        if not torch.is_tensor(latents):  # a list with one tensor for each sample: the blocks run whole programs
            if self.capture is not None:
                self.capture.refused = "the pipeline passes its latents as a list"
            return forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        number = next(i for i, leaf in enumerate(leaves) if leaf is latents)
        call = TransformerCall(leaves=leaves, forward=forward, spec=spec, latents=number)
        signatures = tuple(signature_of(leaf) for leaf in leaves)
        if self.capture is not None and self.moment.step == self.steps[0] and not self.moment.branch:
            self.capture.begin((spec, signatures))
        return self._run(call, (spec, signatures, self.moment.branch, *settings_now()))

    def _run(self, call: TransformerCall, signature: Any) -> Any:
        """Returns the output of the transformer: from tables if there are any for this call."""
        step = self.moment.step
        if not self.arguments.is_recorded(signature):  # no run has shown the arguments of every step yet
            self.arguments.record(signature, step, call.leaves, call.latents)
            return self._without_tables(call)
        if step == self.steps[0]:
            changes = self.arguments.changes_of(signature)
            if changes is None:  # the arguments are no conditioning, or differ from run to run
                return self._without_tables(call)
            return self._first_step(replace(call, changed=changes), signature)
        if self.loop is not None and self.loop.takes_over(call.leaves[call.latents]):
            return self.loop.run()
        self.moment.tabled = self.arguments.is_expected(signature, call.leaves, call.latents, step, self.moment.branch)
        if not self.moment.tabled:
            return self._without_tables(call)
        return self._from_tables(call, self.current[self.moment.branch])

    def _without_tables(self, call: TransformerCall) -> Any:
        """Returns the output of blocks that run without tables and graphs."""
        if self.capture is not None:
            self.capture.sync_stores([self.moment.step])
        return call.output(call.leaves)

    def _from_tables(self, call: TransformerCall, variant: Variant) -> Any:
        if self.capture is None:
            return call.output(call.leaves)
        return self.capture.run(call, variant.number)

    def _first_step(self, call: TransformerCall, signature: Any) -> Any:
        """Returns the output at the first step of a run: probes if this variant is new, else fills the tables and uses them."""
        branch = self.moment.branch
        # hooks of others on the blocks may change what a block is given
        hooks = tuple((*b.block._forward_hooks, *b.block._forward_pre_hooks) for b in self.blocks)
        variant = self.variants.setdefault((signature, hooks), Variant(len(self.variants)))
        self.current[branch] = variant
        if variant.blocks:
            with torch.no_grad():
                self._fill(call, variant, branch)
            self.moment.tabled = True
            out = self._from_tables(call, variant)
        else:
            out = self._probe(call, variant, branch)
        self.arguments.begin(branch, signature, call.leaves)
        if self.loop is not None:
            self.loop.branches.append(Branch(call, variant.number, out))
        return out

    def reset(self) -> None:
        """Ends a run."""
        self.arguments.reset()
        self.current.clear()

    def _probe(self, call: TransformerCall, variant: Variant, branch: int) -> Any:
        """Returns the transformer's output at the first step; finds the blocks' dependence and fills the other steps."""
        calls, out = recorded_calls(self.blocks, lambda: call.output(call.leaves))
        with torch.no_grad():
            DependenceProbe(call, calls, out).run()
            later = self.steps[1:]
            self._give(calls, [self.filler.fill(c, later, branch) for c in calls])
            variant.blocks = [
                replace(
                    c,
                    leaves=[],
                    out=self.stubs.of_output(c.out),
                    changed={step: dict.fromkeys(values) for step, values in c.changed.items()},
                )
                for c in calls
            ]
            self.block_arguments.at_steps(call, variant.number, variant.blocks)
        return out

    def _fill(self, call: TransformerCall, variant: Variant, branch: int) -> None:
        """Fills the tables of all steps without running a block: by a graph if there is one, else by a new one if possible."""
        capture = self.capture
        if capture is not None and capture.refill(variant.number, branch, call.leaves):
            for block, tables in zip(self.blocks, variant.tables, strict=True):
                tables.give_to(block)
            return
        calls, ready = self._computed(call, variant, branch)
        if capture is None or any(len(of_block) < len(self.steps) for of_block in ready):
            self._give(calls, ready)
            return

        def body(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
            return _values(*self._computed(replace(call, leaves=leaves), variant, branch), capture.steps)

        packed = capture.fill(variant.number, branch, call.leaves, body, _values(calls, ready, capture.steps))
        if packed is None:
            self._give(calls, ready)
            return
        of_run, of_steps = packed.result  # in their places; the cached sums take their gates from there
        for number, (one, held) in enumerate(zip(calls, of_run, strict=True)):
            one.leaves = [leaf if place is None else place for leaf, place in zip(one.leaves, held, strict=True)]
            one.changed = {step: of_steps[step][number][0] for step in self.steps}
            ready[number] = {p: r._replace(values=of_steps[p[0]][number][1]) for p, r in ready[number].items()}
        variant.tables = self._give(calls, ready, packed.table)

    def _computed(
        self, call: TransformerCall, variant: Variant, branch: int
    ) -> tuple[list[BlockCall], list[dict[Position, Ready]]]:
        """Returns how every block is called in this run, and its values at each step."""
        at_steps, calls = self.block_arguments.at_steps(call, variant.number, variant.blocks), []
        for number, known in enumerate(variant.blocks):
            of_block = dict(zip(self.steps, (arguments[number] for arguments in at_steps), strict=True))
            changed = {step: {i: leaves[i] for i in known.changing} for step, leaves in of_block.items()}
            calls.append(replace(known, leaves=of_block[self.steps[0]], changed=changed))
        return calls, [self.filler.fill(one, self.steps, branch) for one in calls]

    def _give(
        self, calls: list[BlockCall], ready: list[dict[Position, Ready]], table: torch.Tensor | None = None
    ) -> list[BlockTables]:
        """Gives the blocks their values and their cached sums; table: in which values have their places."""
        sums = self.sums.members(calls, ready) if self.sums is not None else [{} for _ in calls]
        found = []
        for call, of_block, members in zip(calls, ready, sums, strict=True):
            rows = {} if table is None else {position: table[position[0]] for position in of_block}
            found.append(BlockTables(of_block, members, rows))
            found[-1].give_to(call.block)
        return found


def _values(calls: list[BlockCall], ready: list[dict[Position, Ready]], steps: int) -> tuple[list[Any], list[Any]]:
    """Returns the values of every block that hold for the run, and those of each step."""
    of_steps: list[list[Any]] = [[] for _ in range(steps)]
    for call, of_block in zip(calls, ready, strict=True):
        for (step, _), found in of_block.items():
            of_steps[step].append((call.changed[step], found.values))
    return [call.of_run() for call in calls], of_steps
