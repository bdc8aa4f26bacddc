"""The response: how the guided output moves along an error of the latents, for updates that are fitted without the model."""

from __future__ import annotations

from typing import Any

from ..compiler.fit import Stepper
from ..errors import UnsupportedModelError
from ..formats.sampler import MAX_HISTORY
from ..pipelines.replay import Replay, ReplaySpace
from .plan import ProfilePlan

EVERY = 3  # the accelerated run calls the network at every third step
POINTS = 10  # steps at least at which it is measured, in even intervals: a short run changes more from step to step
MOST, SHARE = 4, 25  # generations: at most, and one for so many samples
LEAST = 16  # samples; with fewer, the additional run and a third of one are too large a share of the profile


def measure_response(pipe: Any, plan: ProfilePlan) -> dict[int, tuple[float, float]] | None:
    """Returns <d, d> and <d, r> by step, summed over a few generations; None if they cannot be replayed.

    d: difference of the latents between an accelerated run (full at every third step, its update fitted step by step) and
    the plain one; r: difference of the guided outputs. Their ratio is the response. Measured at the steps that call the
    network, in runs of less than 30 steps also between them, and at the last step; before the first step d is zero.
    """
    samples = plan.request["samples"]
    if samples < LEAST:
        return None
    count = max(1, min(MOST, samples // SHARE))
    try:
        replay = Replay(pipe, plan.sampler, *plan.generations(0, count), own=plan.own)
    except UnsupportedModelError:  # only the update needs it, which is refused for the same reason
        return None
    space = ReplaySpace(replay)
    stepper = Stepper(space, MAX_HISTORY)
    run, found = stepper.start(), dict[int, tuple[float, float]]()
    full, interval = range(0, replay.steps, EVERY), max(1, min(EVERY, replay.steps // POINTS))
    measured = {*full, *range(0, replay.steps, interval), replay.steps - 1}
    for step in range(replay.steps):
        if step in measured:
            output = replay.output(step, run.x)
            if step:
                away, moved = (run.x - replay.states[step]).double(), (output - replay.outputs[step]).double()
                found[step] = float(away.square().sum()), float((away * moved).sum())
        if step in full:
            run = stepper.with_output(run, step, space.in_basis(step, run.x, output))
        _, run = stepper.fitted(run, step)
    return found
