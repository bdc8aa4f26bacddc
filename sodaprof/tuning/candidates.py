"""The best of several schedules, measured on the model: policy `mix`, and the period N of ToCa and DuCa.

Candidates are compiled under one budget and sampled on calibration generations of the profile; the one with the best score
is kept. Which policy, or which N, is best for a model and a budget is in no table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from torch import Tensor

from ..compiler import compile_schedule
from ..compiler.fit import Span
from ..compiler.policies import POLICIES, RELEASED
from ..compiler.policies.solver import SolverKnobs, placements
from ..errors import BudgetError, FormatError, SodaprofError, UnsupportedModelError
from ..formats.cost import CostModel, cost_of
from ..formats.profile import Profile, load_profile
from ..formats.schedule import Schedule
from ..measure.contenders import Comparison, Contender
from ..measure.metrics import worst_decile
from ..pipelines.replay import Replay
from ..runtime.checks import check_matches
from .closed_loop import (
    SAMPLES,
    calibration_replay,
    counted,
    fit_update,
    sampled_distances,
    with_predicted_cost,
)
from .jumps import (
    FORMS,
    Batch,
    Form,
    Jumps,
    decoder_of,
    distances,
    fit_jumps,
    forms_of,
    in_batches,
    is_jumps_alone,
    jumps_of,
    score_db,
    sure_gain,
)
from .step_letters import with_columns

CANDIDATES = {  # of mix: name -> policy, and whether an update is fitted in addition
    f"{name} + update" if updated else name: {"policy": name, "updated": updated}
    for name, policy in POLICIES.items()
    for updated in (True, False)
    if policy.mixed and (updated or not policy.fits_update)
}
PERIODS = range(2, 9)  # candidates for N
LEAST = 6  # calibration generations of which some can judge
BATCH = 8  # generations of a batch
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


def fit_to_model(
    pipe: Any,
    profile: Profile,
    schedule: Schedule,
    cost: CostModel,
    *,
    samples: int = SAMPLES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Schedule, np.ndarray]:
    """Returns the schedule with its update fitted closed loop, and each generation's distance to the full run, dB.

    A schedule of full steps alone is fitted in several forms and at several placements, and the best on calibration
    generations that the fits do not see is taken (`best_jumps`). Others: an update step after step (`fit_update`), on the
    profile's first calibration generations, all at once. Raises MismatchError if the schedule does not match the pipeline.
    """
    check_matches(pipe, schedule)
    if is_jumps_alone(schedule, profile.own_update()) and profile.manifest["samples"] >= LEAST:
        found, distances = best_jumps(pipe, profile, schedule, samples, on_progress)
    else:
        on_step = counted(2 * profile.sampler.steps, on_progress)
        replay = calibration_replay(pipe, profile, samples, on_step)
        found, distances = fit_update(replay, schedule, on_step)
    return with_predicted_cost(found, cost), distances


def best_jumps(
    pipe: Any, profile: Profile, schedule: Schedule, samples: int, on_progress: Callable[[int, int], None]
) -> tuple[Schedule, np.ndarray]:
    """Returns the schedule with the best jumps of those that compete, and their distances on the validation generations, dB.

    Two thirds of the first calibration generations, at most `samples`, are fitted on, the others judge: the schedule's own
    jumps, closed-loop fits in each form at its placement, and in the best form at the other placements of policy `solver`. One
    replaces the best so far if it is better in three of four resamplings of the generations.
    """
    sampler, request, own = profile.sampler, profile.manifest, jumps_of(schedule)
    first = min(samples, -(-2 * request["samples"] // 3))
    parts = in_batches(range(first), BATCH), in_batches(range(first, min(request["samples"], 2 * first)), BATCH)
    others = _other_placements(profile, own)
    fits = len(FORMS) + len(others)
    on_step = counted(sampler.steps * (len(parts[0]) + len(parts[1]) + fits), on_progress)
    decoder = decoder_of(pipe)
    decode = decoder or Tensor.float
    prompts, seed = request["prompts"], request["seed"]
    fitted, judged = (
        [
            Batch(
                Replay(pipe, sampler, [prompts[i % len(prompts)] for i in some], [seed + i for i in some], on_step),
                decode,
            )
            for some in part
        ]
        for part in parts
    )
    best, form, least = own, None, distances(own, judged)  # of the incumbent

    def judge(starts: Sequence[int], of: Form) -> None:
        nonlocal best, form, least
        found, _ = fit_jumps(fitted, starts, of)
        reached = distances(found, judged)
        if score_db(reached) > score_db(least) and sure_gain(reached, least) > 0:
            best, form, least = found, of, reached
        for _ in range(sampler.steps):
            on_step()

    forms = forms_of(fitted[0].replay, max(map(len, own.weights)) - 1)
    for one in forms:
        judge(own.starts, one)
    for starts in others:
        judge(starts, form or forms[0])
    if form is None:
        return schedule, least
    of = {
        "loop": "closed", "guidance_scale": sampler.guidance_scale, "seed": seed, "samples": first,
        "validated": sum(map(len, parts[1])), "error": "pictures" if decoder else "latents",
    }  # fmt: skip
    columns = "".join("C" if step in best.starts else "-" for step in range(sampler.steps))
    return best.written_to(with_columns(schedule, columns), of), least


def _other_placements(profile: Profile, own: Jumps) -> list[list[int]]:
    """Returns the placements of policy `solver` for as many full steps, apart from these; none without inner products."""
    if "gram" not in profile.manifest["tables"]:
        return []
    span = Span(profile.state_products(), profile.own_update(), profile.response())
    found = placements(span, len(own.starts), SolverKnobs())
    return [starts for starts in found if tuple(starts) != own.starts]


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
