"""True errors of many schedules: every family played on a replay, what schedules share at their beginning once."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sodaprof.compiler.fit import Span, Stepper, fit_open_loop
from sodaprof.compiler.forecasts import forecasts_at, ridge, sources_of
from sodaprof.compiler.problem import draw_schedule, draw_steps
from sodaprof.formats.files import read_json, write_json
from sodaprof.formats.profile import Profile
from sodaprof.formats.sampler import MAX_HISTORY
from sodaprof.formats.schedule import Schedule
from sodaprof.pipelines.replay import Replay, ReplaySpace
from sodaprof.runtime.hooks.cells import Cell
from sodaprof.tuning.closed_loop import attached, fidelity_db

FULL, IDLE = "C", "."  # of the columns that stand for a schedule: full steps, and those between them
SAVE_EVERY = 20.0  # seconds
State = TypeVar("State")


def columns_at(anchors: Iterable[int], steps: int) -> str:
    """Returns a schedule of full steps at `anchors` as one character a step."""
    some = set(anchors)
    return "".join(FULL if t in some else IDLE for t in range(steps))


def anchors_of(columns: str) -> list[int]:
    """Returns the full steps of such columns."""
    return [t for t, column in enumerate(columns) if column == FULL]


def random_columns(steps: int, count: int, longest: int, number: int, seed: int = 0) -> list[str]:
    """Returns `number` different schedules of `count` full steps, step 0 among them, intervals of at most `longest` steps.

    Uniform over all there are. Raises ValueError where a million draws do not find as many.
    """
    generator, found = random.Random(seed), dict[str, None]()
    for _ in range(1_000_000):
        if len(found) == number:
            return list(found)
        anchors = [0, *sorted(generator.sample(range(1, steps), count - 1))]
        if longest_interval(anchors, steps) <= longest:
            found[columns_at(anchors, steps)] = None
    raise ValueError(f"{len(found)} schedules found of the {number} asked for")


def every_column(steps: int, count: int) -> list[str]:
    """Returns all schedules of `count` full steps, the first and the last step among them."""
    inner = itertools.combinations(range(1, steps - 1), count - 2)
    return [columns_at((0, *some, steps - 1), steps) for some in inner]


def longest_interval(anchors: Sequence[int], steps: int) -> int:
    """Returns the steps from a full one to the next, or to the end, at most."""
    return max(b - a for a, b in itertools.pairwise([*anchors, steps]))


def walk(
    every: Iterable[str], start: Callable[[], State], advance: Callable[[State, int, str], State]
) -> Iterator[tuple[str, State]]:
    """Yields (columns, state after the last step), each schedule once, in sorted order.

    advance(state, step, columns) returns a new state and may depend on columns[: step + 1] alone: steps that a schedule
    shares with the one before it are not taken again.
    """
    before, states = "", [start()]
    for columns in sorted(set(every)):
        shared = next((t for t, (a, b) in enumerate(zip(before, columns, strict=False)) if a != b), len(before))
        del states[shared + 1 :]
        for step in range(shared, len(columns)):
            states.append(advance(states[-1], step, columns))
        before = columns
        yield columns, states[-1]


@dataclass
class Truths:
    """Distances to the full run in dB, by schedule, kept in a file as they are found. `about` says of what they are."""

    path: Path
    about: dict[str, Any]

    def __post_init__(self) -> None:
        self.found: dict[str, list[float]] = {}
        if self.path.exists() and (kept := read_json(self.path))["about"] == self.about:
            self.found = kept["found"]

    def gather(self, wanted: Sequence[str], some: Callable[[list[str]], Iterator[tuple[str, np.ndarray]]]) -> None:
        """Asks `some` for those of the wanted schedules that are missing; what is found outlives an interruption."""
        missing = [columns for columns in wanted if columns not in self.found]
        if not missing:
            return
        began = saved = time.monotonic()
        try:
            for done, (columns, distances) in enumerate(some(missing), 1):
                self.found[columns] = [round(float(d), 4) for d in distances]
                if time.monotonic() - saved > SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
                    print(f"{self.path.stem}: {done} of {len(missing)} in {saved - began:.0f} s", flush=True)
        finally:
            self._save()

    def _save(self) -> None:
        write_json(self.path, {"about": self.about, "found": self.found}, force=True)


def reused(replay: Replay, profile: Profile, every: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the distances of schedules that reuse every site between full steps, under the sampler's own steps."""
    own = replay.update
    rows = own.padded(own.history)
    any_reuse = draw_schedule(profile.model, profile.sampler, [0], {})
    with attached(replay, any_reuse) as handle:
        assert handle is not None
        stepper = Stepper(ReplaySpace(replay, handle.executor.clock), own.history)
        sites = handle.executor.rows

        def advance(state: Any, step: int, columns: str) -> Any:
            at, kept = state
            # the rows of all schedules one after the other: whatever is computed may be reused
            cells = tuple(Cell("R" if letter == IDLE else letter, keeps_cache=True) for letter in columns)
            for site, memory in zip(sites, kept, strict=True):
                site.cells = cells
                site.memory = memory
                site.memory = site.snapshot()  # what is written now is not the former state's
            at = stepper.moved(stepper.computed(at, step), step, rows[step])
            return at, [site.snapshot() for site in sites]

        begin = lambda: (stepper.start(), [{} for _ in sites])  # noqa: E731
        for columns, (at, _) in walk(every, begin, advance):
            yield columns, fidelity_db(at.x, replay)


