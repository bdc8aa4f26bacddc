"""The `stack` row at work: steps whose blocks are skipped, the hidden state before the final norm forecast instead."""

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
    """What is remembered on one guidance branch."""

    entry: torch.Tensor | None = None  # this step's input of the first block, the patch embedding
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)  # source step -> output of the last block
    drift: dict[int, torch.Tensor] = field(default_factory=dict)  # source step -> that less the input of the first


class StackRow:
    """A stack row with S cells at work."""

    def __init__(self, plan: Plan) -> None:
        self.row = plan.stack
        self.blocks = list(dict.fromkeys(block_of(site) for site in plan.rows))  # in execution order
        steps = [t for t, action in enumerate(self.row) if action == "S"]
        self.cells = dict(zip(steps, plan.stack_forecasts, strict=True))
        self.drop_at = dropped_at(last_uses({t: cell.sources for t, cell in self.cells.items()}))
        self.forms = {form: {s for c in self.cells.values() if c.form == form for s in c.sources}
                      for form in ("output", "drift")}  # fmt: skip
        # an S step runs the blocks that hold a C cell, for the caches of these
        self.runs = {(block_of(site), t) for site, row in plan.rows.items() for t in steps if row[t] == "C"}
        self.untouched = {t: sum(row[t] == "-" for row in plan.rows.values()) for t in steps}
        self.memory: dict[int, StackMemory] = {}

    def reset(self) -> None:
        self.memory.clear()

    def keep_all(self) -> None:
        """Keeps what every running step gave until the run ends, in the forms that S cells forecast in."""
        running = {step for step, action in enumerate(self.row) if action == "."}
        self.forms = {form: running if sources else sources for form, sources in self.forms.items()}
        self.drop_at = {}

    def snapshot(self) -> dict[int, StackMemory]:
        """Returns what is remembered now, to be put back as `memory`."""
        return {
            n: replace(store, hidden=dict(store.hidden), drift=dict(store.drift)) for n, store in self.memory.items()
        }

    def sources(self, step: int) -> list[list[torch.Tensor]]:
        """Returns what the S cell at this step, the next to run, forecasts from, in its order: each for all branches."""
        cell = self.cells[step]
        return [[_kept(self.memory[n], cell.form)[source] for n in sorted(self.memory)] for source in cell.sources]

    def run(
        self, block: str, moment: Moment, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Returns the block's output: computed at a running step, its input or the forecast at a skipped one."""
        step, skips = moment.step, self.row[moment.step] == "S"
        store = self.memory.setdefault(moment.branch, StackMemory())
        if block == self.blocks[0]:
            store.entry = hidden_states(args, kwargs)
        idle = skips and (block, step) not in self.runs
        out = hidden_states(args, kwargs) if idle else forward(*args, **kwargs)
        if not torch.is_tensor(out):
            raise UnsupportedModelError(
                f"Block {block} returns a {type(out).__name__}; this release skips stacks whose blocks hand on one "
                "tensor. Compile with --policy soda."
            )
        if block != self.blocks[-1]:
            return out
        if skips:
            if moment.branch == 0 and self.untouched[step]:
                moment.executed["-"] += self.untouched[step]
            out = self._forecast(store, step)
        else:
            if step in self.forms["output"]:
                store.hidden[step] = out
            if step in self.forms["drift"]:
                assert store.entry is not None  # the first block ran before
                store.drift[step] = out - store.entry
        store.entry = None
        return out

    def _forecast(self, store: StackMemory, step: int) -> torch.Tensor:
        cell = self.cells[step]
        kept = _kept(store, cell.form)
        total = weighted([kept[source] for source in cell.sources], cell.weights)
        for source in self.drop_at.get(step, ()):
            store.hidden.pop(source, None)
            store.drift.pop(source, None)
        if cell.form == "output":
            return total
        assert store.entry is not None
        return store.entry + total


def _kept(store: StackMemory, form: str) -> dict[int, torch.Tensor]:
    return store.hidden if form == "output" else store.drift


def block_of(site: str) -> str:
    """Returns the path of the block that holds the site."""
    return SiteKey.parse(site).block


class BlockHook(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a block of a schedule that skips stacks."""

    def __init__(self, stack: StackRow, block: str, moment: Moment, lowered: Any = None) -> None:
        super().__init__()
        self.stack, self.block, self.moment, self.lowered = stack, block, moment, lowered

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.lowered is not None and self.lowered.stub is not None:  # a probe: this is no step
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.stack.run(self.block, self.moment, self.fn_ref.original_forward, args, kwargs)
