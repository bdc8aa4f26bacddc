"""`benchmark`: how long the denoising loop takes, plain, computing everything here, and under each schedule.

All contenders run in turn, round after round, so that drifts of the machine hit them alike. Times are of the loop: the
transformer's calls, guidance and scheduler. On a GPU they are taken from events, without waiting inside the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from ..pipelines.load import call, default_prompts, transformers_of
from ..pipelines.patch import patched
from ..runtime.apply import Handle, apply

WARM_UP = 3  # runs: the first traces and notes the timesteps, the second probes, the third captures


@dataclass
class Runs:
    """One contender's times: a run each, in ms, of every step."""

    name: str
    schedule: Schedule | None = None
    handle: Handle | None = None
    transformer: list[np.ndarray] = field(default_factory=list)  # [T] a run
    scheduler: list[np.ndarray] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    warm_up_s: float = 0.0  # seconds of the runs before: tracing included
    launches: list[int] = field(default_factory=list)  # of each step: kernels on a GPU, operators elsewhere
    peak_bytes: int | None = None  # of GPU memory, weights included; None elsewhere

    def median_ms(self) -> float:
        return float(np.median(self.loop))


class Marks:
    """Points in time on the host, or in a GPU's stream; read when all is done."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.marks = cuda, list[tuple[str, Any]]()

    def __call__(self, name: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def ms(self) -> list[tuple[str, float]]:
        """Returns (name, milliseconds since the first mark)."""
        if not self.marks:
            return []
        start = self.marks[0][1]
        if self.cuda:
            torch.cuda.synchronize()
            return [(name, start.elapsed_time(event)) for name, event in self.marks]
        return [(name, (at - start) * 1e3) for name, at in self.marks]


@contextmanager
def marked(pipe: Any) -> Iterator[Marks]:
    """Marks every transformer call (in, out) and every scheduler step (begin, end) of the runs inside."""
    marks = Marks("cuda" in str(getattr(pipe, "device", "cpu")))
    hooks = []
    for transformer in transformers_of(pipe).values():
        hooks.append(transformer.register_forward_pre_hook(lambda *_: marks("in")))
        hooks.append(transformer.register_forward_hook(lambda *_: marks("out")))

    def timed(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        marks("begin")
        result = step(*args, **kwargs)
        marks("end")
        return result

    try:
        with patched(pipe.scheduler, "step", timed):
            yield marks
    finally:
        for hook in hooks:
            hook.remove()


def check_rounds(rounds: int, batch_size: int) -> None:
    """Raises SodaprofError where there would be nothing to time."""
    for option, value in (("--rounds", rounds), ("--batch-size", batch_size)):
        if value < 1:
            raise SodaprofError(f"{option} is {value}; expected at least 1.")


def time_runs(
    pipe: Any,
    contenders: Sequence[Runs],
    steps: int,
    entries: Sequence[int | str],
    scale: float | None,
    rounds: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Fills the contenders' times: `rounds` runs each, in turn, after WARM_UP runs that do not count."""
    total, done = (rounds + WARM_UP) * len(contenders), 0
    for turn in range(-WARM_UP, rounds):
        for contender in contenders:
            began = time.perf_counter()
            with contender.handle or nullcontext(), marked(pipe) as marks:
                call(pipe, entries, list(range(len(entries))), steps, scale, output_type="latent")
            if turn < 0:
                contender.warm_up_s += time.perf_counter() - began
            else:
                _add(contender, marks.ms(), steps)
            done += 1
            on_progress(done, total)


def look_at_runs(
    pipe: Any, contenders: Sequence[Runs], entries: Sequence[int | str], steps: int, scale: float | None
) -> None:
    """Fills in what each contender launches and how much memory it takes, in a run of its own that is not timed."""
    cuda = "cuda" in str(getattr(pipe, "device", "cpu"))
    for contender in contenders:
        if cuda:
            torch.cuda.reset_peak_memory_stats()

        def run(mark: Callable[[], None], contender: Runs = contender) -> None:
            hooks = []
            with contender.handle or nullcontext():
                for transformer in transformers_of(pipe).values():
                    hooks.append(transformer.register_forward_pre_hook(lambda *_: mark()))
                    hooks.append(transformer.register_forward_hook(lambda *_: mark()))
                try:
                    call(pipe, entries, list(range(len(entries))), steps, scale, output_type="latent")
                finally:
                    for hook in hooks:
                        hook.remove()

        counts = launches_of(run, cuda)
        branches = len(counts) // steps
        contender.launches = [sum(counts[i * branches : (i + 1) * branches]) for i in range(steps)]
        contender.peak_bytes = torch.cuda.max_memory_allocated() if cuda else None


