"""SODA (arXiv 2603.07057): full steps by dynamic programming (DCS), pruning or reuse between them (UAS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from ...formats.cost import TransformerCost
from ...formats.schedule import Schedule
from ...formats.sites import Site
from ..knobs import knob
from ..placement import Placements, place_full_steps, place_in_turns, reuse_segment_costs
from ..problem import Problem, bisect, draw_schedule


@dataclass(frozen=True)
class SodaKnobs:
    anchors: int = knob(0, "full steps N_s; 0: the number with the least predicted error", least=0)
    uas: str = knob(
        "priced", "how cells are pruned: by price, by the paper's rule, or not", one_of=("priced", "paper", "none")
    )
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
    affordable = problem.affordable(every, lambda full: problem.whole_steps(full, "R"), knobs.anchors)
    choices = _choices(problem, placements, affordable, knobs)
    spent = []
    for full in affordable:
        left = problem.allowed - problem.cost_of(problem.whole_steps(full, "R"))
        spent.append(spend([choices[item] for item in full.items()], left))
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
    found, turns, errors = {}, problem.turns, problem.tables("soda").caching_error(knobs.metric)
    for name, own in turns.items():
        segment = reuse_segment_costs(np.nansum(errors[name], axis=1), last_only=knobs.segment == "endpoint")
        found[name] = place_in_turns(own, [place_full_steps(segment[turn.start : turn.stop]) for turn in own])
    return found


def _choices(
    problem: Problem, placements: dict[str, Placements], affordable: list[dict[str, int]], knobs: SodaKnobs
) -> dict[tuple[str, int], Choices]:
    """Returns what can be pruned under each number of full steps of each transformer."""
    profile = problem.tables("soda")
    caching, (pruning, rates) = profile.caching_error("cos"), profile.pruning_error()
    paper = partial(by_the_paper, scale=knobs.scale)
    rules: dict[str, Callable[[Cells], Choices]] = {"priced": priced, "paper": paper, "none": reused}
    choices: dict[tuple[str, int], Choices] = {}
    for name, count in {item for full in affordable for item in full.items()}:
        steps = [step for turn in problem.turns[name] for step in turn]
        anchors = [steps.index(t) for t in placements[name][count][0]]
        errors = caching[name][steps], pruning[name][steps]
        cells = Cells(anchors, *errors, rates, problem.model.transformers[name].sites, problem.cost.transformers[name])
        choices[name, count] = rules[knobs.uas](cells)
    return choices


class Cells:
    """The cached cells under one choice of full steps, with the error and the cost of every action on them.

    T: one transformer's own steps, by which its full steps are numbered. reuse [T, S]: E_c at the true age; prune [T, S, G]:
    E_p there at each rate [G], and prune_first at age 1.
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
        t = np.arange(len(caching))
        age = t - np.maximum.accumulate(np.where(np.isin(t, anchors), t, 0))
        self.cached = (age > 0)[:, None] & np.ones(len(sites), dtype=bool)
        self.prunable = self.cached & np.array([s.prunable for s in sites])
        # prune rates from 0 (nothing dropped, no error) over the profile's to 1 (all dropped: reuse)
        self.rates = np.concatenate([[0.0], rates, [1.0]])
        errors = np.concatenate([np.zeros((*caching.shape, 1)), pruning, caching[..., None]], axis=-1)
        errors = np.nan_to_num(errors)  # NaN at age 0, which is no cached cell's
        self.prune, self.prune_first = errors[t, :, age], errors[t, :, np.minimum(age, 1)]
        self.reuse = self.prune[..., -1]
        self.tokens = np.array([s.tokens for s in sites])
        tables = [cost.sites[s.key] for s in sites]
        self.columns = {table: [i for i, other in enumerate(tables) if other == table] for table in set(tables)}
        # a step with a pruned site costs `fixed` and each R by itself, a fully cached one `all_cached`
        self.surcharge = cost.step.fixed + sum(table.R for table in tables) - cost.step.all_cached

    def cost_of(self, k: np.ndarray) -> np.ndarray:
        """Returns the cost beyond reuse [T, S, ...] of recomputing k [T, S, ...] tokens."""
        found = np.empty(k.shape)
        for table, columns in self.columns.items():
            found[:, columns] = table.prune(k[:, columns]) - table.R
        return found

    def total(self, k: np.ndarray) -> float:
        """Returns the cost beyond reuse of the whole choice k [T, S], −1 if the cell is reused."""
        return float((self.cost_of(np.maximum(k, 0)) * (k > 0)).sum() + self.surcharge * (k > 0).any(1).sum())

    def error_of(self, k: np.ndarray) -> float:
        """Returns the predicted error of the choice k [T, S]: E_p at the true age if pruned, E_c if reused."""
        pruned = self.at_rate(self.prune, 1 - np.maximum(k, 0) / self.tokens)
        return float(np.where(k >= 0, pruned, self.reuse)[self.cached].sum())

    def at_rate(self, table: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """Returns the table [T, S, G] at prune rates [T, S], linear between those of the table."""
        right = np.clip(np.searchsorted(self.rates, rate), 1, len(self.rates) - 1)
        low, high = self.rates[right - 1], self.rates[right]
        part = (rate - low) / (high - low)
        below, above = (np.take_along_axis(table, i[..., None], 2)[..., 0] for i in (right - 1, right))
        interpolated: np.ndarray = below * (1 - part) + above * part
        return interpolated


@dataclass(frozen=True)
class Choices:
    """One transformer's cells, and a family of choices on them: the larger the parameter, the less is pruned."""

    cells: Cells
    choose: Callable[[float], np.ndarray]  # parameter -> k [T, S], −1: reused
    low: float  # the range of the parameter, at whose end every cell is reused
    high: float


def reused(cells: Cells) -> Choices:
    """Returns the choice of reuse for every cell."""
    return Choices(cells, lambda parameter: np.full(cells.reuse.shape, -1), 0.0, 0.0)


def priced(cells: Cells) -> Choices:
    """Returns each cell at the rate of largest (E_c − E_p) − price · cost: pruned if (E_c − E_p) / cost reaches the price."""
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
    return Choices(cells, choose, 0.0, 2 * top + 1e-30)


def by_the_paper(cells: Cells, scale: float) -> Choices:
    """Returns the published rule: prune if E_p(age 1, rate) < E_c(true age); the parameter is −beta.

    keep = clamp(scale · E_c + beta, 0, 1), rate = 1 − keep.
    """

    def choose(minus_beta: float) -> np.ndarray:
        keep = np.clip(scale * cells.reuse - minus_beta, 0, 1)
        tokens = np.rint(keep * cells.tokens).astype(int)
        pruned = cells.at_rate(cells.prune_first, 1 - tokens / cells.tokens) < cells.reuse
        return np.where(pruned & cells.prunable & (tokens > 0), tokens, -1)

    return Choices(cells, choose, -1.0, float(scale * cells.reuse.max(initial=0.0)))


def spend(parts: list[Choices], left: float) -> tuple[list[np.ndarray], float]:
    """Returns k [T, S] of each part (−1: reuse) and the predicted error of all, pruning for at most `left` in cost.

    One parameter for all parts is bisected: the smallest whose choice costs no more.
    """

    def chosen(parameter: float) -> list[np.ndarray]:
        return [part.choose(parameter) for part in parts]

    def affordable(parameter: float) -> bool:
        return sum(part.cells.total(k) for part, k in zip(parts, chosen(parameter), strict=True)) <= left

    ks = chosen(bisect(affordable, min(p.low for p in parts), max(p.high for p in parts), halvings=60))
    return ks, sum(part.cells.error_of(k) for part, k in zip(parts, ks, strict=True))
