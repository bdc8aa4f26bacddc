"""Policy `drift`: between anchors the stack is skipped, what it adds to its input is forecast with fitted weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import UnsupportedModelError
from ...formats.cost import CostModel, TransformerCost
from ...formats.profile import Profile
from ...formats.rules import MAX_SOURCES
from ...formats.schedule import Schedule
from ...formats.sites import Model, Sampler
from ..forecasts import METRICS, forecasts_at, ridge
from ..placement import Rule, place_forecasts
from ..problem import at_least, draw_skips, one_of, sign, tables_of, take_knobs, turns_of

KNOBS: dict[str, Any] = {
    "K": 3,  # sources of a forecast: the last so many anchors
    "form": "drift",  # drift: what the stack adds to its input | output: the hidden state after its last block
    "ridge": 1e-4,  # pull of the weights towards reuse, in units of the sources' energy
    "power": 2.0,  # what an error counts: its power, summed over the steps
    "metric": "l2",  # l2: relative to the size of what is forecast | absolute
    "first": 1,  # steps at the beginning that are computed in any case
    "anchors": 0,  # 0: the number with the least predicted error
}


def compile_drift(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns the schedule of anchors and S steps with the least predicted error within the budget.

    Weights and anchors as for `fit`, from the inner products of the whole stack. Raises FormatError where there are none.
    """
    profile = tables_of("drift", profile)
    chosen = take_knobs("drift", KNOBS, knobs)
    one_of(chosen, "K", range(1, MAX_SOURCES + 1))
    one_of(chosen, "form", ("drift", "output"))
    one_of(chosen, "metric", METRICS)
    at_least(chosen, power=0, first=1, anchors=0)
    rule = Rule(chosen["K"], ridge(chosen["ridge"]), chosen["power"], chosen["metric"], chosen["first"])
    return skip_stacks("drift", model, sampler, profile, cost, budget, rule, chosen["form"], chosen)


def skip_stacks(
    policy: str,
    model: Model,
    sampler: Sampler,
    profile: Profile,
    cost: CostModel,
    budget: float,
    rule: Rule,
    form: str,
    knobs: dict[str, Any],
) -> Schedule:
    """Returns the signed schedule of anchors and S steps by this rule; the knob `anchors` as in `drift`."""
    turns = turns_of(model, sampler, policy)
    stacks = {name: products[None] for name, products in stack_products(policy, profile, form).items()}
    placed = place_forecasts(
        policy, model, sampler, turns, stacks, cost, budget, profile.max_age + 1, rule, skipped_step, knobs["anchors"]
    )
    cells = {name: forecasts_at(stacks[name], p.sources, rule.weigh, form) for name, p in placed.items()}
    anchors = {name: p.anchors for name, p in placed.items()}
    schedule = draw_skips(
        model, sampler, anchors, {name: {t: c[0] for t, c in own.items()} for name, own in cells.items()}
    )
    knobs = knobs | {"anchors": sum(map(len, anchors.values()))}
    return sign(schedule, policy, knobs, profile, model, cost, sum(p.error or 0.0 for p in placed.values()))


def stack_products(policy: str, profile: Profile, form: str) -> dict[str, np.ndarray]:
    """Returns the products [T, T] of each transformer's stack; UnsupportedModelError where one's stack cannot be skipped."""
    products = profile.stack_products()
    if missing := [name for name in profile.model.transformers if name not in products]:
        raise UnsupportedModelError(
            f"{profile.model.name}: the profile has no products of the stack of {missing[0]}, whose blocks hand on more than "
            f"one tensor; --policy {policy} skips stacks. Use --policy fit or soda."
        )
    return {name: forms[form] for name, forms in products.items()}


def skipped_step(table: TransformerCost, count: int) -> float:
    """Cost of a step whose stack is forecast from `count` sources."""
    return table.step.stack[count - 1]
