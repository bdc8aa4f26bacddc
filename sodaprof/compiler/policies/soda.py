"""SODA (arXiv 2603.07057): full steps by dynamic programming (DCS), pruning or reuse between them (UAS)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from ...formats.cost import TransformerCost
from ...formats.schedule import Schedule
from ...formats.sites import Site
from ..knobs import knob
from ..placement import Placements, ages_since, place_full_steps, place_in_turns, reuse_segment_costs
from ..problem import Problem, bisect, draw_schedule

UAS = ("priced", "paper", "none")


@dataclass(frozen=True)
class SodaKnobs:
    anchors: int = knob(0, "full steps N_s; 0: the number with the least predicted error", least=0)
    uas: str = knob("priced", "how cells are pruned: by price, by the paper's rule, or not", one_of=UAS)
    segment: str = knob(
        "sum", "error of an interval: summed over its steps, or that of the last", one_of=("sum", "endpoint")
    )
    metric: str = knob("cos", "error of reuse by which full steps are placed", one_of=("cos", "l1", "l2"))
    scale: float = knob(1.0, "λ of the rate rule keep = clamp(λ · E_c + β), read by uas=paper")


def compile_soda(problem: Problem, knobs: SodaKnobs) -> Schedule:
    """Returns the schedule of least predicted error within the budget.

    For every N_s that the budget allows, DCS places the full steps and UAS spends the rest of the budget on pruning; the N_s
    of least predicted error (sum of 1 − cosine over all cached cells) is taken. Transformers that take turns have an N_s each,
    under one budget: every combination that it allows is tried.
    """
    placements = _placements(problem, knobs)
    every = [dict(zip(placements, counts, strict=True)) for counts in product(*placements.values())]
    affordable = [full for full in every if problem.meets(problem.whole_steps(full, "R"))]
    if not affordable:
        fewest = {name: min(counts) for name, counts in placements.items()}
        raise problem.unreachable(problem.whole_steps(fewest, "R"), bounded=True)
    if knobs.anchors:
        counts = [sum(full.values()) for full in affordable]
        problem.check_count(knobs.anchors, counts, bounded=True)
        affordable = [full for full, count in zip(affordable, counts, strict=True) if count == knobs.anchors]
    parts = _parts(problem, placements, affordable, knobs)
    spent = []
    for full in affordable:
        left = problem.allowed - problem.cost_of(problem.whole_steps(full, "R"))
        spent.append(spend([parts[item] for item in full.items()], left))
    best = min(range(len(spent)), key=lambda i: spent[i][1])
    full, (ks, error) = affordable[best], spent[best]
    anchors = sorted(step for name, count in full.items() for step in placements[name][count][0])
    prune = {}
    for name, k in zip(full, ks, strict=True):
        prune[name] = np.full((problem.sampler.steps, k.shape[1]), -1)
        prune[name][[step for turn in problem.turns[name] for step in turn]] = k
    schedule = draw_schedule(problem.model, problem.sampler, anchors, prune)
    return problem.signed(schedule, "soda", replace(knobs, anchors=len(anchors)), error)


def _placements(problem: Problem, knobs: SodaKnobs) -> dict[str, Placements]:
    """Returns for each transformer the full steps of least error of reuse, by their number."""
    turns, errors = problem.turns, problem.tables("soda").caching_error(knobs.metric)

    def of_turns(name: str) -> Placements:
        segment = reuse_segment_costs(np.nansum(errors[name], axis=1), last_only=knobs.segment == "endpoint")
        return place_in_turns(turns[name], lambda turn: place_full_steps(segment[turn.start : turn.stop]))

    return {name: of_turns(name) for name in turns}


def _parts(
    problem: Problem, placements: Mapping[str, Placements], affordable: list[dict[str, int]], knobs: SodaKnobs
) -> dict[tuple[str, int], Part]:
    """Returns what can be pruned under each number of full steps of each transformer."""
    profile = problem.tables("soda")
    caching = profile.caching_error("cos")  # [T, S, ages + 1] of each transformer
    pruning, rates = profile.pruning_error()
    parts: dict[tuple[str, int], Part] = {}
    for name, count in {item for full in affordable for item in full.items()}:
        steps = [step for turn in problem.turns[name] for step in turn]
        anchors = [steps.index(t) for t in placements[name][count][0]]
        errors = caching[name][steps], pruning[name][steps]
        cells = Cells(anchors, *errors, rates, problem.model.transformers[name].sites, problem.cost.transformers[name])
        parts[name, count] = PRUNE[knobs.uas](cells, knobs.scale)
    return parts


class Cells:
    """The cached cells under one choice of full steps, with the error and the cost of every action on them.

    T: one transformer's own steps, by which its full steps are numbered.
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
        # a step with a pruned site costs `fixed` and each R by itself, a fully cached one `all_cached`
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
        """Cost beyond reuse of the whole choice k [T, S], −1 if the cell is reused."""
        return float((self.cost_of(np.maximum(k, 0)) * (k > 0)).sum() + self.surcharge * (k > 0).any(1).sum())

    def error_of(self, k: np.ndarray) -> float:
        """Predicted error of the choice k [T, S]: E_p at the true age if pruned, E_c if reused."""
        rate = 1 - np.maximum(k, 0) / self.tokens
        pruned = self._at_rate(self.prune, rate)
        return float(np.where(k >= 0, pruned, self.reuse)[self.cached].sum())

    def _at_rate(self, table: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """Linear interpolation of table [T, S, G] over the prune rates at rate [T, S]."""
        right = np.clip(np.searchsorted(self.rates, rate), 1, len(self.rates) - 1)
        low, high = self.rates[right - 1], self.rates[right]
        part = (rate - low) / (high - low)
        below, above = (np.take_along_axis(table, i[..., None], 2)[..., 0] for i in (right - 1, right))
        interpolated: np.ndarray = below * (1 - part) + above * part
        return interpolated


@dataclass(frozen=True)
class Part:
    """One transformer's cells, and a family of choices on them: the larger the parameter, the less is pruned."""

    cells: Cells
    choose: Callable[[float], np.ndarray]  # parameter -> k [T, S], −1: reused
    low: float  # the range of the parameter, at whose end every cell is reused
    high: float


def prune_none(cells: Cells, scale: float) -> Part:
    """Every cell is reused."""
    return Part(cells, lambda parameter: np.full(cells.reuse.shape, -1), 0.0, 0.0)


def prune_priced(cells: Cells, scale: float) -> Part:
    """Each cell at the rate of largest (E_c − E_p) − price · cost: pruned if (E_c − E_p) / cost reaches the price."""
    keep = np.rint((1 - cells.rates) * cells.tokens[:, None]).astype(int)  # [S, G]
    k = np.broadcast_to(keep, (*cells.reuse.shape, keep.shape[1]))
    gain = np.where(cells.prunable[..., None] & (k > 0), cells.reuse[..., None] - cells.prune, -np.inf)
    cost = cells.cost_of(k)
    cost = np.maximum(cost, 1e-9 * cost.max())  # a cell that seems free gets a price, too: the range must end

    def choose(price: float) -> np.ndarray:
        value = gain - price * cost
        value[..., -1] = 0.0  # rate 1: reuse
        best = value.argmax(2)
        chosen = np.take_along_axis(k, best[..., None], 2)[..., 0]
        return np.where((best == keep.shape[1] - 1) | ~cells.prunable, -1, chosen)

    top = float((gain / cost).max(initial=0.0))
    return Part(cells, choose, 0.0, 2 * top + 1e-30)


def prune_paper(cells: Cells, scale: float) -> Part:
    """By the published rule, prune if E_p(age 1, rate) < E_c(true age); the parameter is −beta.

    keep = clamp(scale · E_c + beta, 0, 1), rate = 1 − keep.
    """

    def choose(minus_beta: float) -> np.ndarray:
        keep = np.clip(scale * cells.reuse - minus_beta, 0, 1)
        tokens = np.rint(keep * cells.tokens).astype(int)
        pruned = cells._at_rate(cells.prune_first, 1 - tokens / cells.tokens) < cells.reuse
        return np.where(pruned & cells.prunable & (tokens > 0), tokens, -1)

    return Part(cells, choose, -1.0, float(scale * cells.reuse.max(initial=0.0)))


def spend(parts: list[Part], left: float) -> tuple[list[np.ndarray], float]:
    """Returns k [T, S] of each part (−1: reuse) and the predicted error of all, pruning for at most `left` in cost.

    One parameter for all parts is bisected: the smallest whose choice costs no more.
    """

    def chosen(parameter: float) -> list[np.ndarray]:
        return [part.choose(parameter) for part in parts]

    def affordable(parameter: float) -> bool:
        return sum(part.cells.total(k) for part, k in zip(parts, chosen(parameter), strict=True)) <= left

    ks = chosen(bisect(affordable, min(p.low for p in parts), max(p.high for p in parts), halvings=60))
    return ks, sum(part.cells.error_of(k) for part, k in zip(parts, ks, strict=True))


PRUNE: dict[str, Callable[[Cells, float], Part]] = dict(zip(UAS, (prune_priced, prune_paper, prune_none), strict=True))
