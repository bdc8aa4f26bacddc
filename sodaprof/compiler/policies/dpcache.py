"""DPCache (arXiv 2602.22654): the stack's last output extrapolated to first order, full steps by a dynamic program.

The error of an interval depends on the full step before: errors of the extrapolation, summed along the interval. Published
with L1 errors; the tables here hold inner products, so they are relative L2 errors. The published recurrence keeps one
predecessor of a full step; here the state is the pair of full steps, so the placement is the best there is.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...formats.schedule import Schedule
from ..forecasts import taylor
from ..knobs import knob
from ..placement import ForecastRule, forecast_schedule
from ..problem import Problem
from .drift import stack_products


@dataclass(frozen=True)
class DPCacheKnobs:
    first: int = knob(3, "full steps at the beginning", least=1)
    anchors: int = knob(0, "full steps; 0: the number with the least predicted error", least=0)


def compile_dpcache(problem: Problem, knobs: DPCacheKnobs) -> Schedule:
    """Returns DPCache's schedule: S steps of form `output` from the last two full steps. Raises as `compile_drift`."""
    products = stack_products(problem, "dpcache", "output")
    rule = ForecastRule("S", 2, taylor("published"), first=knobs.first)
    return forecast_schedule(problem, "dpcache", knobs, products, rule)
