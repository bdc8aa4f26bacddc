"""`refine`: searches a schedule's full steps and what stands between them on the final error of the model's own generations.

Every candidate is fitted closed loop on one part of the calibration generations and judged by their last latents, mean and
worst decile alike. It takes the incumbent's place where it is better in three of four draws of these generations, for few of
them tell little; and it is written where it is better on the other part too. A fixed sequence of candidates for a seed: more
time only means more of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..compiler.problem import cache_bytes, within
from ..errors import BudgetError, FormatError, MismatchError
from ..formats.cost import CostModel
from ..formats.files import digest, read_json, refuse_existing, write_json
from ..formats.schedule import Schedule
from ..pipelines.discover import inspect_pipeline
from ..pipelines.flops import count_flops
from ..pipelines.load import default_prompts
from ..pipelines.replay import Replay
from ..pipelines.stack import stack_of
from ..runtime.checks import check_fits
from .closed_loop import Fit, joint, play, priced
from .columns import columns_of, drawn, proposed

FORMAT, VERSION = "sodaprof.refine", 2
CHANCE = 25  # percentile of the draws at which a candidate must gain
DRAWS = 1000
LEAST = 4  # calibration generations
PATIENCE = 6  # improvements in a row that the validation generations do not share, then the search ends


@dataclass
class Search:
    """How far a search is; what its file holds."""

    evaluations: int
    columns: str  # of the incumbent: one letter a step, as `columns` has them
    score: float  # of the incumbent on the search generations, dB
    best: str
    best_score: float  # on the validation generations
    best_at: int  # after so many evaluations
    misses: int  # improvements since, that validation did not share
    tried: list[str]
    generator: list[Any]  # of random numbers


def refine(
    pipe: Any,
    schedule: Schedule,
    output: str | Path,
    *,
    seconds: float | None = None,
    evaluations: int | None = None,
    samples: int = 24,
    seed: int = 0,
    prompts: Sequence[int | str] | None = None,
    cost: CostModel | None = None,
    max_cache: int | None = None,
    force: bool = False,
    on_progress: Callable[[int, float, float], None] = lambda done, search, held: None,
) -> Schedule:
    """Searches from `schedule` and returns the best one found, which `output` holds since it was found.

    seconds, evaluations: where the search ends, whichever is first; the same call goes on with a search that was cut short.
    samples: calibration generations, three quarters to search on and the rest to validate. cost: what the budget is counted
    in, by default FLOPs; no candidate costs more than `schedule` with a fitted update. max_cache: bytes that the caches of one
    generation may take. on_progress is given (evaluations, dB on the search generations, dB on the validation generations).
    Raises BudgetError for settings without an end or a schedule that keeps more than max_cache, UnsupportedModelError for
    schedules that are no columns of full, reused, forecast and skipped steps, MismatchError where the pipeline is another one.
    """
    output = Path(output)
    state = output.with_name(output.name + ".search")
    columns = check_search(schedule, seconds, evaluations, samples)
    check_fits(pipe, schedule)
    entries = default_prompts(pipe) if prompts is None else list(prompts)
    profile = schedule.profile or {"seed": 0, "samples": samples}
    samples = min(samples, profile["samples"])
    sampler, first = schedule.sampler, drawn(schedule, columns)
    model, _, step = inspect_pipeline(pipe, "", sampler.steps, sampler.guidance_scale, entries[0])
    costs = cost or count_flops(pipe, model, step)
    (name,) = schedule.transformers
    stacked = stack_of(pipe, name, model.transformers[name], step) is not None
    idle = "-R" + "S" * stacked + "F" * ("F" in columns)
    budget, kept = costs.schedule(first), cache_bytes(first, model)
    if max_cache is not None and kept > max_cache:
        raise BudgetError(
            f"The caches of one generation take {kept:,} bytes under the schedule to begin with, its fitted update included; at "
            f"most {max_cache:,} are allowed (--max-cache). Allow as much, or begin with a schedule that keeps less."
        )
    request = digest({
        "schedule": schedule.digest(), "samples": samples, "seed": seed, "prompts": list(map(str, entries)),
        "cost": digest(costs.to_json()), "max_cache": max_cache,
    })  # fmt: skip
    found = _resumed(state, request)
    if found is None:
        refuse_existing(output, force)
    began = time.monotonic()
    cut = max(1, samples // 4)
    parts = (range(samples - cut), range(samples - cut, samples))
    searched, validated = (
        Replay(
            pipe, sampler, [entries[i % len(entries)] for i in part], [profile["seed"] + i for i in part]
        )
        for part in parts
    )  # fmt: skip
    bench = Bench(searched, schedule)

    def allowed(candidate: str) -> bool:
        one = drawn(schedule, candidate)
        return within(costs.schedule(one), budget) and (max_cache is None or cache_bytes(one, model) <= max_cache)

    def written(best: Schedule, done: int) -> Schedule:
        searched_for = {"refined": done, "refine_seed": seed, "refine_samples": samples}
        policy = schedule.policy | {"knobs": schedule.policy["knobs"] | searched_for}
        signed = priced(replace(best, policy=policy), costs)
        signed = replace(signed, predicted=(signed.predicted or {}) | {"cache_bytes": cache_bytes(signed, model)})
        signed.save(output, force=True)
        return signed

    generator = random.Random(seed)
    if found is None:
        fitted, distances = bench.evaluate(columns)
        held = joint(play(validated, fitted))
        found = Search(0, columns, joint(distances), columns, held, 0, 0, [columns], _to_json(generator))
        _save(state, request, found)  # first: where it stands the search goes on, and `output` is written again
        best = written(fitted, 0)
    else:
        generator.setstate(_from_json(found.generator))
        _, distances = bench.evaluate(found.columns)
        best = written(bench.evaluate(found.best)[0], found.best_at)
    on_progress(found.evaluations, found.score, found.best_score)
    known = set(found.tried)
    while found.misses < PATIENCE:
        if evaluations is not None and found.evaluations >= evaluations:
            break
        if seconds is not None and time.monotonic() - began >= seconds:
            break
        candidate = proposed(found.columns, generator, known, idle, allowed)
        if candidate is None:
            break
        known.add(candidate)
        found.tried.append(candidate)
        found.evaluations += 1
        found.generator = _to_json(generator)
        fitted, reached = bench.evaluate(candidate)
        if joint(reached) > found.score and surely_gained(reached, distances) > 0:
            bench.settle(candidate)
            found.columns, found.score, distances = candidate, joint(reached), reached
            held = joint(play(validated, fitted))
            found.misses += 1
            if held > found.best_score:
                found.best, found.best_score, found.misses = candidate, held, 0
                found.best_at = found.evaluations
                best = written(fitted, found.best_at)
        _save(state, request, found)
        on_progress(found.evaluations, found.score, found.best_score)
    return best


def check_search(schedule: Schedule, seconds: float | None, evaluations: int | None, samples: int) -> str:
    """Returns the columns that a search would begin with; raises, as `refine`, where no model is needed to refuse it."""
    if seconds is None and evaluations is None:
        raise BudgetError("A search needs an end. Give --time 5m, or --evaluations 200.")
    if evaluations is not None and evaluations < 0:
        raise BudgetError(f"--evaluations is {evaluations}; expected 0 (fit, search nothing) or more.")
    if samples < LEAST:
        raise BudgetError(
            f"--samples is {samples}; expected at least {LEAST}, three quarters of which are searched on."
        )
    if schedule.profile is not None and schedule.profile["samples"] < LEAST:
        raise BudgetError(
            f"The schedule's profile has {schedule.profile['samples']} calibration generations; a search takes at least {LEAST}. "
            f"Profile and compile again, with --samples {LEAST} or more."
        )
    return columns_of(schedule)


class Bench:
    """Fits candidates closed loop on a replay, from the first step in which they differ from the one settled on."""

    def __init__(self, replay: Replay, schedule: Schedule) -> None:
        self.replay, self.schedule = replay, schedule
        self.known: dict[str, Fit] = {}  # columns -> a fit that others can begin in the midst of
        self.settled = ""

    def evaluate(self, columns: str) -> tuple[Schedule, np.ndarray]:
        """Returns the fitted schedule of these columns and each generation's distance to the full run, dB."""
        schedule = drawn(self.schedule, columns)
        assert schedule.update is not None  # drawn() gives it one
        caches = not set("RF").isdisjoint(columns)  # which would have to be taken up, too: from the start
        fit = Fit(self.replay, schedule, schedule.update.history, resumable=not caches)
        settled = self.known.get(self.settled)
        if settled is not None and not caches and ("S" in self.settled or "S" not in columns):
            same = next((i for i, (a, b) in enumerate(zip(columns, self.settled, strict=True)) if a != b), len(columns))
            fit.follow(settled, same)
        distances = fit.run()
        if not caches:
            self.known = {name: one for name, one in self.known.items() if name == self.settled} | {columns: fit}
            if not self.settled:
                self.settle(columns)
        return fit.fitted(), distances

    def settle(self, columns: str) -> None:
        """Makes these columns, evaluated last, the ones that others are taken up from."""
        if columns in self.known:
            self.settled = columns
            self.known = {columns: self.known[columns]}


