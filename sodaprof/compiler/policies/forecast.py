"""Policy `forecast`: every site is forecast from its last outputs with fitted weights, for which full steps are placed."""

from __future__ import annotations

from dataclasses import dataclass

from ...formats.rules import MAX_SOURCES
from ...formats.schedule import Schedule
from ..forecasts import METRICS, ridge
from ..knobs import knob
from ..placement import ForecastRule, forecast_schedule
from ..problem import Problem


@dataclass(frozen=True)
class ForecastKnobs:
    K: int = knob(2, "sources of a forecast: the last so many full steps", one_of=range(1, MAX_SOURCES + 1), depth=True)
    ridge: float = knob(1e-4, "pull of the weights towards reuse, in units of the sources' energy; above 0")
    power: float = knob(2.0, "power of an error, summed over the cells", least=0)
    metric: str = knob("l2", "l2: relative to the size of the output; absolute", one_of=METRICS)
    first: int = knob(1, "full steps at the beginning", least=1)
    anchors: int = knob(0, "full steps; 0: the number with the least predicted error", least=0)


def compile_forecast(problem: Problem, knobs: ForecastKnobs) -> Schedule:
    """Returns the schedule of full steps and F cells with the least predicted error within the budget.

    The weights of every forecast are those of least mean squared error over the profile's generations, with a pull towards
    reuse. Full steps are placed exactly for these weights. Raises FormatError if the profile holds no inner products.
    """
    products = problem.tables("forecast").site_products()
    rule = ForecastRule("F", knobs.K, ridge(knobs.ridge), knobs.power, knobs.metric, knobs.first)
    return forecast_schedule(problem, "forecast", knobs, products, rule)
