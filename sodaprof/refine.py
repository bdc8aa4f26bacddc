"""`refine`: searches a schedule's full steps and what stands between them on the final error of the model's own generations.

Every candidate is fitted closed loop on one part of the calibration generations and judged by their last latents, mean and
worst decile alike; what is better there is written only where it is better on the other part too. A fixed sequence of
candidates for a seed: more time only means more of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .closed_loop import fidelity_db, fit_update, joint, play, priced, with_update
from .cost import CostModel
from .errors import BudgetError, FormatError, MismatchError, UnsupportedModelError
from .files import digest, read_json, refuse_existing, write_json
from .models.discover import inspect_pipeline
from .models.flops import count_flops
from .models.load import default_prompts
from .models.replay import Replay
from .models.stepper import At, Stepper
from .schedule import Plan, Schedule, Update
from .updates import MAX_HISTORY

FORMAT, VERSION = "sodaprof.refine", 1
REACH = (-3, -2, -1, 1, 2, 3)  # steps by which a full step may move
PATIENCE = 6  # improvements in a row that the validation generations do not share, then the search ends
KEPT = {"C": ".", "R": ".", "-": "-"}  # a column's action -> the stack's


@dataclass
class Search:
    """How far a search is; what its file holds."""

    evaluations: int
    columns: str  # of the incumbent: one action a step for all sites
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
    force: bool = False,
    on_progress: Callable[[int, float, float], None] = lambda done, search, held: None,
) -> Schedule:
    """Searches from `schedule` and returns the best one found, which `output` holds since it was found.

    seconds, evaluations: where the search ends, whichever is first; the same call goes on with a search that was cut short.
    samples: calibration generations, three quarters to search on and the rest to validate. cost: what the budget is counted
    in, by default FLOPs; no candidate costs more than `schedule`. on_progress is given (evaluations, dB on the search
    generations, dB on the validation generations). Raises BudgetError for settings without an end, UnsupportedModelError
    for schedules that are no columns of full, reused and skipped steps.
    """
    output = Path(output)
    state = output.with_name(output.name + ".search")
    if seconds is None and evaluations is None:
        raise BudgetError("A search needs an end. Give --time 5m, or --evaluations 200.")
    if samples < 4:
        raise BudgetError(f"--samples is {samples}; expected at least 4, three quarters of which are searched on.")
    columns = columns_of(schedule)
    entries = default_prompts(pipe) if prompts is None else list(prompts)
    profile = schedule.profile or {"seed": 0, "samples": samples}
    samples = min(samples, profile["samples"])
    sampler = schedule.sampler
    request = digest({
        "schedule": schedule.digest(), "samples": samples, "seed": seed, "prompts": list(map(str, entries)),
    })  # fmt: skip
    found = _resumed(state, request)
    if found is None:
        refuse_existing(output, force)
    costs = cost or _flops(pipe, schedule, entries[0])
    began = time.monotonic()
    cut = max(1, samples // 4)
    parts = (range(samples - cut), range(samples - cut, samples))
    searched, validated = (
        Replay(
            pipe, sampler, [entries[i % len(entries)] for i in part], [profile["seed"] + i for i in part]
        )
        for part in parts
    )  # fmt: skip
    bench = Bench(searched, schedule, schedule.update.history if schedule.update else MAX_HISTORY)
    allowed = costs.schedule(schedule)

    def written(best: Schedule, done: int) -> Schedule:
        searched_for = {"refined": done, "refine_seed": seed, "refine_samples": samples}
        policy = schedule.policy | {"knobs": schedule.policy["knobs"] | searched_for}
        signed = priced(replace(best, policy=policy), costs)
        signed.save(output, force=True)
        return signed

    generator = random.Random(seed)
    if found is None:
        first, score = bench.evaluate(columns)
        held = joint(play(validated, first))
        found = Search(0, columns, score, columns, held, 0, 0, [columns], _to_json(generator))
        best = written(first, 0)
        _save(state, request, found)
    else:
        generator.setstate(_from_json(found.generator))
        bench.evaluate(found.columns)
        best = written(bench.evaluate(found.best)[0], found.best_at)
    on_progress(found.evaluations, found.score, found.best_score)
    known = set(found.tried)
    while found.misses < PATIENCE:
        if evaluations is not None and found.evaluations >= evaluations:
            break
        if seconds is not None and time.monotonic() - began >= seconds:
            break
        candidate = proposed(found.columns, generator, known)
        if candidate is None:
            break
        known.add(candidate)
        found.tried.append(candidate)
        found.evaluations += 1
        found.generator = _to_json(generator)
        if costs.schedule(drawn(schedule, candidate)) <= allowed * (1 + 1e-9):
            fitted, score = bench.evaluate(candidate)
            if score > found.score:
                bench.settle(candidate)
                found.columns, found.score = candidate, score
                held = joint(play(validated, fitted))
                found.misses += 1
                if held > found.best_score:
                    found.best, found.best_score, found.misses = candidate, held, 0
                    found.best_at = found.evaluations
                    best = written(fitted, found.best_at)
        _save(state, request, found)
        on_progress(found.evaluations, found.score, found.best_score)
    return best


class Bench:
    """Fits candidates closed loop on a replay, from the first step in which they differ from the one settled on."""

    def __init__(self, replay: Replay, schedule: Schedule, history: int) -> None:
        self.replay, self.schedule, self.history = replay, schedule, history
        self.stepper = Stepper(replay, history)
        self.known: dict[str, tuple[list[At], list[tuple[float, ...]]]] = {}  # columns -> the run before each step
        self.settled = ""

    def evaluate(self, columns: str) -> tuple[Schedule, float]:
        """Returns the fitted schedule of these columns and its score on the replay's generations, dB."""
        schedule = drawn(self.schedule, columns)
        if "R" in columns:  # caches would have to be taken up, too: from the start
            fitted, distances = fit_update(self.replay, schedule, self.history)
            return fitted, joint(distances)
        ats, rows = self.known.get(self.settled, ([self.stepper.start()], []))
        same = next((i for i, (a, b) in enumerate(zip(columns, self.settled, strict=False)) if a != b), 0)
        ats, rows = ats[: same + 1], rows[:same]
        for step in range(same, self.replay.steps):
            at = ats[-1]
            if columns[step] == "C":
                at = self.stepper.computed(at, step)
            row, at = self.stepper.fitted(at, step)
            rows.append(row)
            ats.append(at)
        self.known = {self.settled: self.known.get(self.settled, (ats, rows)), columns: (ats, rows)}
        if not self.settled:
            self.settle(columns)
        return with_update(self.replay, schedule, self.history, rows), joint(fidelity_db(ats[-1].x, self.replay))

    def settle(self, columns: str) -> None:
        """Makes these columns, evaluated last, the ones that others are taken up from."""
        if columns in self.known:
            self.settled = columns
            self.known = {columns: self.known[columns]}


