"""`benchmark`: how long the denoising loop takes, plain, computing everything here, and under each schedule.

All contenders run in turn, round after round, so that drifts of the machine hit all alike. Times are of the loop: the
transformer's calls, guidance and scheduler. On a GPU they come from events, without host syncs inside the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..compiler.problem import draw_schedule
from ..errors import SodaprofError
from ..formats.schedule import Schedule
from ..formats.sites import Model, Sampler
from ..pipelines.device import device_facts, launches_of, versions
from ..pipelines.discover import inspect_pipeline
from ..pipelines.entries import any_entries
from ..pipelines.load import call, transformers_of
from ..pipelines.patch import patched
from ..runtime.apply import Handle, apply
from ..runtime.compiled.engine import Compiled

WARM_UP = 3  # runs: the first traces and records the timesteps, the second fills the tables, the third captures
RUNTIMES: dict[str, str | Compiled] = {  # name of a row of `benchmark` -> runtime of `apply`
    "hooks": "hooks",
    "lowered": Compiled(tables=False),
    "tables": Compiled(graphs=False),
    "captured": Compiled(),
    "whole steps": Compiled(whole_steps=True),
}


@dataclass(frozen=True)
class Work:
    """What every contender samples: so many steps of these entries, from the seeds 0, 1, …"""

    pipe: Any
    entries: Sequence[int | str]
    steps: int
    guidance_scale: float | None

    @property
    def cuda(self) -> bool:
        return "cuda" in str(getattr(self.pipe, "device", "cpu"))

    def run(self) -> None:
        call(self.pipe, self.entries, range(len(self.entries)), self.steps, self.guidance_scale, output_type="latent")


def work_of(
    pipe: Any, prompts: Sequence[int | str] | None, batch_size: int, rounds: int, steps: int, scale: float | None
) -> Work:
    """Returns the work of a batch of the prompts, the model's own by default. Raises SodaprofError if nothing would be timed."""
    for option, value in (("--rounds", rounds), ("--batch-size", batch_size)):
        if value < 1:
            raise SodaprofError(f"{option} is {value}; expected at least 1.")
    pool = any_entries(pipe) if prompts is None else list(prompts)
    return Work(pipe, [pool[i % len(pool)] for i in range(batch_size)], steps, scale)


@dataclass
class Timings:
    """One contender's times in ms: a run each, of every step."""

    name: str
    schedule: Schedule | None = None
    handle: Handle | None = None
    transformer: list[np.ndarray] = field(default_factory=list)  # [T] a run
    scheduler: list[np.ndarray] = field(default_factory=list)  # [T] a run
    loop: list[float] = field(default_factory=list)
    warm_up_s: float = 0.0  # seconds of the runs before: tracing included
    launches: list[int] = field(default_factory=list)  # of each step: kernels on a GPU, operators elsewhere
    peak_bytes: int | None = None  # of GPU memory, weights included; None elsewhere

    def median_ms(self) -> float:
        return float(np.median(self.loop))

    def add(self, marks: list[tuple[str, float]], steps: int) -> None:
        """Adds a run; marks: what `marked` yields."""
        transformer, scheduler, step = np.zeros(steps), np.zeros(steps), 0
        for (part, start), (_, end) in zip(marks[::2], marks[1::2], strict=True):
            if part == "transformer":
                transformer[step] += end - start
            else:
                scheduler[step] = end - start
                step += 1
        self.transformer.append(transformer)
        self.scheduler.append(scheduler)
        self.loop.append(marks[-1][1])


def timings_of(pipe: Any, name: str, schedule: Schedule, runtime: str) -> Timings:
    """Returns a contender without times, under a name of RUNTIMES; its schedule is off until it runs."""
    handle = apply(pipe, schedule, runtime=RUNTIMES[runtime])
    handle.remove()
    return Timings(name, schedule, handle)


