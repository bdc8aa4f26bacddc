"""DPCache (arXiv 2602.22654): the stack's last output extrapolated to first order, anchors by a dynamic program.

Its cost of a segment depends on the anchor before: the errors of the extrapolation, summed along the segment. Published
with L1 errors; the tables here hold inner products, so they are relative L2 errors. The published recurrence keeps one
predecessor an anchor; here the pair of anchors is the state, so that the placement is the best there is.
"""

from __future__ import annotations

from typing import Any

from ...formats.cost import CostModel
from ...formats.profile import Profile
from ...formats.schedule import Schedule
from ...formats.sites import Model, Sampler
from ..forecasts import taylor
from ..placement import Rule
from ..problem import at_least, tables_of, take_knobs
from .drift import skip_stacks

KNOBS: dict[str, Any] = {
    "first": 3,  # steps at the beginning that are computed in any case
    "anchors": 0,  # 0: the number with the least predicted error
}


def compile_dpcache(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns DPCache's schedule: S steps of form `output` from the last two anchors. Raises as `drift`."""
    profile = tables_of("dpcache", profile)
    chosen = take_knobs("dpcache", KNOBS, knobs)
    at_least(chosen, first=1, anchors=0)
    rule = Rule(2, taylor("published"), first=chosen["first"])
    return skip_stacks("dpcache", model, sampler, profile, cost, budget, rule, "output", chosen)
