"""`refine`: searches for better step placements from a schedule, then fits its update and network times jointly.

A candidate is fitted closed loop and scored on final latents. It replaces the incumbent if it is better in three of four
resamplings of the search generations, and is written if it is better on the validation generations too. A seed gives a fixed
sequence of candidates. The joint fit (`refine_jumps`) takes the best candidate if it has full and skipped steps alone.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..compiler.problem import cache_bytes, within
from ..errors import BudgetError, FormatError, SodaprofError, UnsupportedModelError
from ..formats.cost import CostModel
from ..formats.disk import locked
from ..formats.files import digest, encode, refuse_existing, write_json
from ..formats.schedule import Schedule
from ..formats.schedule_file import load_schedule
from ..formats.sites import Model
from ..pipelines.discover import inspect_pipeline
from ..pipelines.entries import check_entries, default_prompts
from ..pipelines.flops import count_flops
from ..pipelines.recording import stack_of
from ..pipelines.replay import Replay
from ..pipelines.sampler_steps import own_update
from ..runtime.checks import check_matches
from .closed_loop import Fit, sampled_distances, with_predicted_cost
from .jumps import in_batches, is_jumps_alone, score_db, sure_gain
from .refine_jumps import ITERATIONS, JointProgress, JumpRefinement
from .search_file import Progress, SearchFile, read_state, state_file
from .step_letters import columns_of, varied, with_columns

LEAST = 4  # calibration generations
OnProgress = Callable[[str, int, float], None]  # part, evaluations or iterations, score on the validation generations
SEARCH = 0.4  # of the time, for the search of placements if a joint fit follows
BATCH = 8  # generations of a batch of the joint fit
PATIENCE = 6  # improvements in a row that the validation generations do not confirm, then the search ends


@dataclass(frozen=True)
class Problem:
    """The schedule that a search begins with, and what bounds its candidates."""

    schedule: Schedule
    model: Model
    cost: CostModel
    budget: float  # in the unit of `cost`
    max_cache: float  # bytes
    fillers: str  # letters of steps that are not full
    joint: bool  # whether a joint fit follows

    def allows(self, columns: str) -> bool:
        """Whether a candidate costs and keeps no more than allowed."""
        candidate = with_columns(self.schedule, columns)
        affordable = within(self.cost.schedule(candidate), self.budget)
        return affordable and cache_bytes(candidate, self.model) <= self.max_cache


class Limits:
    """When a search and the joint fit after it end."""

    def __init__(self, seconds: float | None, evaluations: int | None, iterations: int) -> None:
        self.began, self.seconds = time.monotonic(), seconds
        self.evaluations, self.iterations = evaluations, iterations

    def in_time(self, share: float = 1.0) -> bool:
        return self.seconds is None or time.monotonic() - self.began < share * self.seconds


class CandidateFits:
    """Fits candidates closed loop on a replay, each from the first step at which it differs from the incumbent.

    Candidates whose sites reuse or forecast begin at step 0: the caches of sites are not kept for other fits.
    """

    def __init__(self, replay: Replay, schedule: Schedule) -> None:
        self.replay, self.schedule = replay, schedule
        self.incumbent: tuple[str, Fit] | None = None  # the columns and the fit that others continue
        self.latest: tuple[str, Fit] | None = None

    def evaluate(self, columns: str) -> tuple[Schedule, np.ndarray]:
        """Returns the fitted schedule of these columns and each generation's distance to the full run, dB."""
        resumable = set("RF").isdisjoint(columns)
        fit = Fit(self.replay, with_columns(self.schedule, columns), resumable)
        if resumable and self.incumbent is not None:
            known, known_fit = self.incumbent
            if "S" in known or "S" not in columns:  # else its fit kept no sources for the stack
                pairs = enumerate(zip(columns, known, strict=True))
                fit.resume_from(known_fit, next((step for step, (a, b) in pairs if a != b), len(columns)))
        distances = fit.run()
        self.latest = (columns, fit) if resumable else None
        self.incumbent = self.incumbent or self.latest
        return fit.fitted(), distances

    def accept_latest(self) -> None:
        """Makes the latest candidate the incumbent if other fits can continue it."""
        self.incumbent = self.latest or self.incumbent


