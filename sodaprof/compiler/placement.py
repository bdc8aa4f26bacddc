"""The dynamic program that places anchor steps (SODA, DCS)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ..errors import BudgetError
from ..formats.cost import CostModel, TransformerCost
from ..formats.sites import Model, Sampler
from .forecasts import Weigh, segment_costs, sources_of
from .problem import measured_no_longer, reuse_only_cost, unreachable, within

Placements = dict[int, tuple[list[int], float]]  # number of anchors -> the cheapest placement and its cost


def place_anchors(segment: np.ndarray, steps: int, most: int | None = None) -> Placements:
    """Returns for every possible number of anchors the cheapest placement and its cost: {count: (anchors, cost)}.

    segment [T, n_max + 1]: cost of an anchor at step t that serves the n − 1 steps after it (n = 1: none); entries with
    t + n > T are ignored. Step 0 is an anchor, the last segment runs to the end. Exact, O(most · T · n_max):

        dp[t][i + 1] = min over n of segment[t, n] + dp[t + n][i]
    """
    longest = segment.shape[1] - 1
    most = steps if most is None else min(most, steps)
    best = np.full((most + 1, steps + 1), np.inf)
    best[0, steps] = 0.0
    choice = np.zeros((most + 1, steps), dtype=int)
    for count in range(1, most + 1):
        for n in range(1, longest + 1):
            starts = np.arange(steps - n + 1)
            cost = segment[starts, n] + best[count - 1, starts + n]
            better = cost < best[count, starts]
            best[count, starts[better]] = cost[better]
            choice[count, starts[better]] = n
    found = {}
    for count in range(1, most + 1):
        if np.isfinite(best[count, 0]):
            anchors, step = [], 0
            for left in range(count, 0, -1):
                anchors.append(step)
                step += int(choice[left, step])
            found[count] = (anchors, float(best[count, 0]))
    return found


def place_in_turns(segment: np.ndarray, turns: Sequence[range]) -> Placements:
    """Returns `place_anchors` for a transformer that works in turns, at whose first steps it computes everything.

    segment: as there, of all T steps; no segment goes beyond its turn. Exact: counts of anchors are split over the turns.
    """
    found: Placements = {0: ([], 0.0)}
    for turn in turns:
        found = joined(found, place_anchors(segment[turn.start : turn.stop], len(turn)), turn.start)
    return found


def joined(before: Placements, own: Placements, start: int) -> Placements:
    """Returns the best placements of several turns by their number of anchors in all; own: of the turn from `start` on."""
    found: Placements = {}
    for (count, (anchors, error)), (more, (others, further)) in product(before.items(), own.items()):
        if count + more not in found or error + further < found[count + more][1]:
            found[count + more] = [*anchors, *(start + step for step in others)], error + further
    return found


def reuse_segment_costs(error: np.ndarray, last_only: bool = False) -> np.ndarray:
    """Returns segment [T, ages + 2] from the error of reuse by step and age, error [T, ages + 1].

    A segment of n steps serves ages 1…n−1: E_dp(t, n) = Σ_j error[t + j, j]; with `last_only` the last one alone.
    """
    steps, ages = error.shape
    segment = np.zeros((steps, ages + 1))
    for n in range(2, ages + 1):
        starts = np.arange(steps - n + 1)
        served = error[starts + n - 1, n - 1]
        segment[starts, n] = served if last_only else segment[starts, n - 1] + served
    return segment


def ages_since(anchors: list[int], steps: int) -> np.ndarray:
    """Returns the steps since the last anchor [T]; 0 at anchors."""
    is_anchor = np.zeros(steps, dtype=bool)
    is_anchor[anchors] = True
    last = np.maximum.accumulate(np.where(is_anchor, np.arange(steps), 0))
    return np.arange(steps) - last


Idle = Callable[[TransformerCost, int], float]  # what a step costs that is forecast from so many sources


@dataclass(frozen=True)
class Rule:
    """How steps between anchors are forecast, and what their errors count."""

    history: int  # the last so many anchors are the sources
    weigh: Weigh
    power: float = 1.0
    metric: str = "l2"
    first: int = 1  # steps at the beginning of a turn that are computed in any case


@dataclass(frozen=True)
class Placed:
    """Anchors, the sources of each step between them, and the error and cost of all of it."""

    anchors: list[int]
    sources: dict[int, tuple[int, ...]]
    error: float | None
    cost: float


def place_with_history(segment: np.ndarray, most: int | None = None) -> dict[int, tuple[list[int], float]]:
    """Returns for every possible number of anchors the cheapest placement and its cost: {count: (anchors, cost)}.

    segment: see `forecasts.segment_costs`. Step 0 is an anchor, the last segment runs to the end. Exact: the state is the
    newest anchor and the gaps to those before it, O(most · T · longest^history).
    """
    steps, longest, inner = len(segment), segment.shape[-1] - 1, segment.shape[1:-1]
    most = steps if most is None else min(most, steps)
    if not inner:
        return place_anchors(segment, steps, most)
    best = np.full((steps, *inner), np.inf)
    best[(0, *[0] * len(inner))] = 0.0
    found: dict[int, tuple[list[int], float]] = {}
    oldest = np.zeros((most + 1, steps, *inner), dtype=np.int16)  # the gap that a state's predecessor forgot
    costs = np.ascontiguousarray(np.moveaxis(segment, -1, 0))
    for count in range(1, most + 1):
        lengths = [n for n in range(1, longest + 1) if n <= steps]
        ends = [best[steps - n] + costs[n, steps - n] for n in lengths]
        last = min(range(len(ends)), key=lambda i: float(ends[i].min()))
        if np.isfinite(ends[last].min()):
            state = (steps - lengths[last], *map(int, np.unravel_index(ends[last].argmin(), inner)))
            found[count] = _back(state, oldest, count), float(ends[last].min())
        following = np.full(best.shape, np.inf)
        for n in lengths:
            value = best[: steps - n] + costs[n, : steps - n]
            forgotten = value.argmin(axis=-1)
            following[n:, n] = np.take_along_axis(value, forgotten[..., None], axis=-1)[..., 0]
            oldest[count + 1 : count + 2, n:, n] = forgotten
        best = following
    return found


def _back(state: tuple[int, ...], oldest: np.ndarray, count: int) -> list[int]:
    """Returns the anchors that led to a state [a, g_1, …] of `count` anchors."""
    anchors = [state[0]]
    for number in range(count, 1, -1):
        anchor, newest, *others = state
        state = (anchor - newest, *others, int(oldest[(number, *state)]))
        anchors.append(state[0])
    return anchors[::-1]


def place_forecasts(
    policy: str,
    model: Model,
    sampler: Sampler,
    turns: Mapping[str, list[range]],
    products: Mapping[str, np.ndarray],
    cost: CostModel,
    budget: float,
    longest: int,
    rule: Rule,
    idle: Idle,
    count: int = 0,
) -> dict[str, Placed]:
    """Returns for each transformer the anchors of least predicted error within the budget.

    For each number of anchors the best placement is found, and of those that keep to the budget the best one is taken.
    products [S, T, T] of each transformer. longest: steps from an anchor to the next, at most. count: so many anchors in
    all; 0: the number with the least error. Transformers that take turns share the one budget; each turn begins anew.
    Raises BudgetError where no placement keeps to the budget.
    """
    full, _ = reuse_only_cost(model, sampler, cost)
    loop = sampler.steps * cost.loop_step(False)
    options: dict[str, list[Placed]] = {}
    most = max(len(turn) for own in turns.values() for turn in own)
    for name, own in turns.items():
        table, known = cost.transformers[name], ~np.isnan(products[name]).any(axis=0)
        found: dict[int, tuple[list[int], float]] = {0: ([], 0.0)}
        for turn in own:
            inside = slice(turn.start, turn.stop)
            segment = segment_costs(
                products[name][:, inside, inside], rule.history, longest, rule.weigh, rule.power, rule.metric
            )
            segment[: rule.first - 1, ..., 2:] = np.inf
            affordable = max(int((full / budget - loop) / table.full), rule.first + -(-len(turn) // longest))
            found = joined(found, place_with_history(segment, affordable), turn.start)
        options[name] = [
            placed(turns[name], anchors, rule.history, known, table, idle, e) for anchors, e in found.values()
        ]
    every = [dict(zip(options, some, strict=True)) for some in product(*options.values())]
    if not every:
        raise BudgetError(
            f"Policy {policy} finds no anchors whose forecasts the tables have products for. {measured_no_longer(longest)}"
        )
    spent = [loop + sum(p.cost for p in some.values()) for some in every]
    affordable_ones = [some for some, c in zip(every, spent, strict=True) if within(c, full / budget)]
    if not affordable_ones:
        raise unreachable(budget, full / min(spent), cost, longest, most)
    counts = [sum(len(p.anchors) for p in some.values()) for some in affordable_ones]
    if count and count not in counts:
        more = f" {measured_no_longer(longest)}" if count < min(counts) and longest < most else ""
        raise BudgetError(
            f"{count} anchors do not fit {budget:.3g}x with anchors at most {longest} steps apart; "
            f"{min(counts)} to {max(counts)} do.{more}"
        )
    kept = [some for some, n in zip(affordable_ones, counts, strict=True) if not count or n == count]
    return min(kept, key=lambda some: sum(p.error or 0.0 for p in some.values()))


def placed(
    turns: list[range],
    anchors: list[int],
    history: int,
    known: np.ndarray,
    table: TransformerCost,
    idle: Idle,
    error: float | None,
) -> Placed:
    """Returns the anchors with the sources of the steps between them and what all of it costs, but for the loop."""
    sources: dict[int, tuple[int, ...]] = {}
    for turn in turns:
        sources |= sources_of(anchors, turn, history, known)
    each = [idle(table, k) for k in range(1, history + 1)]
    return Placed(anchors, sources, error, len(anchors) * table.full + sum(each[len(s) - 1] for s in sources.values()))
