"""Policy `fit`: every site forecast from its last outputs with fitted weights; anchors by a program that knows them."""

from __future__ import annotations

from typing import Any

from ...formats.cost import CostModel, TransformerCost
from ...formats.profile import Profile
from ...formats.rules import MAX_SOURCES
from ...formats.schedule import Schedule
from ...formats.sites import Model, Sampler
from ..forecasts import METRICS, forecasts_at, ridge
from ..placement import Rule, place_forecasts
from ..problem import at_least, draw_forecasts, one_of, sign, tables_of, take_knobs, turns_of

KNOBS: dict[str, Any] = {
    "K": 2,  # sources of a forecast: the last so many anchors
    "ridge": 1e-4,  # pull of the weights towards reuse, in units of the sources' energy
    "power": 2.0,  # what an error counts: its power, summed over the cells
    "metric": "l2",  # l2: relative to the size of the output | absolute
    "first": 1,  # steps at the beginning that are computed in any case
    "anchors": 0,  # 0: the number with the least predicted error
}


def compile_fit(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns the schedule of anchors and F cells with the least predicted error within the budget.

    The weights of every forecast are those of least mean squared error over the profile's generations, shrunk to reuse.
    Anchors are placed exactly for these weights. Raises FormatError where the profile holds no inner products.
    """
    profile = tables_of("fit", profile)
    chosen = take_knobs("fit", KNOBS, knobs)
    one_of(chosen, "K", range(1, MAX_SOURCES + 1))
    one_of(chosen, "metric", METRICS)
    at_least(chosen, power=0, first=1, anchors=0)
    turns, products = turns_of(model, sampler, "fit"), profile.site_products()
    rule = Rule(chosen["K"], ridge(chosen["ridge"]), chosen["power"], chosen["metric"], chosen["first"])
    placed = place_forecasts(
        "fit",
        model,
        sampler,
        turns,
        products,
        cost,
        budget,
        profile.max_age + 1,
        rule,
        forecast_step,
        chosen["anchors"],
    )
    anchors = {name: p.anchors for name, p in placed.items()}
    cells = {name: forecasts_at(products[name], p.sources, rule.weigh) for name, p in placed.items()}
    schedule = draw_forecasts(model, sampler, anchors, cells)
    chosen["anchors"] = sum(map(len, anchors.values()))
    return sign(schedule, "fit", chosen, profile, model, cost, sum(p.error or 0.0 for p in placed.values()))


def forecast_step(table: TransformerCost, count: int) -> float:
    """Cost of a step in which every site is forecast from `count` sources."""
    return table.step.fixed + sum(site.F[count - 1] for site in table.sites.values())
