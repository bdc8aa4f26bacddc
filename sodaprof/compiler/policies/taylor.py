"""TaylorSeer (arXiv 2503.06923): every site extrapolated by finite differences from its last outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import BudgetError
from ...formats.cost import CostModel
from ...formats.profile import Profile
from ...formats.schedule import Schedule
from ...formats.sites import Model, Sampler
from ..forecasts import FORMULAS, forecasts_at, taylor
from ..placement import Placed, Rule, place_forecasts, placed
from ..problem import (
    at_least,
    draw_forecasts,
    one_of,
    reuse_only_cost,
    sign,
    tables_of,
    take_knobs,
    turns_of,
    unreachable,
    within,
)
from .forecast import forecast_step

KNOBS: dict[str, Any] = {
    "order": 1,  # of the expansion, from order + 1 anchors
    "placement": "even",  # even: an anchor every N steps | dp: where the predicted error is least
    "N": 0.0,  # read by even; 0: the smallest that meets the budget, which need not be whole
    "first": 0,  # steps at the beginning that are computed in any case; 0: order + 1
    "formula": "published",  # published: Taylor's | lagrange: the polynomial through the sources
}


def compile_taylor(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns TaylorSeer's schedule: C at anchors, F elsewhere, early forecasts of the order that their anchors allow.

    Even placement needs no tables and predicts no error; `dp` places the anchors by the errors of these very forecasts
    (relative L2, summed), and needs a profile with inner products.
    """
    chosen = take_knobs("taylor", KNOBS, knobs)
    one_of(chosen, "order", (1, 2))
    one_of(chosen, "placement", ("even", "dp"))
    one_of(chosen, "formula", FORMULAS)
    at_least(chosen, N=0, first=0)
    chosen["first"] = chosen["first"] or chosen["order"] + 1
    history, weigh = chosen["order"] + 1, taylor(chosen["formula"])
    turns = turns_of(model, sampler, "taylor")
    if chosen["placement"] == "dp":
        if chosen["N"]:
            raise BudgetError("Knob N is read by placement=even alone. Leave it out, or take --knob placement=even.")
        profile = tables_of("taylor with placement=dp", profile)
        rule = Rule(history, weigh, first=chosen["first"])
        products = profile.site_products()
        found = place_forecasts(
            "taylor", model, sampler, turns, products, cost, budget, profile.max_age + 1, rule, forecast_step
        )
        error = sum(p.error or 0.0 for p in found.values())
    else:
        chosen["N"], found = _even(model, sampler, turns, cost, budget, history, chosen["first"], chosen["N"])
        error = None
    anchors = {name: p.anchors for name, p in found.items()}
    # the weights follow from the steps alone
    cells = {n: forecasts_at(_nothing(len(model.transformers[n].sites)), p.sources, weigh) for n, p in found.items()}
    return sign(draw_forecasts(model, sampler, anchors, cells), "taylor", chosen, profile, model, cost, error)


def _nothing(sites: int) -> np.ndarray:
    return np.zeros((sites, 0, 0))


def _even(
    model: Model,
    sampler: Sampler,
    turns: dict[str, list[range]],
    cost: CostModel,
    budget: float,
    history: int,
    first: int,
    interval: float,
) -> tuple[float, dict[str, Placed]]:
    """Returns the interval, and each transformer's first steps and every interval-th after them as anchors."""
    full, _ = reuse_only_cost(model, sampler, cost)
    loop, known = sampler.steps * cost.loop_step(False), np.ones((sampler.steps, sampler.steps), dtype=bool)

    def drawn(each: float) -> dict[str, Placed]:
        found = {}
        for name, own in turns.items():
            anchors = [step for turn in own for step in _every(turn, first, each)]
            found[name] = placed(own, anchors, history, known, cost.transformers[name], forecast_step, None)
        return found

    def spent(found: dict[str, Placed]) -> float:
        return loop + sum(p.cost for p in found.values())

    if interval:
        if interval < 1:
            raise BudgetError(
                f"Knob N is {interval:g}; expected at least 1, or 0 for the smallest that meets the budget."
            )
        if not within(spent(drawn(interval)), full / budget):
            raise BudgetError(
                f"N={interval:g} gives {full / spent(drawn(interval)):.3g}x, the budget is {budget:.3g}x. Leave out --knob N "
                "to have it chosen for the budget."
            )
        return interval, drawn(interval)
    low, high = 1.0, float(sampler.steps)
    if not within(spent(drawn(high)), full / budget):
        raise unreachable(budget, full / spent(drawn(high)), cost)
    if within(spent(drawn(low)), full / budget):
        high = low
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if within(spent(drawn(middle)), full / budget) else (middle, high)
    high = round(high + 5e-4, 3)
    return high, drawn(high)


def _every(turn: range, first: int, interval: float) -> list[int]:
    """Returns the first steps of the turn, then those at multiples of the interval after them."""
    begin = min(first, len(turn)) - 1
    later = {begin + round(i * interval) for i in range(1, len(turn))}
    return [turn.start + t for t in range(len(turn)) if t <= begin or t in later]
