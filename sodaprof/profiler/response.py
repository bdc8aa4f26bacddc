"""How the guided output moves with the latents: what an update that is fitted without the model knows of its own errors."""

from __future__ import annotations

from typing import Any

from ..compiler.fit import Stepper
from ..errors import UnsupportedModelError
from ..formats.sampler import MAX_HISTORY
from ..pipelines.replay import Replay, ReplaySpace
from .plan import ProfilePlan

EVERY = 3  # the accelerated run calls the network at every third step
POINTS = 10  # at which it is measured at least, in even intervals: a short run changes more from step to step
MOST, SHARE = 4, 25  # generations: at most, and one of so many samples
LEAST = 16  # samples below which it would cost more than it is worth: a run of a generation and a third of one


def generations(samples: int) -> int:
    """Returns how many of the samples are run accelerated, too."""
    return 0 if samples < LEAST else max(1, min(MOST, samples // SHARE))


def measure_response(pipe: Any, plan: ProfilePlan) -> dict[int, tuple[float, float]] | None:
    """Returns <d, d> and <d, r> by step, summed over a few generations; None where they cannot be replayed.

    d: how far an accelerated run (full at every third step, its update fitted on the way) is from the plain one; r: how far
    its guided output is. Their ratio is the response. Taken where the run calls the network, in runs of less than 30 steps in
    between, too, and at the last step; before the first step d is zero.
    """
    request, count = plan.request, generations(plan.request["samples"])
    if not count:
        return None
    entries = [request["prompts"][i % len(request["prompts"])] for i in range(count)]
    try:
        replay = Replay(pipe, plan.sampler, entries, [request["seed"] + i for i in range(count)], own=plan.own)
    except UnsupportedModelError:  # the update, which alone asks for it, is refused there by name
        return None
    space = ReplaySpace(replay)
    stepper = Stepper(space, MAX_HISTORY)
    at, found = stepper.start(), dict[int, tuple[float, float]]()
    full, interval = range(0, replay.steps, EVERY), max(1, min(EVERY, replay.steps // POINTS))
    measured = {*full, *range(0, replay.steps, interval), replay.steps - 1}
    for step in range(replay.steps):
        if step in measured:
            output = replay.output(step, at.x)
            if step:
                away, moved = (at.x - replay.states[step]).double(), (output - replay.outputs[step]).double()
                found[step] = float(away.square().sum()), float((away * moved).sum())
        if step in full:
            at = stepper.with_output(at, step, space.in_basis(step, at.x, output))
        _, at = stepper.fitted(at, step)
    return found