class Search:
    """A search under way: evaluates one candidate a step, keeps its file and the best schedule's up to date."""

    def __init__(
        self, problem: Problem, output: Path, request: str, knobs: dict[str, Any], replays: list[Replay]
    ) -> None:
        """knobs: added to the policy's; request: digest of all settings; replays: of the search and validation generations."""
        self.problem, self.output, self.request, self.knobs = problem, output, request, knobs
        searched, self.validated = replays
        self.fits = CandidateFits(searched, problem.schedule)
        self.generator = random.Random(knobs["refine_seed"])
        self.joint: JointProgress | None = None

    def open(self, state: SearchFile | None, force: bool) -> None:
        """Begins with the schedule, or continues from a state, and writes the best schedule so far.

        force: whether an older file at the output may be replaced at the beginning.
        """
        if state is None:
            columns = columns_of(self.problem.schedule)
            best, self.distances = self.fits.evaluate(columns)
            scores, known = (score_db(self.distances), self._validation_score(best)), self.generator.getstate()
            self.progress = Progress(0, columns, scores[0], columns, scores[1], 0, 0, [columns], known)
            self.save()  # ahead of `output`, which is written again if the search is interrupted in between
        else:
            self.progress, self.joint = state.search, state.joint
            self.generator.setstate(self.progress.generator)
            _, self.distances = self.fits.evaluate(self.progress.columns)
            best, _ = self.fits.evaluate(self.progress.best)
            if not force and os.path.lexists(self.output) and not self._wrote(self.output):
                raise FormatError(
                    f"{self.output}: is not the file of the search that would continue. Move it away, choose another name, or "
                    "add --force to replace it."
                )
        self.placed = best  # what a joint fit begins with
        if self.joint is not None and os.path.lexists(self.output):
            self.best = load_schedule(self.output)
            self.known = set(self.progress.tried)
            return
        try:
            self.best = self._write(best, force or state is not None)
        except FormatError:  # a file that has appeared at the output stays
            state_file(self.output).unlink()
            raise
        self.known = set(self.progress.tried)

    def step(self) -> bool:
        """Evaluates one more candidate; returns False if there is none, or too many improvements were not confirmed."""
        now, problem = self.progress, self.problem
        if now.misses >= PATIENCE:
            return False
        candidate = varied(now.columns, self.generator, self.known, problem.fillers, problem.allows)
        if candidate is None:
            return False
        self.known.add(candidate)
        now.tried.append(candidate)
        now.evaluations += 1
        now.generator = self.generator.getstate()
        fitted, distances = self.fits.evaluate(candidate)
        if score_db(distances) > now.score and sure_gain(distances, self.distances) > 0:
            self.fits.accept_latest()
            now.columns, now.score, self.distances = candidate, score_db(distances), distances
            held_out = self._validation_score(fitted)
            now.misses += 1
            if held_out > now.best_score:
                now.best, now.best_score, now.best_at, now.misses = candidate, held_out, now.evaluations, 0
                self.joint = None
                self.placed, self.best = fitted, self._write(fitted)
        self.save()
        return True

    def save(self) -> None:
        content = encode(self.progress), encode(self.joint)
        state = SearchFile(self.request, digest(content), self.progress, self.joint)
        write_json(state_file(self.output), state.to_json(), force=True)

    def place(self, limits: Limits, on_progress: OnProgress) -> None:
        """Searches for placements up to the limits."""
        while True:
            now = self.progress
            on_progress("placements", now.evaluations, now.best_score)
            enough = limits.evaluations is not None and now.evaluations >= limits.evaluations
            if enough or not limits.in_time(SEARCH if self.problem.joint else 1.0) or not self.step():
                return

    def fit_jointly(self, refinement: JumpRefinement, limits: Limits, on_progress: OnProgress) -> None:
        """Fits the best placement jointly, and writes the schedule whenever a better one is found."""
        best = None if self.joint is None else self.joint.best_score
        for now in refinement.run(self.joint, limits.iterations, limits.in_time):
            self.joint = now
            if best is None or now.best_score > best:
                best = now.best_score
                self.best = self._write(refinement.best(now))
            self.save()
            on_progress("jumps", now.validated, now.best_score)

    def _wrote(self, path: Path) -> bool:
        """Whether a file is a schedule of this search."""
        try:
            knobs = load_schedule(path).policy["knobs"]
        except SodaprofError:
            return False
        found = {**knobs, "refined": 0, "joint": ""}
        return bool(found == self.problem.schedule.policy["knobs"] | self.knobs | {"refined": 0, "joint": ""})

    def _validation_score(self, fitted: Schedule) -> float:
        return score_db(sampled_distances(self.validated, fitted))

    def _write(self, best: Schedule, force: bool = True) -> Schedule:
        """Returns the schedule that it writes to the output: `best` with its cost and where it comes from."""
        own = self.problem.schedule.policy
        fitted = best.update.fitted if best.update else {}
        joint = {"joint": fitted["error"]} if fitted.get("loop") == "joint" else {}
        knobs = own["knobs"] | {"refined": self.progress.best_at} | self.knobs | joint
        best = with_predicted_cost(replace(best, policy=own | {"knobs": knobs}), self.problem.cost)
        kept = {"cache_bytes": cache_bytes(best, self.problem.model)}
        best = replace(best, predicted=(best.predicted or {}) | kept)
        best.save(self.output, force=force)
        return best


