"""TaylorSeer (arXiv 2503.06923): every site is extrapolated by finite differences from its last outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...errors import BudgetError
from ...formats.schedule import Schedule
from ..forecasts import taylor
from ..knobs import knob
from ..placement import ForecastRule, Placed, draw_placed, place_forecasts
from ..problem import Problem, WholeSteps, bisect


@dataclass(frozen=True)
class TaylorKnobs:
    order: int = knob(1, "of the expansion, from order + 1 full steps", one_of=(1, 2), depth=True)
    placement: str = knob("even", "even: a full step every N steps; dp: least predicted error", one_of=("even", "dp"))
    N: float = knob(
        0.0, "interval of placement=even, at least 1, not only whole; 0: the smallest that meets the budget", least=0
    )
    first: int = knob(0, "full steps at the beginning; 0: order + 1", least=0)
    formula: str = knob(
        "published",
        "published: Taylor's; lagrange: the polynomial through the sources",
        one_of=("published", "lagrange"),
    )


def compile_taylor(problem: Problem, knobs: TaylorKnobs) -> Schedule:
    """Returns TaylorSeer's schedule: C at full steps, F elsewhere, early forecasts of the order that their sources allow.

    Even placement needs no tables and predicts no error; `dp` places the full steps by the errors of these very forecasts
    (relative L2, summed), and needs a profile with inner products.
    """
    if 0 < knobs.N < 1:
        raise BudgetError(f"Knob N is {knobs.N:g}; expected at least 1, or 0 for the smallest that meets the budget.")
    if knobs.N and knobs.placement == "dp":
        raise BudgetError("Knob N is read by placement=even alone. Leave it out, or take --knob placement=even.")
    knobs = replace(knobs, first=knobs.first or knobs.order + 1)
    rule = ForecastRule("F", knobs.order + 1, taylor(knobs.formula), first=knobs.first)
    error = None
    if knobs.placement == "dp":
        placed = place_forecasts(problem, problem.tables("taylor with placement=dp").site_products(), rule)
        error = sum(p.error for p in placed.values())
    else:
        knobs = replace(knobs, N=_interval(problem, rule, knobs.N))
        placed = _even(problem, rule, knobs.N)
    # the weights follow from the steps alone
    nothing = {name: np.zeros((len(t.sites), 0, 0)) for name, t in problem.model.transformers.items()}
    return problem.signed(draw_placed(problem, placed, nothing, rule), "taylor", knobs, error)


def _interval(problem: Problem, rule: ForecastRule, given: float) -> float:
    """Returns the given interval, or the smallest that meets the budget; BudgetError if it does not."""

    def loop(interval: float) -> WholeSteps:
        return rule.whole_steps(_even(problem, rule, interval))

    if given:
        problem.check_given("N", given, loop(given))
        return given
    longest = float(problem.sampler.steps)
    if not problem.meets(loop(longest)):
        raise problem.unreachable(loop(longest))
    if problem.meets(loop(1.0)):
        return 1.0
    return round(bisect(lambda interval: problem.meets(loop(interval)), 1.0, longest, absolute=1e-4) + 5e-4, 3)


def _even(problem: Problem, rule: ForecastRule, interval: float) -> dict[str, Placed]:
    """Returns each turn's first steps and every interval-th step after them as full steps."""

    def full_steps(name: str, turn: range) -> list[int]:
        begin = min(rule.first, len(turn)) - 1
        later = {begin + round(i * interval) for i in range(1, len(turn))}
        return [step for step in range(len(turn)) if step <= begin or step in later]

    return rule.placed(problem, full_steps)