def forecast(replay: Replay, profile: Profile, every: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the distances of schedules that forecast every site from its last two outputs, as policy `forecast` does."""
    own = replay.update
    rows = own.padded(own.history)
    ((name, products),) = profile.site_products().items()
    for columns in every:
        with attached(replay, forecast_schedule(profile, name, products, anchors_of(columns))) as handle:
            stepper = Stepper(ReplaySpace(replay, handle.executor.clock if handle else None), own.history)
            at = stepper.start()
            for step in range(replay.steps):
                at = stepper.moved(stepper.computed(at, step), step, rows[step])
        yield columns, fidelity_db(at.x, replay)


def forecast_schedule(profile: Profile, name: str, products: np.ndarray, anchors: list[int]) -> Schedule:
    """Returns the schedule of F cells between these full steps, weights as policy `forecast` with its own settings."""
    known = ~np.isnan(products).any(axis=0)
    cells = forecasts_at(products, sources_of(anchors, [range(len(known))], 2, known), ridge(1e-4))
    return draw_steps(profile.model, profile.sampler, {name: anchors}, "F", {name: cells})


def updated(replay: Replay, span: Span, every: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the distances of schedules without network between full steps, their update fitted open loop."""
    stepper = Stepper(ReplaySpace(replay), MAX_HISTORY)
    fits: dict[str, tuple[tuple[float, ...], ...]] = {}

    def advance(at: Any, step: int, columns: str) -> Any:
        if columns not in fits:
            fits.clear()
            fits[columns] = fit_open_loop(span, anchors_of(columns), MAX_HISTORY)[0]
        at = stepper.computed(at, step) if columns[step] == FULL else at
        return stepper.moved(at, step, fits[columns][step])

    for columns, at in walk(every, stepper.start, advance):
        yield columns, fidelity_db(at.x, replay)


def refitted(calibration: Replay, held_out: Replay, every: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the distances of the same, fitted closed loop: those of the held-out generations, then of those fitted on."""
    fitting, judging = (Stepper(ReplaySpace(one), MAX_HISTORY) for one in (calibration, held_out))

    def advance(state: Any, step: int, columns: str) -> Any:
        own, other = state
        if columns[step] == FULL:
            own, other = fitting.computed(own, step), judging.computed(other, step)
        row, own = fitting.fitted(own, step)
        return own, judging.moved(other, step, row)

    for columns, (own, other) in walk(every, lambda: (fitting.start(), judging.start()), advance):
        yield columns, np.concatenate([fidelity_db(other.x, held_out), fidelity_db(own.x, calibration)])
