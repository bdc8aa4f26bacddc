"""SODA (arXiv 2603.07057): anchors by dynamic programming (DCS), pruning or reuse between them (UAS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ...errors import BudgetError
from ...formats.cost import CostModel, TransformerCost
from ...formats.profile import Profile
from ...formats.schedule import Schedule
from ...formats.sites import Model, Sampler, Site
from ..placement import ages_since, place_in_turns, reuse_segment_costs
from ..problem import (
    draw_schedule,
    measured_no_longer,
    reuse_only_cost,
    sign,
    take_knobs,
    turns_of,
    unreachable,
    within,
)

KNOBS: dict[str, Any] = {
    "anchors": 0,  # N_s; 0: the number with the least predicted error
    "uas": "priced",  # priced | paper | none
    "segment": "sum",  # sum | endpoint: what a segment of the dynamic program costs
    "metric": "cos",  # cos | l1 | l2: the error of reuse that places the anchors
    "scale": 1.0,  # lambda of the rate rule keep = clamp(lambda * E_c + beta), read by uas=paper
}


def compile_soda(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns the schedule of least predicted error within the budget.

    For every N_s that the budget allows, DCS places the anchors and UAS spends what is left of the budget on pruning;
    the N_s of least predicted error (sum of 1 − cosine over all cached cells) wins. Of transformers that take turns, each
    has an N_s of its own, under the one budget: every combination that this allows is tried.
    """
    if profile is None:
        raise BudgetError("Policy soda needs sensitivity tables. Measure them: sodaprof profile MODEL -o DIR")
    chosen = take_knobs("soda", KNOBS, knobs)
    for knob, allowed in (("uas", UAS), ("segment", ("sum", "endpoint")), ("metric", ("cos", "l1", "l2"))):
        if chosen[knob] not in allowed:
            raise BudgetError(f"Knob {knob} is {chosen[knob]!r}; expected one of {', '.join(allowed)}.")
    turns = turns_of(model, sampler, "soda")
    caching = profile.caching_error("cos")  # [T, S, ages + 1] of each transformer
    placing = caching if chosen["metric"] == "cos" else profile.caching_error(chosen["metric"])
    pruning, rates = profile.pruning_error()
    full, spent = reuse_only_cost(model, sampler, cost)
    longest, most = profile.max_age + 1, max(len(turn) for own in turns.values() for turn in own)
    placed = {}
    for name, own in turns.items():
        segment = reuse_segment_costs(np.nansum(placing[name], axis=1), last_only=chosen["segment"] == "endpoint")
        placed[name] = place_in_turns(segment, own)

    every = [dict(zip(placed, counts, strict=True)) for counts in product(*placed.values())]
    affordable = [counts for counts in every if within(spent(counts), full / budget)]
    if not affordable:
        reachable = full / spent({name: min(counts) for name, counts in placed.items()})
        raise unreachable(budget, reachable, cost, longest, most)
    if chosen["anchors"]:
        fitting = [counts for counts in affordable if sum(counts.values()) == chosen["anchors"]]
        if not fitting:
            sums = [sum(counts.values()) for counts in affordable]
            more = f" {measured_no_longer(longest)}" if chosen["anchors"] < min(sums) and longest < most else ""
            raise BudgetError(
                f"{chosen['anchors']} anchors do not fit {budget:.3g}x within max-interval {longest}; "
                f"{min(sums)} to {max(sums)} do.{more}"
            )
        affordable = fitting

    parts: dict[tuple[str, int], Part] = {}
    for name, count in {item for counts in affordable for item in counts.items()}:
        steps = [step for turn in turns[name] for step in turn]
        sites, table = model.transformers[name].sites, cost.transformers[name]
        errors = caching[name][steps], pruning[name][steps]
        cells = Cells([steps.index(t) for t in placed[name][count][0]], *errors, rates, sites, table)
        parts[name, count] = UAS[chosen["uas"]](cells, chosen["scale"])
    best: tuple[float, dict[str, int], list[np.ndarray]] | None = None
    for counts in affordable:
        ks, error = spend([parts[item] for item in counts.items()], full / budget - spent(counts))
        if best is None or error < best[0]:
            best = error, counts, ks
    assert best is not None  # affordable is not empty
    error, counts, ks = best
    anchors = sorted(step for name, count in counts.items() for step in placed[name][count][0])
    prune = {}
    for name, k in zip(counts, ks, strict=True):
        prune[name] = np.full((sampler.steps, k.shape[1]), -1)
        prune[name][[step for turn in turns[name] for step in turn]] = k
    schedule = draw_schedule(model, sampler, anchors, prune)
    return sign(schedule, "soda", chosen | {"anchors": len(anchors)}, profile, model, cost, error)


