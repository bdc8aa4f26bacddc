"""The best of several schedules, measured on the model: policy `mix`, and the period N of ToCa and DuCa.

Candidates are compiled under one budget and sampled on calibration generations of the profile; the one with the best score
is kept. Which policy, or which N, is best for a model and a budget is in no table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..compiler import compile_schedule
from ..compiler.policies import POLICIES, RELEASED
from ..errors import BudgetError, FormatError, SodaprofError, UnsupportedModelError
from ..formats.cost import cost_of
from ..formats.profile import load_profile
from ..formats.schedule import Schedule
from ..measure.contenders import Comparison, Contender
from ..measure.metrics import worst_decile
from ..runtime.checks import check_matches
from .closed_loop import (
    SAMPLES,
    calibration_replay,
    counted,
    fit_update,
    sampled_distances,
    with_predicted_cost,
)
from .jumps import score_db

CANDIDATES = {  # of mix: name -> policy, and whether an update is fitted in addition
    f"{name} + update" if updated else name: {"policy": name, "updated": updated}
    for name, policy in POLICIES.items()
    for updated in (True, False)
    if policy.mixed and (updated or not policy.fits_update)
}
PERIODS = range(2, 9)  # candidates for N
PERIOD_SAMPLES = 16  # calibration seeds on which N is chosen, sampled at once


@dataclass(frozen=True)
class Measured:
    """A candidate and how near each calibration generation under it is to the full run's, dB, [n]."""

    name: str
    schedule: Schedule
    distances: np.ndarray
    score: float  # dB, the higher the better

    def figures(self) -> dict[str, float]:
        """Returns what a schedule's file keeps of it."""
        values = {"mean_db": float(self.distances.mean()), "worst_decile_db": worst_decile(self.distances)}
        return {name: round(value, 3) for name, value in values.items()}


def compiled(
    candidates: Mapping[str, dict[str, Any]], **common: Any
) -> tuple[dict[str, Schedule], dict[str, SodaprofError]]:
    """Returns the schedules of the candidates that can be compiled, and the errors of the others, by name.

    candidates: arguments of `compile_schedule` by name, in addition to the common ones.
    """
    schedules: dict[str, Schedule] = {}
    left_out: dict[str, SodaprofError] = {}
    for name, own in candidates.items():
        try:
            schedules[name] = compile_schedule(**common, **own)
        except (BudgetError, UnsupportedModelError) as error:
            left_out[name] = error
    return schedules, left_out


def best_first(measured: Iterable[Measured]) -> list[Measured]:
    return sorted(measured, key=lambda one: -one.score)


def mix(
    pipe: Any,
    folder: str | Path,
    budget: str | float,
    cost: str | Path = "flops",
    *,
    max_cache: int | None = None,
    samples: int = SAMPLES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Schedule, list[Measured], dict[str, str]]:
    """Returns the best candidate's schedule, all that were measured, best first, and why others were left out, by name.

    budget, cost and max_cache as for `compile_schedule`; every candidate meets them, its update included. Measured on the
    profile's first calibration generations, at most `samples`, whose full run all candidates share; updates are fitted on
    these, too. Best: by `score_db` of the last latents. Raises BudgetError if no candidate meets budget and bytes,
    FormatError if the profile lacks tables, UnsupportedModelError if the sampler's steps are not linear.
    """
    folder = Path(folder)
    schedules, left_out = compiled(CANDIDATES, folder=folder, budget=budget, cost=cost, max_cache=max_cache)
    reasons = {name: str(error) for name, error in left_out.items()}
    if not schedules:
        raise BudgetError(" ".join(["No action meets the budget.", *(f"{n}: {why}" for n, why in reasons.items())]))
    profile, table = load_profile(folder), cost_of(folder, cost)
    check_matches(pipe, next(iter(schedules.values())))
    on_step = counted((1 + len(schedules)) * profile.sampler.steps, on_progress)
    replay = calibration_replay(pipe, profile, samples, on_step)

    def measure(name: str, schedule: Schedule) -> Measured:
        if schedule.update is None:
            distances = sampled_distances(replay, schedule, on_step)
        else:
            schedule, distances = fit_update(replay, schedule, on_step)
            schedule = with_predicted_cost(schedule, table)
        return Measured(name, schedule, distances, score_db(distances))

    measured = best_first(measure(name, schedule) for name, schedule in schedules.items())
    best = measured[0]
    record = {"best": best.name, "samples": len(replay.seeds)}
    record["candidates"] = {one.name: one.figures() for one in measured}
    policy = {"name": "mix", "knobs": best.schedule.policy["knobs"] | record}
    return replace(best.schedule, policy=policy), measured, reasons


def choose_period(
    pipe: Any,
    folder: str | Path,
    budget: str | float,
    policy: str,
    *,
    cost: str | Path = "flops",
    knobs: dict[str, Any] | None = None,
    max_cache: int | None = None,
    updated: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured]:
    """Returns the schedules of toca or duca for each N in 2…8 that meets the budget, the nearest to the full run first.

    For each N the policy chooses R for the budget; the score is the mean PSNR over the profile's first calibration seeds.
    cost, knobs, max_cache, updated: as for `compile_schedule`.
    Raises BudgetError if the policy has no N to choose or no N meets the budget, FormatError if `folder` holds no
    calibration seeds.
    """
    knobs = knobs or {}
    if policy not in RELEASED or "N" in knobs:
        raise BudgetError(f"--fit chooses N for {' and '.join(RELEASED)}. Leave it out, or leave N out of the knobs.")
    if not (Path(folder) / "manifest.json").exists():
        raise FormatError(
            f"{folder}: no manifest.json, so no calibration seeds. Type: sodaprof profile MODEL -o {folder}"
        )
    profile = load_profile(folder)
    schedules, left_out = compiled(
        {f"N={period}": {"knobs": knobs | {"N": period}} for period in PERIODS},
        folder=folder, budget=budget, policy=policy, cost=cost, max_cache=max_cache, updated=updated,
    )  # fmt: skip
    if not schedules:
        raise list(left_out.values())[-1]
    request, steps = profile.manifest, profile.sampler.steps
    seeds = range(request["seed"], request["seed"] + min(PERIOD_SAMPLES, request["samples"]))
    comparison = Comparison(pipe, request["prompts"], PERIOD_SAMPLES, profile.sampler.guidance_scale)
    comparison.on_progress, comparison.total = on_progress, len(seeds) * (1 + len(schedules))
    contenders = [Contender(policy, "", steps, 1.0, schedule) for schedule in schedules.values()]
    full, *others = comparison.sample([Contender("full", "", steps, 1.0), *contenders], seeds)
    quality = [samples.psnr_db(full) for samples in others]
    return best_first(
        Measured(name, schedule, db, round(float(db.mean()), 3))
        for (name, schedule), db in zip(schedules.items(), quality, strict=True)
    )
