"""FORA (arXiv 2407.01425): anchors spread evenly, everything reused between them. The baseline."""

from __future__ import annotations

from typing import Any

from ...errors import BudgetError
from ...formats.cost import CostModel
from ...formats.profile import Profile
from ...formats.schedule import Schedule
from ...formats.sites import Model, Sampler
from ..problem import draw_schedule, reuse_only_cost, sign, take_knobs, turns_of, unreachable, within

KNOBS: dict[str, Any] = {"anchors": 0}  # 0: as many as the budget allows


def compile_fora(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns the schedule with anchors at round(i · T / k), k the largest within the budget (or the knob `anchors`).

    Of transformers that take turns, each has its share of the anchors, spread over its own steps; see `_shares`.
    """
    chosen = take_knobs("fora", KNOBS, knobs)
    turns = [(name, turn) for name, own in turns_of(model, sampler, "fora").items() for turn in own]
    steps, lengths = sampler.steps, [len(turn) for _, turn in turns]
    full, spent_on = reuse_only_cost(model, sampler, cost)

    def spent(count: int) -> float:
        each = dict.fromkeys(model.transformers, 0)
        for (name, _), share in zip(turns, _shares(lengths, count), strict=True):
            each[name] += share
        return spent_on(each)

    counts = [k for k in range(len(turns), steps + 1) if within(spent(k), full / budget)]
    if not counts:
        raise unreachable(budget, full / spent(len(turns)), cost)
    count = chosen["anchors"] or max(counts)
    if not len(turns) <= count <= steps:
        raise BudgetError(f"Knob anchors is {count}; expected {len(turns)} to {steps}.")
    if count not in counts:
        raise BudgetError(f"{count} anchors of {steps} give {full / spent(count):.3g}x, the budget is {budget:.3g}x.")
    shares = zip(turns, _shares(lengths, count), strict=True)
    anchors = sorted({turn.start + round(i * len(turn) / k) for (_, turn), k in shares for i in range(k)})
    schedule = draw_schedule(model, sampler, anchors, {})
    return sign(schedule, "fora", {"anchors": count}, profile, model, cost, error=None)


def _shares(lengths: list[int], count: int) -> list[int]:
    """Returns how many of `count` anchors each turn has: one, and each further one where intervals are longest."""
    shares = [1] * len(lengths)
    for _ in range(count - len(lengths)):
        longest = max(range(len(lengths)), key=lambda i: lengths[i] / shares[i])
        shares[longest] += 1
    return shares
