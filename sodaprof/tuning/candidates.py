"""Policy `mix`: schedules of every action under one budget, measured on the model; the one nearest to the full run is taken.

Steps without network (solver), skipped stacks (drift), forecast sites (forecast), reuse and pruning (soda), with a fitted
update and without: which of them a model and a budget favour is not in any table, so each candidate's own trajectory decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..compiler import compile_schedule
from ..compiler.policies import POLICIES
from ..errors import BudgetError, UnsupportedModelError
from ..formats.cost import cost_of
from ..formats.profile import load_profile
from ..formats.schedule import Schedule
from ..measure.metrics import worst_decile
from ..runtime.checks import check_fits
from .closed_loop import SAMPLES, calibration_replay, counting, fit_update, joint, play, priced

CANDIDATES = tuple(  # policy, whether an update is fitted in addition
    (name, updated)
    for name, policy in POLICIES.items()
    for updated in (True, False)
    if policy.mixed and (updated or not policy.fits_update)
)


@dataclass(frozen=True)
class Weighed:
    """A candidate, and how far each calibration generation's last latents under it are from the full run's, dB."""

    name: str
    schedule: Schedule
    distances: np.ndarray

    @property
    def score(self) -> float:
        return joint(self.distances)

    def figures(self) -> dict[str, float]:
        """Returns what a schedule's file keeps of it."""
        values = {"mean_db": float(self.distances.mean()), "worst_decile_db": worst_decile(self.distances)}
        return {name: round(value, 3) for name, value in values.items()}


def mix(
    pipe: Any,
    folder: str | Path,
    budget: str | float,
    cost: str | Path = "flops",
    *,
    max_cache: int | None = None,
    samples: int = SAMPLES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Schedule, list[Weighed], dict[str, str]]:
    """Returns the best candidate's schedule, all that were measured, best first, and why others were left out, by name.

    budget, cost and max_cache as for `compile_schedule`; every candidate keeps to them, its update included. Measured on the
    profile's first calibration generations, at most `samples`, whose plain run all candidates share; updates are fitted on
    these, too. Best: mean and worst decile of the last latents alike. Raises BudgetError where no candidate keeps to budget and
    bytes, FormatError where the profile lacks tables, UnsupportedModelError where the sampler's steps are not linear.
    """
    folder = Path(folder)
    compiled: dict[str, Schedule] = {}
    left_out: dict[str, str] = {}
    for policy, updated in CANDIDATES:
        name = f"{policy} + update" if updated else policy
        try:
            compiled[name] = compile_schedule(folder, budget, policy, cost, None, max_cache, updated)
        except (BudgetError, UnsupportedModelError) as error:
            left_out[name] = str(error)
    if not compiled:
        told = " ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise BudgetError(f"No action keeps to the budget. {told}")
    profile, table = load_profile(folder), cost_of(folder, cost)
    check_fits(pipe, next(iter(compiled.values())))
    on_step = counting((1 + len(compiled)) * profile.sampler.steps, on_progress)
    replay = calibration_replay(pipe, profile, samples, on_step)
    weighed = []
    for name, schedule in compiled.items():
        if schedule.update is not None:
            fitted, distances = fit_update(replay, schedule, schedule.update.history, on_step=on_step)
            weighed.append(Weighed(name, priced(fitted, table), distances))
        else:
            weighed.append(Weighed(name, schedule, play(replay, schedule, on_step)))
    weighed.sort(key=lambda candidate: -candidate.score)
    return _signed(weighed, len(replay.seeds)), weighed, left_out


def _signed(weighed: list[Weighed], samples: int) -> Schedule:
    """Returns the best schedule, which remembers what it was held against."""
    best = weighed[0]
    measured = {"best": best.name, "samples": samples, "candidates": {one.name: one.figures() for one in weighed}}
    return replace(best.schedule, policy={"name": "mix", "knobs": best.schedule.policy["knobs"] | measured})
