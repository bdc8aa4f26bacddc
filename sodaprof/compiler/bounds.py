"""Budget and memory of schedules that carry an update, or are to carry one; memory of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..cost import CostModel
from ..errors import BudgetError
from ..profiles import Inspection
from ..schedule import Schedule, Update
from ..updates import MAX_HISTORY, rounded
from .draw import cache_bytes, reuse_only_cost, unreachable


def beside_update(source: Inspection, cost: CostModel, ratio: float) -> float:
    """Returns the speed-up to compile for that leaves `ratio` once a fitted update takes the place of the scheduler's step."""
    full, _ = reuse_only_cost(source.model, source.sampler, cost)
    more = source.sampler.steps * (cost.loop_step(True) - cost.loop_step(False))
    if full / ratio <= more:
        raise unreachable(ratio, full / more, cost)
    return max(1.0, full / (full / ratio - more))


def with_own_update(schedule: Schedule, source: Inspection, cost: CostModel) -> Schedule:
    """Returns the schedule with the sampler's own steps as its update, of the longest history: what a fit starts from."""
    own = source.own_update()
    fitted = {"loop": "none", "guidance_scale": source.sampler.guidance_scale}
    update = Update(own.basis, MAX_HISTORY, rounded(own.padded(MAX_HISTORY)), fitted)
    found = replace(schedule, update=update)
    spent = {"speedup": cost.speedup(found), "cost": cost.schedule(found)}
    return _kept(replace(found, predicted=(schedule.predicted or {}) | spent), source)


def _kept(schedule: Schedule, source: Inspection) -> Schedule:
    """Returns the schedule with its memory counted anew."""
    return replace(
        schedule, predicted=(schedule.predicted or {}) | {"cache_bytes": cache_bytes(schedule, source.model)}
    )


def within_cache(
    schedule: Schedule, most: int, knob: str | None, again: Callable[[dict[str, Any]], Schedule], source: Inspection
) -> Schedule:
    """Returns the schedule, or one with less of `knob`, whose caches take at most `most` bytes; BudgetError where none does.

    An update that is still the sampler's own is first cut to as few outputs as the sampler itself weighs.
    """
    while True:
        for one in (schedule, *_shorter(schedule, source)):
            if (kept := one.predicted["cache_bytes"] if one.predicted else 0) <= most:
                return one
        if not knob or schedule.policy["knobs"][knob] <= 1:
            raise BudgetError(
                f"The caches of one generation take {kept:,} bytes, at most {most:,} are allowed (--max-cache). Allow as much, "
                "or take a policy that keeps less: solver keeps a few latents, drift a few outputs of the last block."
            )
        schedule = again({knob: schedule.policy["knobs"][knob] - 1})


def _shorter(schedule: Schedule, source: Inspection) -> list[Schedule]:
    """Returns the schedule with ever fewer outputs in its update, down to the sampler's own; none where it is fitted already."""
    update = schedule.update
    if update is None or update.fitted["loop"] != "none":
        return []
    lengths = range(update.history - 1, source.own_update().history - 1, -1)
    cut = [replace(update, history=n, coefficients=tuple(row[: 1 + n] for row in update.coefficients)) for n in lengths]
    return [_kept(replace(schedule, update=one), source) for one in cut]
