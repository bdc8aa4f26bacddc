"""The one definition of every action: a hook on each site computes, reuses, forecasts or prunes as its cell says.

This is the runtime `hooks`, the reference that the compiled runtime must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ...errors import MismatchError
from ...formats.schedule import Forecast, Plan, TokenRule
from ...pipelines.clock import Moment
from ...pipelines.probe import as_tokens, hidden_states, main_part, with_rows
from .cells import Cell, CellInputs, CellResult, Output, cells_of, weighted, with_tokens
from .tokens import base_score, feature_mean, observed, random_scores, top, with_age, with_bonus

Forward = Callable[..., Output]
# runs the cell of a site at the traced step, in place of the site, while its block is traced
CellRunner = Callable[["SiteRow", Forward, tuple[Any, ...], dict[str, Any]], Output]


@dataclass
class SiteMemory:
    """What one site keeps on one guidance branch."""

    cache: Output = None
    sources: dict[int, Output] = field(default_factory=dict)  # source step -> output
    statistic: torch.Tensor | None = None  # [B', N] of its latest observed attention
    age: torch.Tensor | None = None  # [B, N] fp32 after the latest P cell; None after a C cell: all ages are 0


class Buffers(Protocol):
    """Fixed places for what a site keeps, so that a captured graph finds it there."""

    def put(self, name: tuple[int, Any], value: Output) -> Output:
        """Returns the place of this name (branch, "cache", "age", "statistic" or slot) with the value copied into it."""

    def get(self, name: tuple[int, Any]) -> Output:
        """Returns the place of this name; None if there is none."""


class SiteRow:
    """The cells of one site and what it keeps between steps.

    `read`, `act` and `write` are the three parts of a cell; `act` is a pure function of tensors, which can be traced.
    """

    def __init__(
        self,
        plan: Plan,
        key: str,
        module: nn.Module,
        attends: bool,
        rule: TokenRule | None,
        observed: frozenset[int] = frozenset(),
        raster: tuple[int, int] | None = None,
    ) -> None:
        self.key, self.attends, self.rule = key, attends, rule
        # for a module called on groups of a sample's tokens: reorders values per token to the sample's order
        self.by_sample: Callable[[torch.Tensor, int], torch.Tensor] | None = getattr(module, "by_sample", None)
        self.layout, self.holds_text = plan.layout(key), plan.holds_text(key)
        self.cells = self.profiled_cells = cells_of(plan, key, observed)
        self.prunes = any(cell.action == "P" for cell in self.cells)
        self.tokens = self.profiled_tokens = plan.tokens(key)
        self.raster = self.profiled_raster = raster  # rows and columns of the tokens, for a local bonus
        # the number of tokens makes no difference; that of text, if other sites show the resolution
        self.any_tokens = self.holds_text and not self.prunes and not all(map(plan.holds_text, plan.rows))
        self.scored_by: SiteRow | None = None  # the site whose attention scores this one's tokens
        self.runner: CellRunner | None = None
        self.buffers: Buffers | None = None
        self.memory: dict[int, SiteMemory] = {}
        self.selected: torch.Tensor | None = None  # CellResult.selected of the latest call

    def reset(self) -> None:
        """Drops what is kept."""
        self.memory.clear()
        self.selected = None

    def resize(self, tokens: int, raster: tuple[int, int] | None) -> None:
        """Replaces the cells by those for another number of tokens: each P cell recomputes the same share of them."""
        self.any_tokens = not self.prunes
        if tokens == self.tokens:
            return
        self.tokens, self.raster = tokens, raster if self.profiled_raster else None
        self.cells = with_tokens(self.profiled_cells, tokens, tokens / self.profiled_tokens)

    def set_weights(self, step: int, weights: tuple[float, ...]) -> None:
        """Replaces the weights of the F cell at `step`."""
        cell = self.cells[step]
        assert cell.forecast is not None
        changed = replace(cell, forecast=Forecast(cell.forecast.sources, weights))
        self.cells = (*self.cells[:step], changed, *self.cells[step + 1 :])

    def run(self, moment: Moment, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        """Returns the site's output at this moment, computed or not as its cell says."""
        result = self.act(moment.step, self.read(moment), forward, args, kwargs)
        self.write(moment, result)
        return result.out

    def read(self, moment: Moment) -> CellInputs:
        """Returns what the cell of this moment needs from the memory; MismatchError if it was never kept."""
        cell = self.cells[moment.step]
        if cell.action in "C-":
            return CellInputs()
        memory = self.memory.setdefault(moment.branch, SiteMemory())
        sources = cell.forecast.sources if cell.forecast else None
        if (memory.cache is None) if sources is None else any(step not in memory.sources for step in sources):
            raise MismatchError(
                f"{self.key} has nothing cached at step {moment.step} on branch {moment.branch}: the pipeline skipped "
                "earlier calls of its transformer. Profile this way of calling it, or remove() the schedule."
            )
        if sources is not None:
            return CellInputs(sources=tuple(memory.sources[step] for step in sources))
        if not cell.chooses:
            return CellInputs(memory.cache)
        scored = None
        if self.scored_by is not None:
            scored = self.scored_by.memory[moment.branch].statistic
        elif self.rule is not None and self.rule.base == "random":
            scored = random_scores(self.rule.seed, self.key, moment.step, self.tokens).to(memory.cache.device)
        return CellInputs(memory.cache, None, memory.age, memory.statistic if cell.observes else None, scored)

    def act(
        self, step: int, inputs: CellInputs, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CellResult:
        """Returns the output of the cell at `step` and what is kept of it, from its inputs and the module's forward."""
        cell = self.cells[step]
        if cell.action == "-":  # in a block that runs for the caches of other sites; nothing reads this
            return CellResult(hidden_states(args, kwargs))
        if cell.forecast is not None:
            assert inputs.sources is not None
            return CellResult(weighted(inputs.sources, cell.forecast.weights))
        if cell.reuses:
            return CellResult(inputs.cache)
        if cell.chooses:
            return self._prune(cell, inputs, forward, args, kwargs)
        out, statistic = self._call(cell, forward, args, kwargs)
        self._check_tokens(out)
        return CellResult(out, out, None, statistic)

    def write(self, moment: Moment, result: CellResult) -> None:
        """Keeps what later cells need, drops what none does, counts the cell."""
        step, cell = moment.step, self.cells[moment.step]
        self.selected = result.selected
        if cell.action == "-":
            return
        moment.executed[cell.action] += 1
        memory = self.memory.setdefault(moment.branch, SiteMemory())
        for source in cell.drops:
            del memory.sources[source]
        if not cell.computes:
            return
        memory.cache = self._kept((moment.branch, "cache"), result.cache) if cell.keeps_cache else None
        memory.age = self._kept((moment.branch, "age"), result.age)
        if result.statistic is not None:
            memory.statistic = self._kept((moment.branch, "statistic"), result.statistic)
        if cell.slot is not None:
            memory.sources[step] = self._kept((moment.branch, cell.slot), result.out)

    def _kept(self, name: tuple[int, Any], value: Output) -> Output:
        """Returns what is kept of a value: the value itself, or its place in the buffers."""
        return value if self.buffers is None or value is None else self.buffers.put(name, value)

    def snapshot(self) -> dict[int, SiteMemory]:
        """Returns a copy of the memory, to be assigned to `memory` later; buffers keep their later contents."""
        return {branch: replace(memory, sources=dict(memory.sources)) for branch, memory in self.memory.items()}

    def recall(self, moment: Moment) -> CellResult:
        """Returns what the cell of this moment left in the buffers, if a graph ran it."""
        assert self.buffers is not None
        cell, branch = self.cells[moment.step], moment.branch
        return CellResult(
            out=None if cell.slot is None else self.buffers.get((branch, cell.slot)),
            cache=self.buffers.get((branch, "cache")),
            age=self.buffers.get((branch, "age")) if cell.chooses else None,
            statistic=self.buffers.get((branch, "statistic")) if cell.observes else None,
        )

    def _call(
        self, cell: Cell, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Output, torch.Tensor | None]:
        """Returns the module's output, and the statistic of its attention if the cell observes it."""
        if not cell.observes:
            return forward(*args, **kwargs), None
        assert self.rule is not None
        return observed(self.key, self.rule, forward, args, kwargs)

    def _prune(
        self, cell: Cell, inputs: CellInputs, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CellResult:
        """Returns the cache with k tokens recomputed, their ages and their statistics."""
        cache, growth = inputs.cache, float(cell.age_growth)
        age = torch.full((1, self.tokens), growth, device=cache.device) if inputs.age is None else inputs.age + growth
        index = top(self._score(inputs, age), cell.k).expand(cache.shape[0], -1)
        rows, statistic = self._call(cell, forward, *with_rows(self.attends, args, kwargs, index))
        if statistic is not None:
            assert inputs.statistic is not None  # observed at the C step before
            statistic = inputs.statistic.scatter(1, index, statistic)
        # out of place: a forecast may still hold the same tensor as a source
        out = cache.scatter(1, index[..., None].expand(-1, -1, cache.shape[2]), rows.to(cache.dtype))
        age = (age + 1).expand(cache.shape[:2]).scatter(1, index, 0.0)
        return CellResult(out, out, age, statistic, index)

    def _score(self, inputs: CellInputs, age: torch.Tensor) -> torch.Tensor:
        """Returns the scores [B, N] or [1, N] of the token rule."""
        rule, scored = self.rule, inputs.scored
        assert rule is not None  # a legal schedule has a rule if it has P cells
        if rule.base == "feature_mean":
            score = feature_mean(inputs.cache)
        else:
            assert scored is not None  # observed at the first step, at which all sites compute
            if self.scored_by is not None and self.scored_by.by_sample is not None:
                scored = self.scored_by.by_sample(scored, inputs.cache.shape[0])
            score = scored if rule.base == "random" else base_score(rule, scored)
        if rule.age_weight:
            score = with_age(rule, score, age)
        if rule.bonus:
            assert self.raster is not None
            score = with_bonus(score, rule.bonus, rule.bonus_grid, self.raster)
        return score

    def _check_tokens(self, out: Output) -> None:
        tokens = as_tokens(main_part(out), self.layout).shape[1]
        if tokens == self.tokens or self.any_tokens:
            return
        if self.holds_text and self.prunes:
            raise MismatchError(
                f"{self.key} has {tokens} tokens here, {self.tokens} in the schedule: they hold the text, of another length "
                "than profiled, and the schedule prunes them. Pad the prompts to the profiled length, or compile without "
                "pruning: --knob uas=none"
            )
        raise MismatchError(
            f"{self.key} has {tokens} tokens here, {self.tokens} in the schedule: another resolution than profiled "
            "(or, in a few models, text of another length). "
            "Call the pipeline at the profiled size, profile and compile for this one, or let the schedule be scaled: "
            "--allow-resolution, apply(..., allow_resolution=True)."
        )


class SiteHook(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a module: runs each call by the row of that call (a module may be called twice)."""

    def __init__(self, rows: list[SiteRow], moment: Moment) -> None:
        super().__init__()
        self.rows, self.moment = rows, moment
        self.latest_forward, self.call = -1, 0

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Output:
        self.call = self.call + 1 if self.latest_forward == self.moment.forward else 0
        self.latest_forward = self.moment.forward
        if self.call >= len(self.rows):
            raise MismatchError(
                f"{self.rows[0].key} is called {self.call + 1} times in one forward pass, the schedule has "
                f"{len(self.rows)} rows for it. Profile again: sodaprof profile MODEL -o DIR --force"
            )
        row = self.rows[self.call]
        if row.runner is not None:
            return row.runner(row, self.fn_ref.original_forward, args, kwargs)
        return row.run(self.moment, self.fn_ref.original_forward, args, kwargs)
