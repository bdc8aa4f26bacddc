"""Policy `drift`: the stack is skipped between full steps, and what it adds to its input is forecast with fitted weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import UnsupportedModelError
from ...formats.rules import MAX_SOURCES
from ...formats.schedule import Schedule
from ..forecasts import METRICS, ridge
from ..knobs import knob
from ..placement import ForecastRule, forecast_schedule
from ..problem import Problem


@dataclass(frozen=True)
class DriftKnobs:
    K: int = knob(3, "sources of a forecast: the last so many full steps", one_of=range(1, MAX_SOURCES + 1), depth=True)
    form: str = knob(
        "drift", "drift: what the stack adds to its input; output: of its last block", one_of=("drift", "output")
    )
    ridge: float = knob(1e-4, "pull of the weights towards reuse, in units of the sources' energy; above 0")
    power: float = knob(2.0, "power of an error, summed over the steps", least=0)
    metric: str = knob("l2", "l2: relative to the size of what is forecast; absolute", one_of=METRICS)
    first: int = knob(1, "full steps at the beginning", least=1)
    anchors: int = knob(0, "full steps; 0: the number with the least predicted error", least=0)


def compile_drift(problem: Problem, knobs: DriftKnobs) -> Schedule:
    """Returns the schedule of full steps and S steps with the least predicted error within the budget.

    Weights and full steps as for `forecast`, from the inner products of the whole stack. Raises FormatError if the profile
    holds none, UnsupportedModelError if the stack cannot be skipped.
    """
    products = stack_products(problem, "drift", knobs.form)
    rule = ForecastRule("S", knobs.K, ridge(knobs.ridge), knobs.power, knobs.metric, knobs.first, knobs.form)
    return forecast_schedule(problem, "drift", knobs, products, rule)


def stack_products(problem: Problem, policy: str, form: str) -> dict[str, np.ndarray]:
    """Returns the products [1, T, T] of each transformer's stack; UnsupportedModelError if a stack cannot be skipped."""
    turns, products = problem.turns, problem.tables(policy).stack_products()
    if missing := [name for name in turns if name not in products]:
        raise UnsupportedModelError(
            f"{problem.model.name}: the profile has no products of the stack of {missing[0]}, whose blocks return more than "
            f"one tensor; --policy {policy} skips stacks. Use --policy forecast or soda."
        )
    return {name: forms[form][None] for name, forms in products.items()}
