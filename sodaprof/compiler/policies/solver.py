"""A fitted sampler update alone: full steps placed by an exact dynamic program, and the network not called in between.

Related to searched multistep solvers (Bespoke solvers, arXiv 2310.19075; S4S, 2502.17423; DSS, 2505.21114), with the full run's
own states as targets and weights in closed form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from msgspec.structs import replace

from ...formats.sampler import MAX_HISTORY, RIDGE
from ...formats.schedule import Schedule, Update
from ..fit import Span, fit_open_loop, jump_costs, single_jump_misses
from ..knobs import knob
from ..placement import place_full_steps
from ..problem import Problem, WholeSteps, draw_steps

POWERS = (0.75, 1.0, 2.0)  # of the missed lengths
POLISHED = 3  # of the placements, those with the least simulated error, are polished
LONG = 100  # steps above which fewer placements are tried, for a simulation takes longer


@dataclass(frozen=True)
class SolverKnobs:
    anchors: int = knob(0, "full steps; 0: as many as the budget allows", least=0)
    history: int = knob(MAX_HISTORY, "outputs that the update weighs", least=1, most=MAX_HISTORY, depth=True)
    ridge: float = knob(RIDGE, "pull towards the sampler's own weights", least=0)
    polish: int = knob(300, "placements tried at most to lower the simulated final error; 0: none", least=0)


def compile_solver(problem: Problem, knobs: SolverKnobs) -> Schedule:
    """Returns the schedule of full steps and steps without network, with its update fitted open loop.

    Placements compete. Programs over the energy that each jump misses, given the last two outputs, count errors by several
    powers; another counts what the sampler's own single jumps miss; one is even. If the profile has measured the network's
    response, the whole accelerated run can be simulated, which orders schedules better (docs/studies/proxies.md): those with the
    least simulated error are improved by moving single full steps, and the best is taken. Raises BudgetError if the budget
    leaves no full step, FormatError if the profile has no inner products, UnsupportedModelError if the sampler is not linear.
    """
    name, _ = problem.only_transformer("solver")
    profile, sampler = problem.tables("solver"), problem.sampler
    span = Span(profile.state_products(), profile.own_update(), profile.response())
    problem = dataclasses.replace(problem, own_update=span.own)  # its cost replaces that of the scheduler's step

    def loop(count: int) -> WholeSteps:
        return problem.whole_steps({name: count}, "-")

    count = max(problem.affordable(range(1, sampler.steps + 1), loop, knobs.anchors, bounded=False))
    anchors = placements(span, count, knobs)[0]
    coefficients, error = fit_open_loop(span, anchors, knobs.history, knobs.ridge)
    fitted = {"loop": "open", "guidance_scale": sampler.guidance_scale, "samples": profile.manifest["samples"]}
    update = Update(span.own.basis, knobs.history, coefficients, fitted)
    schedule = replace(draw_steps(problem.model, sampler, {name: anchors}, "-"), update=update)
    return problem.signed(schedule, "solver", dataclasses.replace(knobs, anchors=count), error)


def placements(span: Span, count: int, knobs: SolverKnobs) -> list[list[int]]:
    """Returns placements of so many full steps, the best first; the second and further ones only by simulation."""
    missed = jump_costs(span)
    if span.response is None:
        return [place_full_steps(missed, count)[count][0]]

    def simulated(anchors: list[int]) -> float:
        return fit_open_loop(span, anchors, knobs.history, knobs.ridge)[1]

    starts = [*spacings(span, count), *(place_full_steps(missed ** (power / 2), count)[count][0] for power in POWERS)]
    tries = int(knobs.polish * min(1, (LONG / span.steps) ** 3))
    first = sorted(starts, key=simulated)[:POLISHED]
    found = sorted((polished(start, span.steps, simulated, tries) for start in first), key=simulated)
    return [anchors for i, anchors in enumerate(found) if anchors not in found[:i]]


def spacings(span: Span, count: int) -> list[list[int]]:
    """Returns two placements that need no fit: with the least misses of the sampler's own single jumps, and an even one."""
    even = sorted({int(step) for step in np.linspace(0, span.steps, count, endpoint=False)})
    return [place_full_steps(single_jump_misses(span), count)[count][0], even]


def polished(anchors: list[int], steps: int, error: Callable[[list[int]], float], tries: int) -> list[int]:
    """Returns the full steps, step 0 kept, with single ones moved by up to two steps as long as that lowers the error.

    At most `tries` placements are tried, in a fixed order; a move that helps is kept at once.
    """
    best, least, failed = anchors, error(anchors), 0
    moves = [(number, by) for number in range(1, len(anchors)) for by in (-1, 1, -2, 2)]
    for number, by in cycle(moves):
        if failed == len(moves) or not tries:  # all moves in a row have failed
            break
        failed += 1
        to = best[number] + by
        if not 0 < to < steps or to in best:
            continue
        tries -= 1
        tried = sorted([*best[:number], to, *best[number + 1 :]])
        if (found := error(tried)) < least:
            best, least, failed = tried, found, 0
    return best