class Cells:
    """The cached cells of one choice of anchors, with the error and the cost of every action on them.

    T: one transformer's own steps, by which its anchors are numbered.
    reuse [T, S]: E_c at the true age. prune, prune_cost [T, S, G] and keep [G]: the same for each number of kept tokens.
    """

    def __init__(
        self,
        anchors: list[int],
        caching: np.ndarray,
        pruning: np.ndarray,
        rates: np.ndarray,
        sites: tuple[Site, ...],
        cost: TransformerCost,
    ) -> None:
        steps = len(caching)
        self.age = ages_since(anchors, steps)
        self.cached = (self.age > 0)[:, None] & np.ones(len(sites), dtype=bool)
        self.prunable = self.cached & np.array([s.prunable for s in sites])
        t = np.arange(steps)
        self.reuse = np.where(self.cached, caching[t, :, self.age], 0.0)
        # prune rates from 0 (nothing dropped, no error) over the profile's to 1 (all dropped: reuse)
        self.rates = np.concatenate([[0.0], rates, [1.0]])
        self.prune = self._with_ends(pruning[t, :, self.age], self.reuse)
        first = np.minimum(self.age, 1)
        self.prune_first = self._with_ends(pruning[t, :, first], np.nan_to_num(caching[t, :, first]))
        self.tokens = np.array([s.tokens for s in sites])
        tables = [cost.sites[s.key] for s in sites]
        self.columns = {table: [i for i, other in enumerate(tables) if other == table] for table in set(tables)}
        # a step with a pruned site pays `fixed` and each R by itself, where a fully cached one pays `all_cached`
        self.surcharge = cost.step.fixed + sum(table.R for table in tables) - cost.step.all_cached

    @staticmethod
    def _with_ends(prune: np.ndarray, reuse: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros_like(reuse)[..., None], np.nan_to_num(prune), reuse[..., None]], axis=2)

    def cost_of(self, k: np.ndarray) -> np.ndarray:
        """Cost beyond reuse [T, S, ...] of recomputing k [T, S, ...] tokens."""
        found = np.empty(k.shape)
        for table, columns in self.columns.items():
            found[:, columns] = table.prune(k[:, columns]) - table.R
        return found

    def total(self, k: np.ndarray) -> float:
        """Cost beyond reuse of the whole choice k [T, S], −1 where the cell is reused."""
        return float((self.cost_of(np.maximum(k, 0)) * (k > 0)).sum() + self.surcharge * (k > 0).any(1).sum())

    def error_of(self, k: np.ndarray) -> float:
        """Predicted error of the choice k [T, S]: E_p at the true age where pruned, E_c where reused."""
        rate = 1 - np.maximum(k, 0) / self.tokens
        pruned = self._at_rate(self.prune, rate)
        return float(np.where(k >= 0, pruned, self.reuse)[self.cached].sum())

    def _at_rate(self, table: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """Linear interpolation of table [T, S, G] over the prune rates at rate [T, S]."""
        right = np.clip(np.searchsorted(self.rates, rate), 1, len(self.rates) - 1)
        low, high = self.rates[right - 1], self.rates[right]
        part = (rate - low) / (high - low)
        take = lambda i: np.take_along_axis(table, i[..., None], 2)[..., 0]  # noqa: E731
        return take(right - 1) * (1 - part) + take(right) * part


@dataclass(frozen=True)
class Part:
    """One transformer's cells, and a family of choices on them: the larger the parameter, the less is pruned."""

    cells: Cells
    choose: Callable[[float], np.ndarray] | None = None  # parameter -> k [T, S], −1: reused; None: all cells are
    low: float = 0.0  # the range of the parameter
    high: float = 0.0


def prune_none(cells: Cells, scale: float) -> Part:
    """Every cell is reused."""
    return Part(cells)


def prune_priced(cells: Cells, scale: float) -> Part:
    """Each cell at the rate of largest (E_c − E_p) − price · cost: pruned where (E_c − E_p) / cost reaches the price."""
    keep = np.rint((1 - cells.rates) * cells.tokens[:, None]).astype(int)  # [S, G]
    k = np.broadcast_to(keep, (*cells.reuse.shape, keep.shape[1]))
    gain = np.where(cells.prunable[..., None] & (k > 0), cells.reuse[..., None] - cells.prune, -np.inf)
    cost = cells.cost_of(k)
    cost = np.maximum(cost, 1e-9 * cost.max())  # what seems free gets a price too, or the bisection had no upper end

    def choose(price: float) -> np.ndarray:
        value = gain - price * cost
        value[..., -1] = 0.0  # rate 1: reuse
        best = value.argmax(2)
        chosen = np.take_along_axis(k, best[..., None], 2)[..., 0]
        return np.where((best == keep.shape[1] - 1) | ~cells.prunable, -1, chosen)

    top = float((gain / cost).max(initial=0.0))
    return Part(cells, choose, 0.0, 2 * top + 1e-30)


def prune_paper(cells: Cells, scale: float) -> Part:
    """By the published rule, prune where E_p(age 1, rate) < E_c(true age); the parameter is −beta.

    keep = clamp(scale · E_c + beta, 0, 1), rate = 1 − keep.
    """

    def choose(minus_beta: float) -> np.ndarray:
        keep = np.clip(scale * cells.reuse - minus_beta, 0, 1)
        tokens = np.rint(keep * cells.tokens).astype(int)
        pruned = cells._at_rate(cells.prune_first, 1 - tokens / cells.tokens) < cells.reuse
        return np.where(pruned & cells.prunable & (tokens > 0), tokens, -1)

    return Part(cells, choose, -1.0, float(scale * cells.reuse.max(initial=0.0)))


def spend(parts: list[Part], left: float) -> tuple[list[np.ndarray], float]:
    """Returns k [T, S] of each part (−1: reuse) and the predicted error of all, where pruning costs at most `left`.

    One parameter for all parts is bisected: the smallest whose choice keeps to that.
    """
    best = [np.full(part.cells.reuse.shape, -1) for part in parts]
    low, high = min(part.low for part in parts), max(part.high for part in parts)
    if left > 0 and all(part.choose for part in parts):
        for _ in range(60):
            middle = (low + high) / 2
            ks = [part.choose(middle) for part in parts if part.choose]
            if sum(part.cells.total(k) for part, k in zip(parts, ks, strict=True)) <= left:
                best, high = ks, middle
            else:
                low = middle
    return best, sum(part.cells.error_of(k) for part, k in zip(parts, best, strict=True))


UAS: dict[str, Callable[[Cells, float], Part]] = {
    "priced": prune_priced,
    "paper": prune_paper,
    "none": prune_none,
}
