"""A fitted sampler update alone: full steps where an exact dynamic program puts them, no network in between.

Kin to searched multistep solvers (Bespoke solvers, arXiv 2310.19075; S4S, 2502.17423; DSS, 2505.21114), with the full run's
own states as targets and weights in closed form.
"""

from __future__ import annotations

from typing import Any

from ..cost import CostModel
from ..errors import BudgetError
from ..profiles import Profile
from ..schedule import Schedule, Update
from ..sites import Model, Sampler
from ..updates import MAX_HISTORY, RIDGE
from .draw import at_least, draw_jumps, one_transformer, sign, tables_of, take_knobs, unreachable, within
from .history import place_with_history
from .open_loop import Span, fit_open_loop, jump_costs

KNOBS: dict[str, Any] = {
    "anchors": 0,  # full steps; 0: as many as the budget allows
    "history": MAX_HISTORY,  # outputs that the update weighs
    "ridge": RIDGE,
}


def compile_solver(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns the schedule of full steps and steps without network, with its update fitted open loop.

    Full steps are placed by the exact dynamic program over the energy that each jump misses, the last two outputs given
    (state-space DP). Raises BudgetError where the budget leaves no full step, FormatError where the profile has no inner
    products, UnsupportedModelError where the sampler is not linear.
    """
    chosen = take_knobs("solver", KNOBS, knobs)
    at_least(chosen, anchors=0, history=1, ridge=0.0)
    if chosen["history"] > MAX_HISTORY:
        raise BudgetError(f"Knob history is {chosen['history']}; expected 1 to {MAX_HISTORY}.")
    name = one_transformer(model, "solver")
    profile = tables_of("solver", profile)
    span = Span(profile.state_products(), profile.own_update(), profile.response())
    steps, loop = sampler.steps, cost.loop_step(True)
    each, full = cost.transformers[name].full, sampler.steps * (cost.loop_step(False) + cost.transformers[name].full)
    counts = [n for n in range(1, steps + 1) if within(n * each + steps * loop, full / budget)]
    if not counts:
        raise unreachable(budget, full / (each + steps * loop), cost)
    count = chosen["anchors"] or max(counts)
    if count not in counts:
        raise BudgetError(f"{count} full steps of {steps} do not fit {budget:.3g}x; at most {max(counts)} do.")
    placed = place_with_history(jump_costs(span, steps), count)
    schedule = draw_jumps(model, sampler, placed[count][0])
    coefficients, error = fit_open_loop(span, schedule.anchors(), chosen["history"], chosen["ridge"])
    fitted = {"loop": "open", "guidance_scale": sampler.guidance_scale, "samples": profile.manifest["samples"]}
    update = Update(span.own.basis, chosen["history"], coefficients, fitted)
    schedule = Schedule(schedule.transformers, sampler, model.shape, {}, update=update)
    return sign(schedule, "solver", chosen | {"anchors": count}, profile, model, cost, error)