def refine(
    pipe: Any,
    schedule: Schedule,
    output: str | Path,
    *,
    seconds: float | None = None,
    evaluations: int | None = None,
    samples: int = 40,
    seed: int = 0,
    prompts: Sequence[int | str] | None = None,
    cost: CostModel | None = None,
    max_cache: int | None = None,
    force: bool = False,
    method: str = "auto",
    iterations: int = ITERATIONS,
    on_progress: OnProgress = lambda part, done, validation_db: None,
) -> Schedule:
    """Searches from `schedule` and returns the best one found; `output` always holds the best so far.

    seconds, evaluations: end of the search of placements, whichever is first; the joint fit takes the last three fifths of the
    time. The same call continues what was interrupted. samples: calibration generations, three quarters to search on
    and the rest to validate. method: of the joint fit, one of METHODS; `auto`: Adam, or Gauss-Newton where the network has
    no backward pass. iterations: of Adam. cost: unit of the budget, by default FLOPs; no candidate costs more than
    `schedule` with a fitted update. max_cache: bytes that the caches of one generation may take. on_progress gets the part
    (`placements`, of latents; `jumps`, of pictures), evaluations or iterations, and the score on the validation generations.
    Raises what `check_search` does, BudgetError for a schedule that keeps more than max_cache, MismatchError if the schedule does
    not match the pipeline or a search with other settings is under way.
    """
    check_search(schedule, seconds, evaluations, samples)
    check_matches(pipe, schedule)
    if not state_file(output := Path(output)).exists():
        refuse_existing(output, force)
    entries = check_entries(pipe, default_prompts(pipe) if prompts is None else prompts)
    profile = schedule.profile or {"seed": 0, "samples": samples}
    samples = min(samples, profile["samples"])
    problem = _problem(pipe, schedule, entries[0], cost, math.inf if max_cache is None else max_cache, method)
    request = digest({
        "schedule": schedule.digest(), "samples": samples, "seed": seed, "prompts": list(map(str, entries)),
        "cost": digest(problem.cost.to_json()), "max_cache": max_cache, "method": method, "iterations": iterations,
    })  # fmt: skip
    first = samples - max(1, samples // 4)  # of the validation generations
    parts = range(first), range(first, samples)

    def replay_of(part: Sequence[int]) -> Replay:
        seeds = [profile["seed"] + i for i in part]
        return Replay(pipe, schedule.sampler, [entries[i % len(entries)] for i in part], seeds)

    with locked(output.with_name(f".{output.name}.lock")):
        state = read_state(state_file(output), request)
        if state is None:
            refuse_existing(output, force)
        limits, knobs = Limits(seconds, evaluations, iterations), {"refine_seed": seed, "refine_samples": samples}
        search = Search(problem, output, request, knobs, [replay_of(part) for part in parts])
        search.open(state, force)
        search.place(limits, on_progress)
        if problem.joint and limits.in_time():
            batches = [[replay_of(some) for some in in_batches(part, BATCH)] for part in parts]
            refinement = JumpRefinement(pipe, search.placed, schedule, batches, method, seed)
            search.fit_jointly(refinement, limits, on_progress)
        return search.best


def _problem(
    pipe: Any, schedule: Schedule, entry: int | str, cost: CostModel | None, max_cache: float, method: str
) -> Problem:
    """Returns the problem of a search; cost: FLOPs by default. method: of a joint fit, for which steps stay full or skipped.

    Raises BudgetError if the schedule keeps too much.
    """
    sampler = schedule.sampler
    model, _, step = inspect_pipeline(pipe, "", sampler.steps, sampler.guidance_scale, entry)
    columns, cost = columns_of(schedule), cost or count_flops(pipe, model, step)
    (name,) = schedule.transformers
    has_stack = stack_of(pipe, name, model.transformers[name], step) is not None
    first = with_columns(schedule, columns)
    kept = cache_bytes(first, model)
    if kept > max_cache:
        raise BudgetError(
            f"The caches of one generation take {kept:,} bytes under the schedule to begin with, its fitted update included; at "
            f"most {max_cache:,} are allowed (--max-cache). Allow as much, or begin with a schedule that keeps less."
        )
    joint = method != "none" and is_jumps_alone(schedule, own_update(pipe.scheduler, pipe.scheduler.timesteps))
    if method in ("adam", "gauss-newton") and not joint:
        raise UnsupportedModelError(
            "A joint fit takes full and skipped steps alone, and a sampler that draws no noise. Leave --method out, or give a "
            "schedule of --policy solver."
        )
    fillers = "-" if joint else "-R" + "S" * has_stack + "F" * ("F" in columns)
    return Problem(schedule, model, cost, cost.schedule(first), max_cache, fillers, joint)


def kept_bytes(schedule: Schedule, samples: int) -> int:
    """Returns the bytes of the latents and outputs of all generations at all steps that `refine` keeps, for both of its parts."""
    return 2 * samples * (2 * schedule.steps + 1) * math.prod(schedule.shape["latent"]) * 4


def check_search(schedule: Schedule, seconds: float | None, evaluations: int | None, samples: int) -> None:
    """Raises what `refine` raises without looking at the model."""
    if seconds is None and evaluations is None:
        raise BudgetError("A search needs an end. Give --time 5m, or --evaluations 200.")
    if evaluations is not None and evaluations < 0:
        raise BudgetError(f"--evaluations is {evaluations}; expected 0 (fit, search nothing) or more.")
    if samples < LEAST:
        raise BudgetError(f"--samples is {samples}; expected at least {LEAST}: three quarters are for the search.")
    if schedule.profile is not None and schedule.profile["samples"] < LEAST:
        raise BudgetError(
            f"The schedule's profile has {schedule.profile['samples']} calibration generations; a search takes at least {LEAST}. "
            f"Profile and compile again, with --samples {LEAST} or more."
        )
    columns_of(schedule)
