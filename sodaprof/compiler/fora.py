"""FORA (arXiv 2407.01425): anchors spread evenly, everything reused between them. The baseline."""

from __future__ import annotations

from typing import Any

from ..cost import CostModel
from ..errors import BudgetError
from ..profiles import Profile
from ..schedule import Schedule
from ..sites import Model, Sampler
from .draw import draw_schedule, one_transformer, reuse_only_cost, sign, take_knobs, unreachable, within

KNOBS: dict[str, Any] = {"anchors": 0}  # 0: as many as the budget allows


def compile_fora(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns the schedule with anchors at round(i · T / k), k the largest within the budget (or the knob `anchors`)."""
    chosen = take_knobs("fora", KNOBS, knobs)
    one_transformer(model, "fora")
    steps = sampler.steps
    full, spent = reuse_only_cost(model, sampler, cost)
    counts = [k for k in range(1, steps + 1) if within(spent(k), full / budget)]
    if not counts:
        raise unreachable(budget, full / spent(1), cost)
    count = chosen["anchors"] or max(counts)
    if count not in counts:
        raise BudgetError(f"{count} anchors of {steps} give {full / spent(count):.3g}x, the budget is {budget:.3g}x.")
    anchors = sorted({round(i * steps / count) for i in range(count)})
    schedule = draw_schedule(model, sampler, anchors, {})
    return sign(schedule, "fora", {"anchors": count}, profile, model, cost, error=None)
