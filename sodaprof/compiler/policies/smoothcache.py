"""SmoothCache (arXiv 2411.10510): each kind of site is reused until its calibrated error reaches one threshold for all."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec.structs import replace

from ...errors import BudgetError
from ...formats.cost import CostModel
from ...formats.profile import Profile
from ...formats.schedule import Schedule
from ...formats.sites import Model, Sampler
from ..problem import (
    at_least,
    draw_schedule,
    reuse_only_cost,
    sign,
    tables_of,
    take_knobs,
    turns_of,
    unreachable,
    within,
)
from .magcache import smallest

KNOBS: dict[str, Any] = {"threshold": 0.0}  # of the relative L1 error; 0: the smallest that meets the budget


def compile_smoothcache(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns SmoothCache's schedule: C and R, one row for each kind of site.

    The error of a kind is the relative L1 error of reuse, averaged over its layers, between a step and the kind's last
    computed one. Nothing is reused for longer than the profile measured.
    """
    profile = tables_of("smoothcache", profile)
    chosen = take_knobs("smoothcache", KNOBS, knobs)
    at_least(chosen, threshold=0)
    turns = turns_of(model, sampler, "smoothcache")
    errors = profile.caching_error("l1")
    full, _ = reuse_only_cost(model, sampler, cost)

    def drawn(threshold: float) -> Schedule:
        schedule = draw_schedule(model, sampler, [], {})
        plans = {}
        for name, transformer in model.transformers.items():
            past, rows = transformer.past(sampler.steps), {}
            for kind in dict.fromkeys(site.kind for site in transformer.sites):
                of_kind = [i for i, site in enumerate(transformer.sites) if site.kind == kind]
                rows[kind] = row_of(errors[name][:, of_kind].mean(axis=1), past, threshold)
            drawn_rows = {site.key: rows[site.kind] for site in transformer.sites}
            plans[name] = replace(schedule.transformers[name], rows=drawn_rows)
        return replace(schedule, transformers=plans)

    meets = lambda threshold: within(cost.schedule(drawn(threshold)), full / budget)  # noqa: E731
    if not chosen["threshold"]:
        if not meets(np.inf):
            most = max(len(turn) for own in turns.values() for turn in own)
            raise unreachable(budget, cost.speedup(drawn(np.inf)), cost, profile.max_age + 1, most)
        chosen["threshold"] = smallest(meets)
    elif not meets(chosen["threshold"]):
        raise BudgetError(
            f"threshold={chosen['threshold']:g} gives {cost.speedup(drawn(chosen['threshold'])):.3g}x, the budget is "
            f"{budget:.3g}x. Leave it out to have it chosen for the budget."
        )
    return sign(drawn(chosen["threshold"]), "smoothcache", chosen, profile, model, cost, error=None)


def row_of(error: np.ndarray, past: list[int], threshold: float) -> str:
    """Returns the row of a kind from its error of reuse [T, ages + 1]: R while that stays below the threshold."""
    row, age = "", 0
    for step, before in enumerate(past):
        age += 1
        if before < 0:
            row += "_"
        elif before == 0 or age >= error.shape[1] or not error[step, age] < threshold:
            row, age = row + "C", 0
        else:
            row += "R"
    return row