def surely_gained(candidate: np.ndarray, incumbent: np.ndarray) -> float:
    """Returns what a candidate gains over the incumbent in three of four draws of the generations, with repetition, dB.

    candidate, incumbent: each generation's distance to the full run.
    """
    draws = np.random.default_rng(0).integers(len(candidate), size=(DRAWS, len(candidate)))
    gains = [joint(candidate[some]) - joint(incumbent[some]) for some in draws]
    return float(np.percentile(gains, CHANCE))


def _resumed(path: Path, request: str) -> Search | None:
    """Returns the search that a file holds; None where there is none, MismatchError where it is of another request."""
    if not path.exists():
        return None
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise FormatError(f"{path}: not the state of a search of this release. Delete it to search anew.")
    if data.get("request") != request:
        raise MismatchError(
            f"{path}: a search from another schedule or with other settings is there. Repeat its settings to go on with it, "
            "or delete it to search anew."
        )
    return Search(**data["search"])


def _save(path: Path, request: str, search: Search) -> None:
    write_json(path, {"format": FORMAT, "version": VERSION, "request": request, "search": vars(search)}, force=True)


def _to_json(generator: random.Random) -> list[Any]:
    version, state, gauss = generator.getstate()
    return [version, list(state), gauss]


def _from_json(state: list[Any]) -> tuple[Any, ...]:
    return state[0], tuple(state[1]), state[2]
