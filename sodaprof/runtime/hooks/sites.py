"""The one definition of every action: a hook on each site computes, reuses, forecasts or prunes as its row says.

This is the eager path and the reference that faster paths must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from torch import nn
from torch.utils._pytree import tree_map

from ...errors import MismatchError
from ...formats.schedule import Plan, TokenRule
from ...pipelines.clock import Moment
from ...pipelines.probe import as_tokens, hidden_states, main_part, with_rows
from .tokens import base_score, feature_mean, observed, random_scores, top, with_age, with_bonus

Output = Any  # a tensor [B, N, D], or the tuple of tensors that a joint attention returns


class Given(NamedTuple):
    """What a cell reads of what was kept; None where it reads nothing of the kind."""

    cache: Output = None
    sources: tuple[Output, ...] | None = None  # of a forecast, in its order
    age: torch.Tensor | None = None  # fp32 [B, N] or [1, N], when it was last written
    statistic: torch.Tensor | None = None  # of its own attention, whose fresh rows it replaces
    scored: torch.Tensor | None = None  # of the attention that its tokens are scored by; random scores [1, N]


class Made(NamedTuple):
    """What a cell leaves: its output, and what is to be kept."""

    out: Output
    cache: Output = None
    age: torch.Tensor | None = None
    statistic: torch.Tensor | None = None
    selected: torch.Tensor | None = None  # int64 [B, k] the tokens recomputed, if neither none nor all


@dataclass
class _Store:
    """What one site remembers on one guidance branch."""

    cache: Output = None
    sources: dict[int, Output] = field(default_factory=dict)
    statistic: torch.Tensor | None = None  # [B', N] of its latest attention, for the token rule
    age: torch.Tensor | None = None  # [B, N] fp32 right after its latest P cell, None: 0, after a C cell


class SiteRow:
    """One row of the schedule at work: what its site does at each step, and what it must remember for later.

    `read`, `act` and `write` are a cell's three parts; `act` is a pure function of tensors, which can be traced.
    """

    def __init__(self, plan: Plan, key: str, module: nn.Module, attends: bool, rule: TokenRule | None) -> None:
        self.key, self.attends, self.rule = key, attends, rule
        # where a module is called on groups of a sample's tokens: brings one value a token into the sample's order
        self.by_sample: Callable[[torch.Tensor, int], torch.Tensor] | None = getattr(module, "by_sample", None)
        self.row, self.tokens, self.layout = plan.rows[key], plan.tokens(key), plan.layout(key)
        self.holds_text = plan.holds_text(key)
        # where other sites tell the resolution, text of any length will do
        self.any_length = self.holds_text and "P" not in self.row and not all(map(plan.holds_text, plan.rows))
        ks, cells = iter(plan.k.get(key, ())), iter(plan.forecasts.get(key, ()))
        self.k = [next(ks) if action == "P" else 0 for action in self.row]
        self.forecasts = [next(cells) if action == "F" else None for action in self.row]
        self.last_use, self.drop_at = last_uses({t: f.sources for t, f in enumerate(self.forecasts) if f})
        self.source_places = places_of(self.last_use)
        # a cache is only written where R or P reads it before the next C
        self.keeps = [next((a for a in self.row[t + 1 :] if a in "CRP"), "C") != "C" for t in range(len(self.row))]
        self.passed = [self._passed(t) if self._chooses(t) else 0 for t in range(len(self.row))]
        self.planned, self.planned_k = self.tokens, self.k  # at the resolution that was profiled
        self.observed: frozenset[int] = frozenset()  # steps at which its attention is looked at
        self.source: SiteRow | None = None  # whose attention its own tokens are scored by
        self.raster: tuple[int, int] | None = None  # of its tokens, for a local bonus
        self.planned_raster: tuple[int, int] | None = None
        self.any_size = False  # how many tokens there are makes no difference
        self.tracer: Any = None  # runs the cells instead while the block is traced
        self.selected: torch.Tensor | None = None  # Made.selected of the latest call
        self.buffers: dict[Any, Output] | None = None  # where steps are captured: what is kept is copied there
        self.make_buffer: Callable[[SiteRow, Any, Output], Output] = lambda row, what, value: tree_map(
            torch.empty_like, value
        )
        self.stores: dict[int, _Store] = {}

    def reset(self) -> None:
        self.stores.clear()
        self.selected = None

    def resize(self, tokens: int, raster: tuple[int, int] | None) -> None:
        """Takes another number of tokens than the schedule's: each pruned cell computes the same share of them."""
        self.any_size = "P" not in self.row
        if tokens == self.tokens:
            return
        self.tokens, self.raster = tokens, raster if self.planned_raster else None
        share = tokens / self.planned
        self.k = [k and min(tokens, max(1, round(k * share))) for k in self.planned_k]
        self.passed = [self._passed(t) if self._chooses(t) else 0 for t in range(len(self.row))]

    def run(
        self, moment: Moment, forward: Callable[..., Output], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Output:
        """Returns the module's output at this moment, computed or not as the row says."""
        made = self.act(moment.step, self.read(moment), forward, args, kwargs)
        self.write(moment, made)
        return made.out

    def read(self, moment: Moment) -> Given:
        """Returns what the cell of this moment needs of what was kept."""
        step, action = moment.step, self.row[moment.step]
        if action in "C-":
            return Given()
        store = self.stores.setdefault(moment.branch, _Store())
        cell = self.forecasts[step]
        if (store.cache is None) if cell is None else any(source not in store.sources for source in cell.sources):
            raise MismatchError(
                f"{self.key} has nothing cached at step {step} on branch {moment.branch}: the pipeline skipped earlier "
                "calls of its transformer. Profile this way of calling it, or remove() the schedule."
            )
        if cell is not None:
            return Given(sources=tuple(store.sources[source] for source in cell.sources))
        if not self._chooses(step):
            return Given(store.cache)
        scored = None
        if self.source is not None:
            scored = self.source.stores[moment.branch].statistic
        elif self.rule is not None and self.rule.base == "random":
            scored = random_scores(self.rule.seed, self.key, step, self.tokens).to(store.cache.device)
        return Given(store.cache, None, store.age, store.statistic if step in self.observed else None, scored)

    def act(
        self, step: int, given: Given, forward: Callable[..., Output], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Made:
        """Returns the output of the cell at `step`, and what it leaves, from what it is given and the module's forward."""
        action = self.row[step]
        if action == "-":  # in a block that runs for the caches of other sites: nobody reads this
            return Made(hidden_states(args, kwargs))
        if action == "F":
            cell = self.forecasts[step]
            assert cell is not None  # verify() matched F cells and forecasts
            assert given.sources is not None
            return Made(forecast(given.sources, cell.weights))
        if action == "R" or (action == "P" and not self.k[step]):
            return Made(given.cache)
        if action == "P" and self._chooses(step):
            return self._prune(step, given, forward, args, kwargs)
        statistic = None
        if step in self.observed:
            assert self.rule is not None
            out, statistic = observed(self.key, self.rule, forward, args, kwargs)
        else:
            out = forward(*args, **kwargs)
        self._check_tokens(out)
        return Made(out, out, None, statistic)

    def write(self, moment: Moment, made: Made) -> None:
        """Keeps what later cells need, forgets what none does, counts the cell."""
        step, action = moment.step, self.row[moment.step]
        self.selected = made.selected
        if action == "-":
            return
        if moment.branch == 0:
            moment.executed[action] += 1
        store = self.stores.setdefault(moment.branch, _Store())
        for source in self.drop_at.get(step, ()):
            del store.sources[source]
        if action == "C" or (action == "P" and self.k[step]):
            keep = lambda what, value: self._keep((moment.branch, what), value)  # noqa: E731
            store.cache = keep("cache", made.cache) if self.keeps[step] else None
            store.age = keep("age", made.age)
            if made.statistic is not None:
                store.statistic = keep("statistic", made.statistic)
            if step in self.last_use:
                store.sources[step] = keep(self.source_places[step], made.out)

    def _keep(self, what: Any, value: Output) -> Output:
        """Returns what is to be kept: the value itself, or its buffer with the value in it."""
        if self.buffers is None or value is None:
            return value
        if what not in self.buffers:
            self.buffers[what] = self.make_buffer(self, what, value)
        buffer = self.buffers[what]
        if buffer is not value:
            tree_map(lambda mine, new: mine.copy_(new), buffer, value)
        return buffer

    def snapshot(self) -> dict[int, _Store]:
        """Returns what is remembered now, to be put back as `stores`; buffers keep their later contents."""
        return {branch: replace(store, sources=dict(store.sources)) for branch, store in self.stores.items()}

    def recall(self, moment: Moment) -> Made:
        """Returns what the cell of this moment left in the buffers, where a graph wrote it."""
        assert self.buffers is not None
        at = lambda what: self.buffers.get((moment.branch, what))  # noqa: E731
        step = moment.step
        return Made(
            at(self.source_places.get(step)), at("cache"), at("age") if self._chooses(step) else None,
            at("statistic") if step in self.observed else None,
        )  # fmt: skip

    def places(self, step: int) -> tuple[Any, ...]:
        """Returns which buffers the cell reads and writes, and all else that it depends on."""
        cell = self.forecasts[step]
        read = tuple(self.source_places[source] for source in cell.sources) if cell is not None else ()
        return self.cell(step), read, self.source_places.get(step), self.keeps[step]

    def cell(self, step: int) -> tuple[Any, ...]:
        """Returns all of the step that `act` depends on: where it is equal, `act` does the same to the same tensors."""
        cell = self.forecasts[step]
        weights = cell.weights if cell else ()
        return self.row[step], self.k[step], weights, step in self.observed, self.passed[step]

    def rests(self, step: int) -> bool:
        """Whether the cell makes nothing new to be kept: it reuses or forecasts."""
        return self.row[step] in "RF" or (self.row[step] == "P" and not self.k[step])

    def _chooses(self, step: int) -> bool:
        return self.row[step] == "P" and 0 < self.k[step] < self.tokens

    def _prune(
        self, step: int, given: Given, forward: Callable[..., Output], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Made:
        """Returns the cache with k tokens recomputed, and keeps the books of the token rule."""
        cache = given.cache
        passed = float(self.passed[step])
        age = torch.full((1, self.tokens), passed, device=cache.device) if given.age is None else given.age + passed
        index = top(self._score(given, age), self.k[step]).expand(cache.shape[0], -1)
        some_args, some_kwargs = with_rows(self.attends, args, kwargs, index)
        statistic = given.statistic
        if step in self.observed:
            assert self.rule is not None
            assert statistic is not None  # taken at the C step before: observed_steps()
            rows, fresh = observed(self.key, self.rule, forward, some_args, some_kwargs)
            statistic = statistic.scatter(1, index, fresh)
        else:
            rows = forward(*some_args, **some_kwargs)
        # out of place: a forecast may still hold the same tensor as a source
        out = cache.scatter(1, index[..., None].expand(-1, -1, cache.shape[2]), rows.to(cache.dtype))
        age = (age + 1).expand(cache.shape[:2]).scatter(1, index, 0.0)
        return Made(out, out, age, statistic, index)

    def _passed(self, step: int) -> int:
        """Returns at how many steps since it last computed tokens all ages grew by 1: untouched cells do not count."""
        latest = max(t for t in range(step) if self.row[t] == "C" or (self.row[t] == "P" and self.k[t]))
        return sum(self.row[t] in "RPF" for t in range(latest + 1, step))

    def _score(self, given: Given, age: torch.Tensor) -> torch.Tensor:
        """Returns the scores [B, N] or [1, N] of the token rule."""
        rule, scored = self.rule, given.scored
        assert rule is not None  # verify() wants a rule where there are P cells
        if rule.base == "feature_mean":
            score = feature_mean(given.cache)
        else:
            assert scored is not None  # taken at its first step, where all sites compute
            if self.source is not None and self.source.by_sample is not None:
                scored = self.source.by_sample(scored, given.cache.shape[0])
            score = scored if rule.base == "random" else base_score(rule, scored)
        if rule.age_weight:
            score = with_age(rule, score, age)
        if rule.bonus:
            assert self.raster is not None
            score = with_bonus(score, rule.bonus, rule.bonus_grid, self.raster)
        return score

    def _check_tokens(self, out: Output) -> None:
        tokens = as_tokens(main_part(out), self.layout).shape[1]
        if tokens == self.tokens or self.any_length or self.any_size:
            return
        if self.holds_text and "P" in self.row:
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


def last_uses(cells: dict[int, tuple[int, ...]]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Returns {source step: the last step that forecasts from it}, and the same by that last step."""
    last: dict[int, int] = {}
    for step, sources in cells.items():
        last |= dict.fromkeys(sources, step)
    drop_at: dict[int, list[int]] = {}
    for source, step in last.items():
        drop_at.setdefault(step, []).append(source)
    return last, drop_at


def places_of(last_use: dict[int, int]) -> dict[int, int]:
    """Returns {source step: number of its buffer}, as few as are needed at once; a step reads before it writes."""
    places: dict[int, int] = {}
    for step in sorted(last_use):
        taken = {place for source, place in places.items() if last_use[source] > step}
        places[step] = next(i for i in range(len(taken) + 1) if i not in taken)
    return places


def forecast(outputs: tuple[Output, ...], weights: tuple[float, ...]) -> Output:
    """Returns the weighted sum of module outputs, which may be tuples of tensors."""
    if isinstance(outputs[0], tuple):
        return tuple(weighted(parts, weights) for parts in zip(*outputs, strict=True))
    return weighted(outputs, weights)


def weighted(outputs: Any, weights: tuple[float, ...]) -> torch.Tensor:
    """Returns the weighted sum of tensors, in the order given."""
    total: torch.Tensor = outputs[0] * weights[0]
    for out, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + out * weight
    return total


class SiteHook(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a module: hands each call to the row of that call (a module may be called twice)."""

    def __init__(self, rows: list[SiteRow], moment: Moment) -> None:
        super().__init__()
        self.rows, self.moment = rows, moment
        self.forward_seen, self.call = -1, 0

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Output:
        self.call = self.call + 1 if self.forward_seen == self.moment.forward else 0
        self.forward_seen = self.moment.forward
        if self.call >= len(self.rows):
            raise MismatchError(
                f"{self.rows[0].key} is called {self.call + 1} times in one forward pass, the schedule has "
                f"{len(self.rows)} rows for it. Profile again: sodaprof profile MODEL -o DIR --force"
            )
        row = self.rows[self.call]
        if row.tracer is not None:
            return row.tracer.run(row, self.fn_ref.original_forward, args, kwargs)
        return row.run(self.moment, self.fn_ref.original_forward, args, kwargs)
