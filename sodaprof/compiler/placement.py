"""The dynamic program that places full steps, for reuse (SODA's DCS) and for forecasts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from ..errors import BudgetError
from ..formats.schedule import Schedule
from .forecasts import Weigh, forecasts_at, segment_costs, sources_of
from .problem import Problem, WholeSteps, draw_steps

Placements = dict[int, tuple[list[int], float]]  # number of full steps -> the best placement and its error


def place_full_steps(segment: np.ndarray, most: int | None = None) -> Placements:
    """Returns for every possible number of full steps the best placement and its error: {count: (full steps, error)}.

    segment [T, n_max + 1]: error of a full step t and the n − 1 steps after it, which its outputs serve (n = 1: none); with
    further axes before the last one for the gaps to the full steps before t, as `forecasts.segment_costs` has them. Entries with
    t + n > T are ignored. Step 0 is full, the last segment runs to the end. Exact: the state is the newest full step and the
    gaps to those before it, O(most · T · n_max^history):

        dp[t + n, n, g_1, …][i + 1] = min over the oldest gap of segment[t, g_1, …, n] + dp[t, g_1, …][i]
    """
    steps, longest = len(segment), segment.shape[-1] - 1
    if segment.ndim == 2:  # the gap before makes no difference
        segment = np.broadcast_to(segment[:, None], (steps, longest + 1, longest + 1))
    most, inner = steps if most is None else min(most, steps), segment.shape[1:-1]
    best = np.full((steps, *inner), np.inf)
    best[(0, *[0] * len(inner))] = 0.0
    found: Placements = {}
    oldest = np.zeros((most + 1, steps, *inner), dtype=np.int16)  # the oldest gap of a state's best predecessor
    costs, lengths = np.ascontiguousarray(np.moveaxis(segment, -1, 0)), range(1, min(longest, steps) + 1)
    for count in range(1, most + 1):
        ends = [best[steps - n] + costs[n, steps - n] for n in lengths]
        last = min(range(len(ends)), key=lambda i: float(ends[i].min()))
        if np.isfinite(ends[last].min()):
            state = (steps - lengths[last], *map(int, np.unravel_index(ends[last].argmin(), inner)))
            found[count] = _path_to(state, oldest, count), float(ends[last].min())
        following = np.full(best.shape, np.inf)
        for n in lengths:
            value = best[: steps - n] + costs[n, : steps - n]
            dropped = value.argmin(axis=-1)
            following[n:, n] = np.take_along_axis(value, dropped[..., None], axis=-1)[..., 0]
            oldest[count + 1 : count + 2, n:, n] = dropped
        best = following
    return found


def _path_to(state: tuple[int, ...], oldest: np.ndarray, count: int) -> list[int]:
    """Returns the full steps that lead to a state [a, g_1, …] of `count` full steps."""
    anchors = [state[0]]
    for number in range(count, 1, -1):
        anchor, newest, *others = state
        state = (anchor - newest, *others, int(oldest[(number, *state)]))
        anchors.append(state[0])
    return anchors[::-1]


def place_in_turns(turns: Sequence[range], placements: Sequence[Placements]) -> Placements:
    """Returns the best placements of a transformer over all its turns, by their number of full steps.

    placements: of each turn, steps counted from its start. Exact: counts are split over the turns.
    """
    found: Placements = {0: ([], 0.0)}
    for turn, own in zip(turns, placements, strict=True):
        before, found = found, {}
        for (count, (anchors, error)), (more, (others, added)) in product(before.items(), own.items()):
            if count + more not in found or error + added < found[count + more][1]:
                found[count + more] = [*anchors, *(turn.start + step for step in others)], error + added
    return found


def reuse_segment_costs(error: np.ndarray, last_only: bool = False) -> np.ndarray:
    """Returns segment [T, ages + 2] from the error of reuse by step and age, error [T, ages + 1].

    A segment of n steps has the ages 1…n−1: E_dp(t, n) = Σ_j error[t + j, j]; with `last_only` the last term alone.
    """
    steps, ages = error.shape
    segment = np.zeros((steps, ages + 1))
    for n in range(2, ages + 1):
        starts = np.arange(steps - n + 1)
        served = error[starts + n - 1, n - 1]
        segment[starts, n] = served if last_only else segment[starts, n - 1] + served
    return segment


@dataclass(frozen=True)
class ForecastRule:
    """How the steps between full steps are forecast, and how their errors count."""

    action: str  # F: every site is forecast; S: the stack is
    history: int  # the last so many full steps are the sources
    weigh: Weigh
    power: float = 1.0
    metric: str = "l2"
    first: int = 1  # steps at the beginning of a turn that are full in any case
    form: str = "output"

    def placed(self, problem: Problem, full_steps: Callable[[str, range], Sequence[int]]) -> dict[str, Placed]:
        """Returns full steps that are given for each turn of a transformer, counted from its start; they predict no error."""
        known, found = np.ones((problem.sampler.steps,) * 2, dtype=bool), {}
        for name, turns in problem.turns.items():
            anchors = [turn.start + step for turn in turns for step in full_steps(name, turn)]
            found[name] = Placed(anchors, sources_of(anchors, turns, self.history, known), 0.0)
        return found

    def whole_steps(self, placed: Mapping[str, Placed]) -> WholeSteps:
        """Returns the steps by their action, as `Problem` counts costs."""
        return {
            name: {("C", 0): len(p.anchors), **Counter((self.action, len(s)) for s in p.sources.values())}
            for name, p in placed.items()
        }


@dataclass(frozen=True)
class Placed:
    """The full steps of a transformer, the sources of each step between them, and the error of all of it."""

    anchors: list[int]
    sources: dict[int, tuple[int, ...]]
    error: float


def place_forecasts(
    problem: Problem, products: Mapping[str, np.ndarray], rule: ForecastRule, count: int = 0
) -> dict[str, Placed]:
    """Returns for each transformer the full steps of least predicted error within the budget.

    For each number of full steps the best placement is found, and of those within the budget the best one is taken.
    products [S, T, T] of each transformer. count: so many full steps in all; 0: the number with the least error.
    Transformers that take turns share the budget; each turn begins with a full step. Raises BudgetError if no placement is
    within the budget.
    """
    options = {name: _options(problem, name, products[name], rule) for name in problem.turns}
    every = [dict(zip(options, some, strict=True)) for some in product(*options.values())]
    if not every:
        raise BudgetError(
            f"No full steps at most {problem.longest} apart have forecasts that the tables have products for. Profile again "
            "with a larger --max-interval: sodaprof profile MODEL -o DIR"
        )
    affordable = problem.affordable(every, rule.whole_steps, count)
    return min(affordable, key=lambda some: sum(p.error for p in some.values()))


def _options(problem: Problem, name: str, products: np.ndarray, rule: ForecastRule) -> list[Placed]:
    """Returns the best placement of a transformer for each number of full steps that the budget may leave."""
    loop = problem.sampler.steps * problem.cost.loop_step(problem.own_update is not None)
    affordable = int((problem.allowed - loop) / problem.cost.transformers[name].full)
    turns, longest, placements = problem.turns[name], problem.longest, []
    for turn in turns:
        inside = products[:, turn.start : turn.stop, turn.start : turn.stop]
        segment = segment_costs(inside, rule.history, longest, rule.weigh, rule.power, rule.metric)
        segment[: rule.first - 1, ..., 2:] = np.inf
        placements.append(place_full_steps(segment, max(affordable, rule.first + -(-len(turn) // longest))))
    known = ~np.isnan(products).any(axis=0)
    return [
        Placed(anchors, sources_of(anchors, turns, rule.history, known), error)
        for anchors, error in place_in_turns(turns, placements).values()
    ]


def draw_placed(
    problem: Problem, placed: Mapping[str, Placed], products: Mapping[str, np.ndarray], rule: ForecastRule
) -> Schedule:
    """Returns the schedule of these full steps, forecasts with the rule's weights between them."""
    anchors = {name: p.anchors for name, p in placed.items()}
    cells = {n: forecasts_at(products[n], p.sources, rule.weigh, rule.form) for n, p in placed.items()}
    return draw_steps(problem.model, problem.sampler, anchors, rule.action, cells)


def forecast_schedule(
    problem: Problem, policy: str, knobs: Any, products: Mapping[str, np.ndarray], rule: ForecastRule
) -> Schedule:
    """Returns the signed schedule of least predicted error under the rule; knobs: with `anchors`, how many full steps."""
    placed = place_forecasts(problem, products, rule, knobs.anchors)
    knobs = replace(knobs, anchors=sum(len(p.anchors) for p in placed.values()))
    schedule = draw_placed(problem, placed, products, rule)
    return problem.signed(schedule, policy, knobs, sum(p.error for p in placed.values()))