@contextmanager
def marked(work: Work) -> Iterator[list[tuple[str, float]]]:
    """Yields a list that holds, after the run inside, a start and an end of every transformer call and scheduler step.

    Each is ("transformer" or "scheduler", ms since the first). On a GPU they are events of its stream.
    """
    marks: list[tuple[str, Any]] = []
    cuda = work.cuda  # once: diffusers searches all modules for the device

    def mark(part: str) -> None:
        if cuda:
            marks.append((part, torch.cuda.Event(enable_timing=True)))
            marks[-1][1].record()
        else:
            marks.append((part, time.perf_counter()))

    def timed(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mark("scheduler")
        result = step(*args, **kwargs)
        mark("scheduler")
        return result

    with around_calls(work.pipe, lambda: mark("transformer")), patched(work.pipe.scheduler, "step", timed):
        yield marks
    start = marks[0][1]
    if cuda:
        torch.cuda.synchronize()
    marks[:] = [(part, start.elapsed_time(at) if cuda else (at - start) * 1e3) for part, at in marks]


@contextmanager
def around_calls(pipe: Any, mark: Callable[[], None]) -> Iterator[None]:
    """Calls `mark` before and after every call of a transformer while the block runs."""
    with ExitStack() as hooks:
        for transformer in transformers_of(pipe).values():
            hooks.callback(transformer.register_forward_pre_hook(lambda *_: mark()).remove)
            hooks.callback(transformer.register_forward_hook(lambda *_: mark()).remove)
        yield


def time_runs(work: Work, contenders: Sequence[Timings], rounds: int, on_progress: Callable[[int, int], None]) -> None:
    """Fills the contenders' times: `rounds` runs each, in turn, after WARM_UP runs that do not count."""
    turns = [(turn, contender) for turn in range(-WARM_UP, rounds) for contender in contenders]
    for done, (turn, contender) in enumerate(turns, 1):
        began = time.perf_counter()
        with contender.handle or nullcontext(), marked(work) as marks:
            work.run()
        if turn < 0:
            contender.warm_up_s += time.perf_counter() - began
        else:
            contender.add(marks, work.steps)
        on_progress(done, len(turns))


def count_launches(work: Work, contender: Timings) -> None:
    """Fills the contender's launches and, on a GPU, its peak of memory, from one more run."""

    def run(mark: Callable[[], None]) -> None:
        with contender.handle or nullcontext(), around_calls(work.pipe, mark):
            work.run()

    if work.cuda:
        torch.cuda.reset_peak_memory_stats()
    counts = launches_of(run, work.cuda)
    branches = len(counts) // work.steps
    contender.launches = [sum(counts[i * branches : (i + 1) * branches]) for i in range(work.steps)]
    contender.peak_bytes = torch.cuda.max_memory_allocated() if work.cuda else None


def all_compute(model: Model, sampler: Sampler) -> Schedule:
    """Returns the schedule in which every cell is C."""
    return draw_schedule(model, sampler, list(range(sampler.steps)), {})


def benchmark(
    pipe: Any,
    schedules: Sequence[Schedule] = (),
    *,
    steps: int = 50,
    batch_size: int = 1,
    rounds: int = 7,
    guidance_scale: float | None = None,
    prompts: Sequence[int | str] | None = None,
    names: Sequence[str] | None = None,
    graphs: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns the loop's latency of each contender as plain data: `rows`, the first four of which are no schedules.

    plain: the pipeline untouched. hooks: all computed through the site hooks. lowered: all computed by traced blocks.
    tables: the same with conditioning tables. captured (on a GPU, unless graphs is False): that in CUDA graphs, as the
    schedules are. Speed-ups are against the last of these, so that no schedule is flattered.
    """
    if schedules:
        first = schedules[0].sampler
        if any(s.sampler.timesteps != first.timesteps for s in schedules):
            raise SodaprofError("The schedules are for different timesteps; benchmark them in separate calls.")
        steps, guidance_scale = first.steps, first.guidance_scale if guidance_scale is None else guidance_scale
    work = work_of(pipe, prompts, batch_size, rounds, steps, guidance_scale)
    model, sampler, _ = inspect_pipeline(pipe, "", steps, guidance_scale, work.entries[0])
    capture = work.cuda and graphs
    known = ("hooks", "lowered", "tables", *(("captured",) if capture else ()))
    full = all_compute(model, sampler)
    contenders = [Timings("plain"), *(timings_of(pipe, name, full, name) for name in known)]
    reference = contenders[-1]
    for name, schedule in zip(names or [s.policy["name"] for s in schedules], schedules, strict=True):
        contenders.append(timings_of(pipe, name, schedule, known[-1]))
        if capture:
            contenders.append(timings_of(pipe, f"{name}, whole steps", schedule, "whole steps"))
    time_runs(work, contenders, rounds, on_progress)
    for contender in contenders:
        count_launches(work, contender)
    device = str(getattr(pipe, "device", "cpu"))
    return {
        "format": "sodaprof.benchmark", "version": 1, "device": device, "hardware": device_facts(device),
        "threads": torch.get_num_threads(), "dtype": model.shape["dtype"],
        "versions": versions(), "steps": steps, "batch": batch_size, "rounds": rounds,
        "guidance_scale": guidance_scale,
        "sites": sum(len(t.sites) for t in model.transformers.values()),
        "tokens": model.shape["tokens"], "rows": [_row(c, reference.median_ms()) for c in contenders],
    }  # fmt: skip


def _row(c: Timings, reference_ms: float) -> dict[str, Any]:
    low, high = np.percentile(c.loop, (25, 75))
    step_ms = [round(float(v), 3) for v in np.median(c.transformer, 0)]
    row: dict[str, Any] = {
        "name": c.name, "loop_ms": round(c.median_ms(), 3), "quartiles_ms": [round(low, 3), round(high, 3)],
        "speedup": round(reference_ms / c.median_ms(), 4), "warm_up_s": round(c.warm_up_s, 2), "step_ms": step_ms,
        "launches": c.launches,
    }  # fmt: skip
    if c.peak_bytes is not None:
        row["peak_mib"] = round(c.peak_bytes / 2**20, 1)
    if c.handle is None or c.schedule is None:
        return row
    report, captures = c.handle.report(), c.handle.executor.engine.captures if c.handle.executor.engine else []
    row |= {"programs": report.counters.programs, "path": report.path, "graphs": report.counters.graphs}
    row["graphs_mib"] = round(sum(capture.bytes for capture in captures) / 2**20, 1)
    row["capture_s"] = round(sum(capture.seconds for capture in captures), 3)
    row["patterns"] = [
        {"steps": steps, "ms": round(float(np.median([step_ms[s] for s in steps])), 3)}
        for steps in c.schedule.patterns()
    ]
    if c.schedule.predicted:
        row["predicted"] = {key: c.schedule.predicted[key] for key in ("speedup", "unit")}
    return row
