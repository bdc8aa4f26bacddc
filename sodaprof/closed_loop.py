"""A fitted state update from the model itself: step after step on the trajectory that the accelerated loop produces.

At each step the weights of the state and of the newest outputs are those that bring the calibration generations nearest to
the full run's state at that step; the next step goes on from where these weights lead. Closed form, one run of the
accelerated loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from .cost import CostModel
from .metrics import worst_decile
from .models.clock import Clock
from .models.replay import Replay
from .models.stepper import Stepper
from .profiles import Profile
from .runtime.attach import Handle, apply
from .runtime.fits import check_fits
from .schedule import Schedule, Update
from .updates import MAX_HISTORY, RIDGE, rounded

SAMPLES = 20  # calibration generations of a fit


def fit_update(
    replay: Replay,
    schedule: Schedule,
    history: int,
    ridge: float = RIDGE,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Schedule, np.ndarray]:
    """Returns the schedule with its update fitted on the replay's generations, and each one's distance to the full run, dB.

    Steps that call the network do so under the schedule (caches, forecasts); steps `-` move the state alone.
    """
    stack = network_row(schedule)
    stepper = Stepper(replay, history, ridge)
    rows: list[tuple[float, ...]] = []
    with played(replay, schedule) as clock:
        at = stepper.start()
        for step in range(replay.steps):
            if stack[step] != "-":
                at = stepper.computed(at, step, clock)
            row, at = stepper.fitted(at, step)
            rows.append(row)
            on_step()
    return with_update(replay, schedule, history, rows), fidelity_db(at.x, replay)


def with_update(replay: Replay, schedule: Schedule, history: int, rows: Sequence[tuple[float, ...]]) -> Schedule:
    """Returns the schedule with these coefficients, said to be fitted closed loop on the replay's generations."""
    fitted = {
        "loop": "closed", "guidance_scale": schedule.sampler.guidance_scale,
        "seed": replay.seeds[0], "samples": len(replay.seeds),
    }  # fmt: skip
    return replace(schedule, update=Update(replay.update.basis, history, tuple(rows), fitted), measured=())


def priced(schedule: Schedule, cost: CostModel) -> Schedule:
    """Returns the schedule with its predicted speed and cost counted anew: an update is paid in place of the scheduler's step."""
    before = schedule.predicted or {"error": None, "cache_bytes": 0}
    speed = {"unit": cost.unit, "speedup": cost.speedup(schedule), "cost": cost.schedule(schedule)}
    return replace(schedule, predicted=before | speed | {"error": None})


def calibration_replay(
    pipe: Any, profile: Profile, samples: int = SAMPLES, on_step: Callable[[], None] = lambda: None
) -> Replay:
    """Returns the plain run of the profile's first calibration generations, all at once; several fits can share it."""
    request = profile.manifest
    seeds = range(request["seed"], request["seed"] + min(samples, request["samples"]))
    entries = [request["prompts"][i % len(request["prompts"])] for i in range(len(seeds))]
    return Replay(pipe, profile.sampler, entries, seeds, on_step)


def fit_to_model(
    pipe: Any,
    profile: Profile,
    schedule: Schedule,
    cost: CostModel,
    *,
    samples: int = SAMPLES,
    history: int = MAX_HISTORY,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Schedule, np.ndarray]:
    """Returns the schedule with its update fitted closed loop on the profile's first calibration generations, all at once.

    Beside it each generation's distance to the full run, dB. Costs one plain run of these generations and one accelerated.
    Raises MismatchError where schedule and pipeline do not belong together.
    """
    check_fits(pipe, schedule)
    on_step = counting(2 * profile.sampler.steps, on_progress)
    replay = calibration_replay(pipe, profile, samples, on_step)
    kept = schedule.update.history if schedule.update else history
    fitted, distances = fit_update(replay, schedule, kept, on_step=on_step)
    return priced(fitted, cost), distances


def counting(total: int, on_progress: Callable[[int, int], None]) -> Callable[[], None]:
    """Returns a function that tells on_progress how often it was called, of `total` times."""
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    return on_step


def play(replay: Replay, schedule: Schedule, on_step: Callable[[], None] = lambda: None) -> np.ndarray:
    """Returns each generation's distance to the full run under a schedule, dB; without an update the sampler's own steps."""
    own, update, stack = replay.update, schedule.update, network_row(schedule)
    history, rows = (update.history, update.coefficients) if update else (own.history, rounded(own.coefficients))
    stepper = Stepper(replay, history)
    with played(replay, schedule) as clock:
        at = stepper.start()
        for step in range(replay.steps):
            if stack[step] != "-":
                at = stepper.computed(at, step, clock)
            at = stepper.moved(at, step, rows[step])
            on_step()
    return fidelity_db(at.x, replay)


def joint(distances: np.ndarray) -> float:
    """Returns what candidates are judged by: the mean of the mean and of the worst decile, dB."""
    return float(distances.mean() + worst_decile(distances)) / 2


class played:
    """Attaches a schedule to the replay's pipeline while the block runs, where its steps do more than compute or nothing."""

    def __init__(self, replay: Replay, schedule: Schedule) -> None:
        letters = set("".join(row for plan in schedule.transformers.values() for row in plan.rows.values()))
        self.handle: Handle | None = None
        if letters - set("C-") or "S" in network_row(schedule):
            own = Update(replay.update.basis, replay.update.history, rounded(replay.update.coefficients), {})
            self.handle = apply(replay.pipe, replace(schedule, update=own))

    def __enter__(self) -> Clock | None:
        return None if self.handle is None else self.handle.clock

    def __exit__(self, *exception: Any) -> None:
        if self.handle is not None:
            self.handle.remove()


def network_row(schedule: Schedule) -> str:
    """Returns the stack row of the schedule's only transformer."""
    (plan,) = schedule.transformers.values()
    return plan.stack


def fidelity_db(x: Tensor, replay: Replay) -> np.ndarray:
    """Returns −10 log10 of each generation's mean squared error of the last latents, relative to their size; [B]."""
    full = replay.states[-1]
    error = (x - full).flatten(1).double().square().mean(1)
    ratio: np.ndarray = (full.double().square().mean() / error.clamp_min(1e-20)).cpu().numpy()
    return 10 * np.log10(ratio)
