"""A fitted sampler update alone: full steps where an exact dynamic program puts them, no network in between.

Kin to searched multistep solvers (Bespoke solvers, arXiv 2310.19075; S4S, 2502.17423; DSS, 2505.21114), with the full run's
own states as targets and weights in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import BudgetError
from ...formats.cost import CostModel
from ...formats.profile import Profile
from ...formats.sampler import MAX_HISTORY, RIDGE
from ...formats.schedule import Schedule, Update
from ...formats.sites import Model, Sampler
from ..open_loop import Span, fit_open_loop, jump_costs
from ..placement import place_with_history
from ..problem import at_least, draw_jumps, one_transformer, sign, tables_of, take_knobs, unreachable, within

KNOBS: dict[str, Any] = {
    "anchors": 0,  # full steps; 0: as many as the budget allows
    "history": MAX_HISTORY,  # outputs that the update weighs
    "ridge": RIDGE,
    "polish": 300,  # placements tried at most to better the dynamic program's by the simulated final error; 0: none
}
POWERS = (0.75, 1.0, 2.0)  # of the missed lengths
LONG = 100  # steps beyond which a simulation takes too long for as many


def compile_solver(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns the schedule of full steps and steps without network, with its update fitted open loop.

    Full steps are placed by the exact dynamic program over the energy that each jump misses, the last two outputs given
    (state-space DP). Where the profile has measured the network's response, the whole accelerated run can be simulated, which
    orders schedules better (docs/studies/proxies.md): of programs that count errors by several powers the best by simulation
    is taken, and single full steps are moved while that lowers its final error. Raises BudgetError where the budget leaves no full step,
    FormatError where the profile has no inner products, UnsupportedModelError where the sampler is not linear.
    """
    chosen = take_knobs("solver", KNOBS, knobs)
    at_least(chosen, anchors=0, history=1, ridge=0.0, polish=0)
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
    missed = jump_costs(span, steps)

    def simulated(anchors: list[int]) -> float:
        return fit_open_loop(span, anchors, chosen["history"], chosen["ridge"])[1]

    if span.response is None:
        anchors = place_with_history(missed, count)[count][0]
    else:
        starts = [place_with_history(missed ** (power / 2), count)[count][0] for power in POWERS]
        anchors = polished(
            min(starts, key=simulated), steps, simulated, int(chosen["polish"] * min(1, (LONG / steps) ** 3))
        )
    schedule = draw_jumps(model, sampler, anchors)
    coefficients, error = fit_open_loop(span, anchors, chosen["history"], chosen["ridge"])
    fitted = {"loop": "open", "guidance_scale": sampler.guidance_scale, "samples": profile.manifest["samples"]}
    update = Update(span.own.basis, chosen["history"], coefficients, fitted)
    schedule = Schedule(schedule.transformers, sampler, model.shape, {}, update=update)
    return sign(schedule, "solver", chosen | {"anchors": count}, profile, model, cost, error)


def polished(anchors: list[int], steps: int, error: Callable[[list[int]], float], tries: int) -> list[int]:
    """Returns the anchors, step 0 kept, with single ones moved by up to two steps as long as that lowers the error.

    At most `tries` placements are tried, in a fixed order; a move that helps is kept at once.
    """
    best, least, left, still = list(anchors), error(list(anchors)), tries, 0
    moves = [(number, by) for number in range(1, len(anchors)) for by in (-1, 1, -2, 2)]
    while moves and still < len(moves):  # until all moves in a row have failed
        for number, by in moves:
            if still >= len(moves) or not left:
                return best
            still += 1
            to = best[number] + by
            if not 0 < to < steps or to in best:
                continue
            tried = sorted([*best[:number], to, *best[number + 1 :]])
            left -= 1
            found = error(tried)
            if found < least:
                best, least, still = tried, found, 0
    return best
