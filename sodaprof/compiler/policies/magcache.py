"""MagCache (arXiv 2506.09045), drawn ahead: the stack is skipped while the change of its residual's size stays small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import BudgetError
from ...formats.cost import CostModel, TransformerCost
from ...formats.profile import Profile
from ...formats.schedule import Forecast, Schedule
from ...formats.sites import Model, Sampler
from ..problem import at_least, draw_skips, reuse_only_cost, sign, tables_of, take_knobs, turns_of, within
from .drift import stack_products

MOST_SKIPS, RETAIN = 4, 0.2  # as released
KNOBS: dict[str, Any] = {
    "skips": 0,  # steps skipped in a row, at most; 0: 4, above a budget of 2x twice the budget
    "retain": -1.0,  # share of a turn's steps, at its beginning, that are computed; −1: 0.2, at most half of all that are
    "threshold": 0.0,  # of the accumulated error; 0: the smallest that meets the budget
}


def compile_magcache(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns MagCache's schedule: S steps that take the newest drift as it was.

    The published method decides while it samples, by ratios of residual sizes that it calibrated once; these decide alone, so
    its schedule is drawn ahead. Raises FormatError where the profile holds no inner products.
    """
    profile = tables_of("magcache", profile)
    chosen = take_knobs("magcache", KNOBS, knobs)
    at_least(chosen, skips=0, retain=-1, threshold=0)
    if not chosen["skips"]:
        chosen["skips"] = max(MOST_SKIPS, round(2 * budget))
    if chosen["retain"] < 0:
        chosen["retain"] = min(RETAIN, round(0.5 / budget, 3))
    turns, products = turns_of(model, sampler, "magcache"), stack_products("magcache", profile, "drift")
    full, _ = reuse_only_cost(model, sampler, cost)
    loop = sampler.steps * cost.loop_step(False)
    sizes = {name: np.sqrt(np.diagonal(products[name])) for name in turns}

    def drawn(threshold: float) -> dict[str, list[int]]:
        return {
            name: [
                turn.start + step
                for turn in own
                for step in computed(sizes[name][turn.start : turn.stop], threshold, chosen["skips"], chosen["retain"])
            ]
            for name, own in turns.items()
        }

    def spent(anchors: dict[str, list[int]]) -> float:
        def of(table: TransformerCost, own: list[range], count: int) -> float:
            return count * table.full + (sum(map(len, own)) - count) * table.step.stack[0]

        return loop + sum(of(cost.transformers[name], turns[name], len(steps)) for name, steps in anchors.items())

    meets = lambda threshold: within(spent(drawn(threshold)), full / budget)  # noqa: E731
    if not chosen["threshold"]:
        if not meets(np.inf):
            most = full / spent(drawn(np.inf))
            raise BudgetError(
                f"A budget of {budget:.4g}x cannot be met with skips={chosen['skips']} and retain={chosen['retain']:g}: at "
                f"most {most:.3g}x ({cost.unit}) can. Set more --knob skips, or a smaller --knob retain."
            )
        chosen["threshold"] = smallest(meets)
    elif not meets(chosen["threshold"]):
        raise BudgetError(
            f"threshold={chosen['threshold']:g} gives {full / spent(drawn(chosen['threshold'])):.3g}x, the budget is "
            f"{budget:.3g}x. Leave it out to have it chosen for the budget."
        )
    anchors = drawn(chosen["threshold"])
    skipped = {name: [t for turn in own for t in turn if t not in anchors[name]] for name, own in turns.items()}
    cells = {
        name: {t: Forecast((max(a for a in anchors[name] if a < t),), (1.0,), "drift") for t in steps}
        for name, steps in skipped.items()
    }
    return sign(draw_skips(model, sampler, anchors, cells), "magcache", chosen, profile, model, cost, error=None)


def computed(sizes: np.ndarray, threshold: float, skips: int, retain: float) -> list[int]:
    """Returns the steps of one turn that are computed, from the size of the residual at each.

    A step is skipped while Σ |1 − size / size at the last computed one| over the skipped steps, itself included, stays below
    the threshold, `skips` times in a row at most, and never among the first `retain` of the turn.
    """
    steps, last, total = [0], 0, 0.0
    for step in range(1, len(sizes)):
        total += abs(1 - sizes[step] / sizes[last])
        if step < retain * len(sizes) or total >= threshold or step - last > skips:
            steps.append(step)
            last, total = step, 0.0
    return steps


def smallest(meets: Callable[[float], bool]) -> float:
    """Returns the smallest threshold, within 1e-6 of it, at which a bisection finds the budget met; above some it is."""
    if meets(0.0):
        return 0.0
    low, high = 0.0, 1e-6
    while not meets(high):
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    found = float(f"{high:.7g}")
    return found if meets(found) else high
