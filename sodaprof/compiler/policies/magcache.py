"""MagCache (arXiv 2506.09045), ahead of sampling: the stack is skipped while the change of its drift's size stays small."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...formats.schedule import Schedule
from ..forecasts import taylor
from ..knobs import knob
from ..placement import ForecastRule, Placed, draw_placed
from ..problem import Problem
from .drift import stack_products

MOST_SKIPS, RETAIN = 4, 0.2  # as released


@dataclass(frozen=True)
class MagCacheKnobs:
    skips: int = knob(0, "steps skipped in a row at most; 0: 4, above a budget of 2x twice the budget", least=0)
    retain: float = knob(
        -1.0, "share of full steps at the beginning of a turn; −1: 0.2, at most half of all full steps", least=-1
    )
    threshold: float = knob(0.0, "of the accumulated error; 0: the smallest that meets the budget", least=0)


def compile_magcache(problem: Problem, knobs: MagCacheKnobs) -> Schedule:
    """Returns MagCache's schedule: S steps that take the newest drift unchanged.

    The published method decides while it samples, by ratios of residual sizes that it calibrated once. Nothing else enters the
    decision, so it is made ahead here. Raises as `compile_drift`.
    """
    skips = knobs.skips or max(MOST_SKIPS, round(2 * problem.budget))
    retain = min(RETAIN, round(0.5 / problem.budget, 3)) if knobs.retain < 0 else knobs.retain
    products = stack_products(problem, "magcache", "drift")
    sizes = {name: np.sqrt(np.diagonal(products[name][0])) for name in problem.turns}
    rule = ForecastRule("S", 1, taylor("published"), form="drift")  # the weight of one source is 1

    def placed(threshold: float) -> dict[str, Placed]:
        return rule.placed(problem, lambda name, turn: full_steps(sizes[name][turn], threshold, skips, retain))

    under = f" with skips={skips} and retain={retain:g}"
    advice = ", set more --knob skips, or a smaller --knob retain"
    threshold = problem.threshold(
        knobs.threshold, lambda value: rule.whole_steps(placed(value)), under=under, advice=advice
    )
    schedule = draw_placed(problem, placed(threshold), products, rule)
    return problem.signed(schedule, "magcache", replace(knobs, skips=skips, retain=retain, threshold=threshold), None)


def full_steps(sizes: np.ndarray, threshold: float, skips: int, retain: float) -> list[int]:
    """Returns the full steps of one turn, from the size of the drift at each step.

    A step is skipped while Σ |1 − size / size at the last full step| over the skipped steps, itself included, stays below
    the threshold, `skips` times in a row at most, and never among the first `retain` of the turn.
    """
    steps, last, total = [0], 0, 0.0
    for step in range(1, len(sizes)):
        total += abs(1 - sizes[step] / sizes[last])
        if step < retain * len(sizes) or total >= threshold or step - last > skips:
            steps.append(step)
            last, total = step, 0.0
    return steps
