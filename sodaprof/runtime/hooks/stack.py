"""Steps that skip the blocks: the hidden state before the final norm is forecast from earlier steps, as row `stack` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ...errors import UnsupportedModelError
from ...formats.schedule import Plan
from ...formats.sites import SiteKey
from ...pipelines.clock import Moment
from ...pipelines.probe import hidden_states
from .cells import dropped_at, last_uses, weighted


@dataclass
class StackMemory:
    """What the stack keeps on one guidance branch."""

    entry: torch.Tensor | None = None  # input of the first block at this step
    kept: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)  # (form of a forecast, source step)


class StackRow:
    """The S cells of a stack, and what it keeps between steps."""

    def __init__(self, plan: Plan) -> None:
        self.row = plan.stack
        self.blocks = list(dict.fromkeys(map(block_of, plan.rows)))  # in execution order
        steps = [t for t, action in enumerate(self.row) if action == "S"]
        self.cells = dict(zip(steps, plan.stack_forecasts, strict=True))
        self.drops = dropped_at(last_uses({t: cell.sources for t, cell in self.cells.items()}))
        self.wanted = {(cell.form, source) for cell in self.cells.values() for source in cell.sources}
        # an S step runs the blocks that hold a C cell, for the caches of these
        self.runs = {(block_of(site), t) for site, row in plan.rows.items() for t in steps if row[t] == "C"}
        self.idle_sites = {t: sum(row[t] == "-" for row in plan.rows.values()) for t in steps}
        self.memory: dict[int, StackMemory] = {}  # of each branch

    def reset(self) -> None:
        self.memory.clear()

    def keep_all(self) -> None:
        """Keeps the values of every step whose blocks run until the run ends, in the forms that S cells forecast in."""
        running = [step for step, action in enumerate(self.row) if action == "."]
        self.wanted = {(form, step) for form, _ in self.wanted for step in running}
        self.drops = {}

    def snapshot(self) -> dict[int, StackMemory]:
        """Returns a copy of the memory, to be assigned to `memory` later."""
        return {branch: replace(memory, kept=dict(memory.kept)) for branch, memory in self.memory.items()}

    def sources(self, step: int) -> list[list[torch.Tensor]]:
        """Returns what the S cell of the next step forecasts from, in its order: each for all branches."""
        cell = self.cells[step]
        return [[self.memory[n].kept[cell.form, source] for n in sorted(self.memory)] for source in cell.sources]

    def run(
        self, block: str, moment: Moment, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Returns the block's output; at a skipped step its input, and for the last block the forecast."""
        step, skips = moment.step, self.row[moment.step] == "S"
        memory = self.memory.setdefault(moment.branch, StackMemory())
        if block == self.blocks[0]:
            memory.entry = hidden_states(args, kwargs)
        passes = skips and (block, step) not in self.runs
        out = hidden_states(args, kwargs) if passes else forward(*args, **kwargs)
        if not torch.is_tensor(out):
            raise UnsupportedModelError(
                f"Block {block} returns a {type(out).__name__}; this release skips stacks whose blocks return one "
                "tensor. Compile with --policy soda."
            )
        if block != self.blocks[-1]:
            return out
        assert memory.entry is not None  # the first block was called before
        if skips:
            if self.idle_sites[step]:
                moment.executed["-"] += self.idle_sites[step]
            out = self._forecast(memory, memory.entry, step)
        else:
            if ("output", step) in self.wanted:
                memory.kept["output", step] = out
            if ("drift", step) in self.wanted:
                memory.kept["drift", step] = out - memory.entry
        memory.entry = None
        return out

    def _forecast(self, memory: StackMemory, entry: torch.Tensor, step: int) -> torch.Tensor:
        cell = self.cells[step]
        total: torch.Tensor = weighted([memory.kept[cell.form, source] for source in cell.sources], cell.weights)
        for source in self.drops.get(step, ()):
            memory.kept.pop(("output", source), None)
            memory.kept.pop(("drift", source), None)
        return total if cell.form == "output" else entry + total


def block_of(site: str) -> str:
    """Returns the path of the block that holds the site."""
    return SiteKey.parse(site).block


class BlockHook(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a block of a schedule that skips stacks; traced: the block's `TracedBlock`, if there is one."""

    def __init__(self, stack: StackRow, block: str, moment: Moment, traced: Any = None) -> None:
        super().__init__()
        self.stack, self.block, self.moment, self.traced = stack, block, moment, traced

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.traced is not None and self.traced.stub is not None:  # stubbed: this is no step
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.stack.run(self.block, self.moment, self.fn_ref.original_forward, args, kwargs)
