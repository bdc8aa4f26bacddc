"""Conditioning tables: what the blocks' programs compute from the timestep and the prompt is computed ahead of the loop.

Each program falls into three parts (`precompute`): for a run, for a step, and the rest. They are the program's own operators at
the step's own shapes, so the bits are the same. What depends on what is found by probing (`dependence`).

The first run records how the pipeline calls the transformer at each step. The second one probes at its first step and serves
the others from the tables. From the third run on the tables are filled before the first step, without running a block, and
serve that step, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from torch import nn
from torch.utils._pytree import tree_flatten

from ...pipelines.clock import Moment
from ...pipelines.recording import latents_of
from .arguments import RunArguments
from .dependence import BlockCall, DependenceProbe, Stubs, TransformerCall, with_recorded_blocks
from .graphs import Graphs
from .identity import signature_of
from .loop import Branch, Loop
from .outside import BlockArguments
from .precompute import Filled, Filler
from .sums import Sums
from .trace import Position, Ready, TracedBlock


class Phase(Enum):
    """What is done with a call of the transformer."""

    RECORD = auto()  # no run has shown the arguments of every step yet: record them
    PLAIN = auto()  # the arguments are no conditioning, or differ from run to run: run without tables
    PROBE = auto()  # first step of the second run: find what depends on what, fill the tables of the other steps
    FILL = auto()  # first step of a later run: fill the tables, then serve
    SERVE = auto()  # a later step: serve from the tables
    WHOLE_STEPS = auto()  # a later step that the whole-step loop runs


@dataclass
class Variant:
    """What is known of calls with one signature and one set of hooks on the blocks."""

    number: int
    blocks: list[BlockCall] = field(default_factory=list)  # with stubs for tensors; empty until they are probed
    ready: list[dict[Position, Ready]] = field(default_factory=list)  # of each block: values that a graph fills
    sums: list[dict[Position, Any]] = field(default_factory=list)  # of each block, made of such values

    def keep(self, blocks: list[TracedBlock], positions: list[Position]) -> None:
        """Keeps what the blocks hold at these steps, for later runs in which a graph fills the same values."""
        self.ready = [{p: block.ready[p] for p in positions if p in block.ready} for block in blocks]
        self.sums = [{p: block.sums[p] for p in positions if p in block.sums} for block in blocks]

    def restore(self, blocks: list[TracedBlock]) -> None:
        """Gives the blocks what was kept."""
        for block, ready, sums in zip(blocks, self.ready, self.sums, strict=True):
            block.ready.update(ready)
            block.sums.update(sums)
            for one in sums.values():
                one.position = 0  # the run before may have ended inside the sum


class BlockValues(NamedTuple):
    """What is computed ahead for one block, as a tree of tensors."""

    early: list[Any]  # arguments that do not depend on the latents, None for the others
    changed: dict[int, dict[int, Any]]  # step -> argument -> value
    filled: list[Filled]

    @staticmethod
    def of(call: BlockCall, filled: list[Filled]) -> BlockValues:
        early = [None if i in call.late else leaf for i, leaf in enumerate(call.leaves)]
        return BlockValues(early, call.changed, filled)

    def steps_of(self) -> BlockValues:
        """Returns the same structure with the step of each tensor, None for one that holds for the run."""
        changed = {step: dict.fromkeys(values, step) for step, values in self.changed.items()}
        return BlockValues([None] * len(self.early), changed, [filled.steps_of() for filled in self.filled])

    def call(self, other: BlockCall) -> BlockCall:
        """Returns the other call of the block with these values in place of its own."""
        leaves = [leaf if i in other.late else self.early[i] for i, leaf in enumerate(other.leaves)]
        return replace(other, leaves=leaves, changed=self.changed)


class ConditioningTables(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a transformer with traced blocks; it runs inside the clock's.

    steps: those at which the pipeline calls this transformer. near: tables equal except for rounding, filled at once.
    """

    def __init__(
        self,
        moment: Moment,
        blocks: list[TracedBlock],
        steps: list[int],
        sums: Sums | None,
        capture: Graphs | None,
        near: bool = False,
    ) -> None:
        super().__init__()
        self.moment, self.blocks, self.steps = moment, blocks, steps
        self.sums, self.capture = sums, capture
        self.loop: Loop | None = None  # runs the steps after the first
        self.arguments = RunArguments(steps)
        self.filler, self.stubs = Filler(near), Stubs()
        self.block_arguments = BlockArguments(blocks, steps, self.filler, self.stubs)
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
        call = TransformerCall(module, forward, leaves, spec, number)
        signatures = tuple(signature_of(leaf) for leaf in leaves)
        settings = self.moment.branch, torch.is_autocast_enabled(), torch.get_default_dtype()
        if self.capture is not None and self.moment.step == self.steps[0] and not self.moment.branch:
            self.capture.begin((spec, signatures))
        return self._run(call, (spec, signatures, *settings))

    def phase(self, call: TransformerCall, signature: Any) -> Phase:
        """Returns what is to be done with this call; call it once for each call."""
        if not self.arguments.is_recorded(signature):
            return Phase.RECORD
        if self.moment.step != self.steps[0]:
            whole_steps = self.loop is not None and self.loop.takes_over(call.leaves[call.latents])
            return Phase.WHOLE_STEPS if whole_steps else Phase.SERVE
        if self.arguments.changes_of(signature) is None:
            return Phase.PLAIN
        return Phase.FILL if self._variant(signature).blocks else Phase.PROBE

    def _run(self, call: TransformerCall, signature: Any) -> Any:
        """Returns the output of the transformer, in the way of the phase."""
        match self.phase(call, signature):
            case Phase.RECORD:
                self.arguments.record(signature, self.moment.step, call.leaves, call.latents)
                return self._plain(call)
            case Phase.PLAIN:
                return self._plain(call)
            case Phase.WHOLE_STEPS:
                assert self.loop is not None
                return self.loop.run()
            case Phase.SERVE:
                return self._serve(call, signature)
            case _:
                return self._begin(call, signature)

    def _plain(self, call: TransformerCall) -> Any:
        """Runs the blocks without tables and graphs."""
        if self.capture is not None:
            self.capture.sync_stores([self.moment.step])
        return call.output({})

    def _serve(self, call: TransformerCall, signature: Any) -> Any:
        """Runs a later step from the tables, if its arguments are those that the tables were filled for."""
        step, branch = self.moment.step, self.moment.branch
        self.moment.tabled = self.arguments.is_expected(signature, call.leaves, call.latents, step, branch)
        return self._from_tables(call, self.current[branch]) if self.moment.tabled else self._plain(call)

    def _from_tables(self, call: TransformerCall, variant: Variant) -> Any:
        if self.capture is None:
            return call.output({})
        return self.capture.run(call.forward, call.leaves, call.spec, variant.number)

    def _begin(self, call: TransformerCall, signature: Any) -> Any:
        """Runs the first step of a run: probes if this variant is new, else fills the tables and serves from them."""
        branch, variant = self.moment.branch, self._variant(signature)
        changes = self.arguments.changes_of(signature)
        assert changes is not None
        call = replace(call, changed=changes)
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
            branch_call = Branch(call.forward, call.leaves, call.spec, call.latents, changes, variant.number, out)
            self.loop.branches.append(branch_call)
        return out

    def reset(self) -> None:
        """Ends a run."""
        self.arguments.reset()
        self.current.clear()

    def differed(self) -> bool:
        """Returns whether arguments on a device were not those of the tables in the run that ends; then they get none again."""
        return self.arguments.differed()

    def _variant(self, signature: Any) -> Variant:
        # hooks of others on the blocks may change what a block is given
        hooks = tuple((*b.block._forward_hooks, *b.block._forward_pre_hooks) for b in self.blocks)
        return self.variants.setdefault((signature, hooks), Variant(len(self.variants)))

    def _probe(self, call: TransformerCall, variant: Variant, branch: int) -> Any:
        """Returns the transformer's output at the first step; finds the blocks' dependence and fills the other steps."""
        calls, out = with_recorded_blocks(self.blocks, lambda: call.output({}))
        with torch.no_grad():
            DependenceProbe(call, calls, out).run()
            steps = self.steps[1:]
            self._install(calls, [self.filler.fill(c, steps, branch) for c in calls], steps, branch)
            variant.blocks = [self.stubs.of_call(c) for c in calls]
            self.block_arguments.prepare(call, variant.number, variant.blocks)
        return out

    def _fill(self, call: TransformerCall, variant: Variant, branch: int) -> None:
        """Fills the tables of all steps without running a block: by a graph if there is one, else by a new one if possible."""
        if self.capture is not None and self.capture.refill(variant.number, branch, call.leaves):
            variant.restore(self.blocks)
            return
        arguments_of = self.block_arguments.prepare(call, variant.number, variant.blocks)

        def compute(leaves: list[Any]) -> tuple[list[BlockCall], list[list[Filled]]]:
            calls = self._block_calls(arguments_of(replace(call, leaves=leaves)), variant)
            return calls, [self.filler.fill(c, self.steps, branch) for c in calls]

        calls, filled = compute(call.leaves)
        in_places = self._in_fixed_places(call, variant, branch, (calls, filled), compute)
        if in_places is None:
            self._install(calls, filled, self.steps, branch)
            return
        calls = [values.call(c) for values, c in zip(in_places, calls, strict=True)]
        self._install(calls, [values.filled for values in in_places], self.steps, branch)
        variant.keep(self.blocks, [(step, branch) for step in self.steps])

    def _in_fixed_places(
        self,
        call: TransformerCall,
        variant: Variant,
        branch: int,
        found: tuple[list[BlockCall], list[list[Filled]]],
        compute: Callable[[list[Any]], tuple[list[BlockCall], list[list[Filled]]]],
    ) -> list[BlockValues] | None:
        """Returns the values in places that a graph fills in later runs; None without graphs."""
        values = [BlockValues.of(c, filled) for c, filled in zip(*found, strict=True)]
        complete = all(sum(len(filled.steps) for filled in one.filled) == len(self.steps) for one in values)
        if self.capture is None or not complete:
            return None

        def body(leaves: list[Any]) -> list[BlockValues]:
            return [BlockValues.of(c, filled) for c, filled in zip(*compute(leaves), strict=True)]

        steps_of = [one.steps_of() for one in values]
        packed: list[BlockValues] | None = self.capture.fill(
            variant.number, branch, call.leaves, body, values, steps_of
        )
        return packed

    def _block_calls(self, at_steps: list[list[list[Any]]], variant: Variant) -> list[BlockCall]:
        """Returns how every block is called, from the arguments of every block at each step."""
        calls = []
        for number, known in enumerate(variant.blocks):
            of_block = [arguments[number] for arguments in at_steps]
            pairs = zip(self.steps, of_block, strict=True)
            changed = {step: {i: leaves[i] for i in known.changing} for step, leaves in pairs}
            calls.append(replace(known, leaves=of_block[0], changed=changed))
        return calls

    def _install(self, calls: list[BlockCall], filled: list[list[Filled]], steps: list[int], branch: int) -> None:
        """Gives the blocks their values and their cached sums."""
        for call, of_block in zip(calls, filled, strict=True):
            for values in of_block:
                values.install(call.block, branch)
        if self.sums is not None:
            self.sums.join(calls, steps, branch)
