"""SODA (arXiv 2603.07057): anchors by dynamic programming (DCS), pruning or reuse between them (UAS)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cost import CostModel, SiteCost
from ..errors import BudgetError
from ..profiles import Profile
from ..schedule import Schedule
from ..sites import Model, Sampler
from .anchors import ages_since, place_anchors, segment_costs
from .draw import draw_schedule, one_transformer, reuse_only_cost, sign, take_knobs, unreachable, within

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
    the N_s of least predicted error (sum of 1 − cosine over all cached cells) wins.
    """
    if profile is None:
        raise BudgetError("Policy soda needs sensitivity tables. Measure them: sodaprof profile MODEL -o DIR")
    chosen = take_knobs("soda", KNOBS, knobs)
    for knob, allowed in (("uas", UAS), ("segment", ("sum", "endpoint")), ("metric", ("cos", "l1", "l2"))):
        if chosen[knob] not in allowed:
            raise BudgetError(f"Knob {knob} is {chosen[knob]!r}; expected one of {', '.join(allowed)}.")
    name = one_transformer(model, "soda")
    steps = sampler.steps
    caching = profile.caching_error("cos")[name]  # [T, S, ages + 1]
    placing = caching if chosen["metric"] == "cos" else profile.caching_error(chosen["metric"])[name]
    pruning, rates = profile.pruning_error()
    segment = segment_costs(np.nansum(placing, axis=1), last_only=chosen["segment"] == "endpoint")

    full, spent = reuse_only_cost(model, sampler, cost)
    placed = place_anchors(segment, steps)
    affordable = {n: anchors for n, (anchors, _) in placed.items() if within(spent(n), full / budget)}
    if not affordable:
        raise unreachable(budget, full / spent(min(placed)), cost)
    if chosen["anchors"]:
        if chosen["anchors"] not in affordable:
            raise BudgetError(
                f"{chosen['anchors']} anchors do not fit {budget:.3g}x within max-interval {profile.max_age + 1}; "
                f"{min(affordable)} to {max(affordable)} do."
            )
        affordable = {chosen["anchors"]: affordable[chosen["anchors"]]}

    sites = model.transformers[name].sites
    tables = [cost.transformers[name].sites[s.key] for s in sites]
    prunable = np.array([s.prunable for s in sites])
    tokens = np.array([s.tokens for s in sites])
    # a step with a pruned site pays `fixed` and each R by itself, where a fully cached one pays `all_cached`
    step_cost = cost.transformers[name].step
    surcharge = step_cost.fixed + sum(table.R for table in tables) - step_cost.all_cached
    best: tuple[float, list[int], np.ndarray] | None = None
    for count, anchors in affordable.items():
        cells = Cells(anchors, caching, pruning[name], rates, tables, prunable, tokens, surcharge)
        k, error = UAS[chosen["uas"]](cells, full / budget - spent(count), chosen["scale"])
        if best is None or error < best[0]:
            best = error, anchors, k
    assert best is not None  # affordable is not empty
    error, anchors, k = best
    schedule = draw_schedule(model, sampler, anchors, {name: k})
    return sign(schedule, "soda", chosen | {"anchors": len(anchors)}, profile, model, cost, error)


class Cells:
    """The cached cells of one choice of anchors, with the error and the cost of every action on them.

    reuse [T, S]: E_c at the true age. prune, prune_cost [T, S, G] and keep [G]: the same for each number of kept tokens.
    """

    def __init__(
        self,
        anchors: list[int],
        caching: np.ndarray,
        pruning: np.ndarray,
        rates: np.ndarray,
        tables: list[SiteCost],
        prunable: np.ndarray,
        tokens: np.ndarray,
        surcharge: float,
    ) -> None:
        steps, sites = caching.shape[:2]
        self.age = ages_since(anchors, steps)
        self.cached = (self.age > 0)[:, None] & np.ones(sites, dtype=bool)
        self.prunable = self.cached & prunable
        t = np.arange(steps)
        self.reuse = np.where(self.cached, caching[t, :, self.age], 0.0)
        # prune rates from 0 (nothing dropped, no error) over the profile's to 1 (all dropped: reuse)
        self.rates = np.concatenate([[0.0], rates, [1.0]])
        self.prune = self._with_ends(pruning[t, :, self.age], self.reuse)
        first = np.minimum(self.age, 1)
        self.prune_first = self._with_ends(pruning[t, :, first], np.nan_to_num(caching[t, :, first]))
        self.tables, self.tokens, self.surcharge = tables, tokens, surcharge

    @staticmethod
    def _with_ends(prune: np.ndarray, reuse: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros_like(reuse)[..., None], np.nan_to_num(prune), reuse[..., None]], axis=2)

    def cost_of(self, k: np.ndarray) -> np.ndarray:
        """Cost beyond reuse [T, S, ...] of recomputing k [T, S, ...] tokens."""
        return np.stack([table.prune(k[:, i]) - table.R for i, table in enumerate(self.tables)], axis=1)

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


def prune_none(cells: Cells, left: float, scale: float) -> tuple[np.ndarray, float]:
    """Returns k [T, S] (−1 everywhere: reuse) and the predicted error."""
    k = np.full(cells.reuse.shape, -1)
    return k, cells.error_of(k)


def prune_priced(cells: Cells, left: float, scale: float) -> tuple[np.ndarray, float]:
    """Returns k [T, S] and the predicted error: each cell at the rate of largest (E_c − E_p) − price · cost.

    The price is bisected so that the pruning costs at most `left`: a site is pruned where (E_c − E_p) / cost reaches it.
    """
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
    return _bisect(cells, choose, 0.0, 2 * top + 1e-30, left)


def prune_paper(cells: Cells, left: float, scale: float) -> tuple[np.ndarray, float]:
    """Returns k [T, S] and the predicted error by the published rule: prune where E_p(age 1, rate) < E_c(true age).

    keep = clamp(scale · E_c + beta, 0, 1), rate = 1 − keep; beta is bisected so that the pruning costs at most `left`.
    """

    def choose(minus_beta: float) -> np.ndarray:
        keep = np.clip(scale * cells.reuse - minus_beta, 0, 1)
        tokens = np.rint(keep * cells.tokens).astype(int)
        pruned = cells._at_rate(cells.prune_first, 1 - tokens / cells.tokens) < cells.reuse
        return np.where(pruned & cells.prunable & (tokens > 0), tokens, -1)

    return _bisect(cells, choose, -1.0, float(scale * cells.reuse.max(initial=0.0)), left)


def _bisect(
    cells: Cells, choose: Callable[[float], np.ndarray], low: float, high: float, left: float
) -> tuple[np.ndarray, float]:
    """Returns the choice with the smallest parameter whose cost is at most `left`; larger parameters prune less."""
    none, error = prune_none(cells, left, 1.0)
    best = none
    if left > 0:
        for _ in range(60):
            middle = (low + high) / 2
            k = choose(middle)
            if cells.total(k) <= left:
                best, high = k, middle
            else:
                low = middle
    return (best, cells.error_of(best)) if best is not none else (none, error)


UAS: dict[str, Callable[[Cells, float, float], tuple[np.ndarray, float]]] = {
    "priced": prune_priced,
    "paper": prune_paper,
    "none": prune_none,
}