def _add(contender: Runs, marks: list[tuple[str, float]], steps: int) -> None:
    transformer, scheduler, step = np.zeros(steps), np.zeros(steps), 0
    entered = begun = 0.0
    for name, at in marks:
        if name == "in":
            entered = at
        elif name == "out":
            transformer[step] += at - entered
        elif name == "begin":
            begun = at
        else:
            scheduler[step] = at - begun
            step += 1
    contender.transformer.append(transformer)
    contender.scheduler.append(scheduler)
    contender.loop.append(marks[-1][1])


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
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns the loop's latency of each contender as plain data: `rows`, the first four of which are no schedules.

    plain: the pipeline untouched. hooks: all computed through the site hooks. lowered: all computed by traced blocks.
    tables: the same with conditioning computed ahead. captured (on a GPU): that in CUDA graphs, as the schedules are.
    Speed-ups are against the last of these, so that no schedule is flattered.
    """
    check_rounds(rounds, batch_size)
    if schedules:
        steps = schedules[0].steps
    if any(s.sampler.timesteps != schedules[0].sampler.timesteps for s in schedules):
        raise SodaprofError("The schedules are for different timesteps; benchmark them in separate calls.")
    if schedules and guidance_scale is None:
        guidance_scale = schedules[0].sampler.guidance_scale
    pool = default_prompts(pipe) if prompts is None else list(prompts)
    entries = [pool[i % len(pool)] for i in range(batch_size)]
    model, sampler, _ = inspect_pipeline(pipe, "", steps, guidance_scale, entries[0])
    full = all_compute(model, sampler)
    contenders, device = [Runs("plain")], str(getattr(pipe, "device", "cpu"))
    for name, lower, tables in (("hooks", False, False), ("lowered", True, False), ("tables", True, True)):
        contenders.append(contender_of(pipe, name, full, lower, tables))
    capture = "cuda" in device
    if capture:
        contenders.append(contender_of(pipe, "captured", full, True, True, True))
    reference = len(contenders) - 1
    for i, schedule in enumerate(schedules):
        name = names[i] if names else schedule.policy["name"]
        contenders.append(contender_of(pipe, name, schedule, True, True, capture))
        if capture:
            contenders.append(contender_of(pipe, f"{name}, whole steps", schedule, True, True, True, True))
    time_runs(pipe, contenders, steps, entries, guidance_scale, rounds, on_progress)
    look_at_runs(pipe, contenders, entries, steps, guidance_scale)
    return {
        "format": "sodaprof.benchmark", "version": 1, "device": device, "hardware": device_facts(device),
        "threads": torch.get_num_threads(), "dtype": model.shape["dtype"],
        "versions": versions(), "steps": steps, "batch": batch_size, "rounds": rounds,
        "guidance_scale": guidance_scale, 
        "sites": sum(len(t.sites) for t in model.transformers.values()),
        "tokens": model.shape["tokens"], "rows": [_row(c, contenders[reference].median_ms()) for c in contenders],
    }  # fmt: skip


def contender_of(
    pipe: Any, name: str, schedule: Schedule, lower: bool, tables: bool, capture: bool = False, loop: bool = False
) -> Runs:
    """Returns a contender whose schedule is off until it is its turn."""
    handle = apply(pipe, schedule, lower=lower, tables=tables, capture=capture, loop=loop)
    handle.remove()
    return Runs(name, schedule, handle)


def _row(c: Runs, reference: float) -> dict[str, Any]:
    low, high = np.percentile(c.loop, (25, 75))
    row: dict[str, Any] = {
        "name": c.name, "loop_ms": round(c.median_ms(), 3), "quartiles_ms": [round(low, 3), round(high, 3)],
        "speedup": round(reference / c.median_ms(), 4), "warm_up_s": round(c.warm_up_s, 2),
        "step_ms": [round(float(v), 3) for v in np.median(c.transformer, 0)],
    }  # fmt: skip
    row["launches"] = c.launches
    if c.peak_bytes is not None:
        row["peak_mib"] = round(c.peak_bytes / 2**20, 1)
    if c.handle is not None and c.schedule is not None:
        row["programs"] = len(c.handle.programs)
        row["path"] = c.handle.report().path
        row["graphs"] = sum(len(capture.graphs) for capture in c.handle.captures)
        row["graphs_mib"] = round(sum(capture.bytes for capture in c.handle.captures) / 2**20, 1)
        row["capture_s"] = round(sum(capture.seconds for capture in c.handle.captures), 3)
        row["patterns"] = [
            {"steps": steps, "ms": round(float(np.median([row["step_ms"][s] for s in steps])), 3)}
            for steps in c.schedule.patterns()
        ]
    if c.schedule is not None and c.schedule.predicted:
        row["predicted"] = {key: c.schedule.predicted[key] for key in ("speedup", "unit")}
    return row
