"""The one definition of every action: a hook on each site computes, reuses, forecasts or prunes as its row says.

This is the eager path and the reference that faster paths must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ..errors import MismatchError
from ..models.clock import Moment
from ..models.discover import hidden_states, with_rows
from ..schedule import Plan, TokenRule
from .observe import observed
from .tokens import base_score, feature_mean, random_scores, top, with_age, with_bonus

Output = Any  # a tensor [B, N, D], or the tuple of tensors that a joint attention returns


@dataclass
class _Store:
    """What one site remembers on one guidance branch."""

    cache: Output = None
    sources: dict[int, Output] = field(default_factory=dict)
    statistic: torch.Tensor | None = None  # [B', N] of its latest attention, for the token rule
    age: torch.Tensor | None = None  # [B, N] fp32 at step `aged`, None: 0
    aged: int = 0


class SiteRow:
    """One row of the schedule at work: what its site does at each step, and what it must remember for later."""

    def __init__(self, plan: Plan, key: str, module: nn.Module, attends: bool, rule: TokenRule | None) -> None:
        self.key, self.attends, self.rule = key, attends, rule
        # where a module is called on groups of a sample's tokens: brings one value a token into the sample's order
        self.by_sample: Callable[[torch.Tensor, int], torch.Tensor] | None = getattr(module, "by_sample", None)
        self.row, self.tokens = plan.rows[key], plan.tokens(key)
        ks, cells = iter(plan.k.get(key, ())), iter(plan.forecasts.get(key, ()))
        self.k = [next(ks) if action == "P" else 0 for action in self.row]
        self.forecasts = [next(cells) if action == "F" else None for action in self.row]
        self.last_use, self.drop_at = last_uses({t: f.sources for t, f in enumerate(self.forecasts) if f})
        # a cache is only written where R or P reads it before the next C
        self.keeps = [next((a for a in self.row[t + 1 :] if a in "CRP"), "C") != "C" for t in range(len(self.row))]
        self.observed: frozenset[int] = frozenset()  # steps at which its attention is looked at
        self.source: SiteRow | None = None  # whose attention its own tokens are scored by
        self.raster: tuple[int, int] | None = None  # of its tokens, for a local bonus
        self.selected: torch.Tensor | None = (
            None  # [B, k] the tokens recomputed at the latest call, if not by all or none
        )
        self.stores: dict[int, _Store] = {}

    def reset(self) -> None:
        self.stores.clear()
        self.selected = None

    def run(
        self, moment: Moment, forward: Callable[..., Output], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Output:
        """Returns the module's output at this moment, computed or not as the row says."""
        step, action = moment.step, self.row[moment.step]
        self.selected = None
        if action == "-":  # in a block that runs for the caches of other sites: nobody reads this
            return hidden_states(args, kwargs)
        store = self.stores.setdefault(moment.branch, _Store())
        if moment.branch == 0:
            moment.executed[action] += 1
        if action == "C":
            out = self._compute(store, step, forward, args, kwargs)
            self._check_tokens(out)
            store.cache = out if self.keeps[step] else None
            if step in self.last_use:
                store.sources[step] = out
            return out
        if action == "F":
            return self._forecast(store, step)
        if store.cache is None:
            raise MismatchError(
                f"{self.key} has nothing cached at step {step} on branch {moment.branch}: the pipeline skipped earlier "
                "calls of its transformer. Profile this way of calling it, or remove() the schedule."
            )
        if action == "P" and self.k[step]:
            store.cache = self._prune(store, moment, forward, args, kwargs)
        return store.cache

    def _compute(
        self, store: _Store, step: int, forward: Callable[..., Output], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Output:
        """Returns the module's output for all tokens, which are thereby of age 0."""
        store.age, store.aged = None, step
        if step not in self.observed:
            return forward(*args, **kwargs)
        assert self.rule is not None
        out, store.statistic = observed(self.key, self.rule, forward, args, kwargs)
        return out

    def _forecast(self, store: _Store, step: int) -> Output:
        cell = self.forecasts[step]
        assert cell is not None  # verify() matched F cells and forecasts
        outputs = [store.sources[source] for source in cell.sources]
        for source in self.drop_at.get(step, ()):
            del store.sources[source]
        if isinstance(outputs[0], tuple):
            return tuple(weighted(parts, cell.weights) for parts in zip(*outputs, strict=True))
        return weighted(outputs, cell.weights)

    def _prune(
        self,
        store: _Store,
        moment: Moment,
        forward: Callable[..., Output],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Returns the cache with k tokens recomputed, and keeps the books of the token rule."""
        step, cache = moment.step, store.cache
        if self.k[step] == self.tokens:
            out: torch.Tensor = self._compute(store, step, forward, args, kwargs)
            return out
        assert self.rule is not None  # verify() wants a rule where there are P cells
        age = self._age(store, step, cache)
        index = self.selected = top(self._score(store, moment, age), self.k[step]).expand(cache.shape[0], -1)
        store.age, store.aged = (age + 1).expand(cache.shape[:2]).scatter(1, index, 0.0), step
        some_args, some_kwargs = with_rows(self.attends, args, kwargs, index)
        if step in self.observed:
            rows, some = observed(self.key, self.rule, forward, some_args, some_kwargs)
            assert store.statistic is not None  # taken at the C step before: observed_steps()
            store.statistic = store.statistic.scatter(1, index, some)
        else:
            rows = forward(*some_args, **some_kwargs)
        # out of place: a forecast may still hold the same tensor as a source
        return cache.scatter(1, index[..., None].expand(-1, -1, cache.shape[2]), rows.to(cache.dtype))

    def _age(self, store: _Store, step: int, cache: torch.Tensor) -> torch.Tensor:
        """Returns the tokens' ages before this step, fp32 [B, N] or [1, N]: steps at which they were not computed."""
        passed = self.row.count("R", store.aged + 1, step) + self.row.count("P", store.aged + 1, step)
        passed += self.row.count("F", store.aged + 1, step)
        if store.age is None:
            return torch.full((1, cache.shape[1]), float(passed), device=cache.device)
        return store.age + passed

    def _score(self, store: _Store, moment: Moment, age: torch.Tensor) -> torch.Tensor:
        """Returns the scores [B, N] or [1, N] of the token rule."""
        rule, cache = self.rule, store.cache
        assert rule is not None
        if rule.base == "feature_mean":
            score = feature_mean(cache)
        elif rule.base == "random":
            score = random_scores(rule.seed, self.key, moment.step, self.tokens).to(cache.device)
        else:
            assert self.source is not None  # verify() wants one
            values = self.source.stores[moment.branch].statistic
            assert values is not None  # taken at its first step, where all sites compute
            if self.source.by_sample is not None:
                values = self.source.by_sample(values, cache.shape[0])
            score = base_score(rule, values)
        if rule.age_weight:
            score = with_age(rule, score, age)
        if rule.bonus:
            assert self.raster is not None
            score = with_bonus(score, rule.bonus, rule.bonus_grid, self.raster)
        return score

    def _check_tokens(self, out: Output) -> None:
        tokens = (out[0] if isinstance(out, tuple) else out).shape[1]
        if tokens != self.tokens:
            raise MismatchError(
                f"{self.key} has {tokens} tokens here, {self.tokens} in the schedule: another resolution than profiled. "
                "Call the pipeline at the profiled size, or profile and compile for this one."
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
        return self.rows[self.call].run(self.moment, self.fn_ref.original_forward, args, kwargs)