def columns_of(schedule: Schedule) -> str:
    """Returns the action of each step, C, R or -; UnsupportedModelError where a step mixes others."""
    if len(schedule.transformers) != 1:
        raise UnsupportedModelError("refine takes schedules of one transformer. Use the schedule as it was compiled.")
    (plan,) = schedule.transformers.values()
    columns = ["".join(sorted(set(cells))) for cells in zip(*plan.rows.values(), strict=True)]
    odd = next((t for t, column in enumerate(columns) if column not in KEPT or plan.stack[t] not in ".-"), None)
    if odd is not None:
        raise UnsupportedModelError(
            f"refine moves whole steps that compute, reuse or skip; step {odd} holds {columns[odd]} (stack "
            f"{plan.stack[odd]}). Give a schedule of --policy solver, soda --knob uas=none or fora."
        )
    return "".join(columns)


def drawn(schedule: Schedule, columns: str) -> Schedule:
    """Returns the schedule with these columns in place of its own, its update as a place holder."""
    ((name, plan),) = schedule.transformers.items()
    stack = "".join(KEPT[action] for action in columns)
    new = Plan(plan.class_name, plan.fingerprint, dict.fromkeys(plan.rows, columns), stack)
    still = Update("output", 1, ((1.0, 0.0),) * len(columns), {})
    return replace(schedule, transformers={name: new}, token_rule=None, update=schedule.update or still, measured=())


def proposed(columns: str, generator: random.Random, known: set[str]) -> str | None:
    """Returns columns not tried before: a full step moved, or exchanged for another place, or reuse in place of a skipped one."""
    for _ in range(10_000):
        cells = list(columns)
        full = [t for t, action in enumerate(cells) if action == "C" and t]
        others = [t for t, action in enumerate(cells) if action != "C"]
        if not full or not others:
            return None
        kind = generator.random()
        if kind < 0.15:
            at = generator.choice(others)
            cells[at] = "R" if cells[at] == "-" else "-"
        else:
            at = generator.choice(full)
            to = generator.choice(others) if kind < 0.3 else at + generator.choice(REACH)
            if not 0 < to < len(cells) or cells[to] == "C":
                continue
            cells[at], cells[to] = cells[to], cells[at]
        found = "".join(cells)
        if found not in known:
            return found
    return None


def _flops(pipe: Any, schedule: Schedule, entry: int | str) -> CostModel:
    sampler = schedule.sampler
    model, _, step = inspect_pipeline(pipe, "", sampler.steps, sampler.guidance_scale, entry)
    return count_flops(pipe, model, step)


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
