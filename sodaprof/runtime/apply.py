"""`apply`: attaches a schedule to a pipeline instance, checks that they match, and reports what ran."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from ..errors import MismatchError, SodaprofError
from ..formats.rules import verify
from ..formats.schedule import Schedule
from ..formats.schedule_file import load_schedule
from ..pipelines.load import transformers_of
from ..pipelines.patch import owner_of, patched
from ..pipelines.runs import current_clock, was_replaced
from .checks import check_matches
from .compiled.engine import Compiled, Counters
from .compiled.trace import Programs
from .executor import Executor
from .hooks.registry import Hooks, hook_owners
from .sampler.update import at_own_timesteps
from .shipped import find_shipped

RUNTIMES = ("hooks", "compiled", "whole-steps")
FORMER_RUNTIMES = {"lowered": "compiled --no-graphs", "captured": "compiled"}  # as recorded files name them
FORMER_KEYWORDS = {  # of apply
    "lower": 'runtime="compiled"',
    "tables": "runtime=Compiled(tables=...)",
    "collapse": "runtime=Compiled(sums=...)",
    "capture": 'runtime="compiled"',
    "loop": 'runtime="whole-steps"',
}


@dataclass(frozen=True)
class Report:
    """What a run was planned to do and what it did, in cells (one site at one step, on each guidance branch)."""

    planned: dict[str, int]
    executed: dict[str, int]
    complete: bool  # all steps ran
    speedup: float | None  # predicted, in the unit below
    unit: str | None
    path: str  # hooks or compiled, and why a faster way was not taken
    guidance_scale: float | None  # the profiled one; another one runs too
    resized: dict[str, tuple[int, int]]  # site -> profiled tokens and tokens that ran, if they differ
    counters: Counters

    def __str__(self) -> str:
        counts = "  ".join(f"{a} {self.executed.get(a, 0)}/{n}" for a, n in sorted(self.planned.items()))
        sizes = sorted(set(self.resized.values()))
        tokens = "".join(f", {before} tokens re-scaled to {now}" for before, now in sizes)
        speed = "" if self.speedup is None else f", {self.speedup:.2f}x {self.unit} predicted"
        guidance = "" if self.guidance_scale is None else f", profiled at guidance {self.guidance_scale}"
        return f"executed/planned: {counts}{speed}{guidance}{tokens}, {self.path}"


class Handle:
    """A schedule on a pipeline, a context manager; `remove()` restores the pipeline bit for bit.

    Runs in several threads or tasks may overlap, if each has a pipeline with a copy of the scheduler: each has an executor of
    its own, with its own caches.
    """

    def __init__(self, pipe: Any, schedule: Schedule, settings: Compiled | None, any_resolution: bool) -> None:
        self.pipe, self.schedule = pipe, schedule
        self._settings, self._any_resolution = settings, any_resolution
        self._lock, self._compiling = threading.Lock(), threading.RLock()
        self._attached = ExitStack()
        self._hooks: list[Hooks] = []
        self._programs: Programs = {}
        check_matches(pipe, schedule)
        self.executor = self._new_executor()  # of the latest run
        self._executors = {self.executor.clock: self.executor}
        self.attach()

    def _new_executor(self) -> Executor:
        made = (self._settings, self._any_resolution, self._keep_hooks, self._programs)
        return Executor(self.pipe, self.schedule, *made)

    def attach(self) -> None:
        """Attaches the schedule again after `remove()`; programs that were traced are kept."""
        if self._hooks:
            return
        check_matches(self.pipe, self.schedule)  # the pipeline may have changed since
        scheduler = self.pipe.scheduler
        try:
            for name in self.schedule.transformers:
                self._hooks.append(Hooks(self.pipe.components[name], partial(self._call, name), self))
                self._hooks[-1].attach([path for part, path in self.executor.hooks if part == name])
            wrappers: dict[str, Callable[..., Any]] = {"set_timesteps": self._start, "step": self._advance}
            if hasattr(scheduler, "add_noise") and not hasattr(scheduler, "index_for_timestep"):
                wrappers["add_noise"] = self._add_noise  # the others look timesteps up among those of the run
            for method, wrapper in wrappers.items():
                one = partial(wrapper, scheduler)
                self._attached.enter_context(patched(scheduler, method, one, copies=wrapper, owner=self))
        except BaseException:
            self.remove()
            raise

    def _keep_hooks(self) -> None:
        for hooks in self._hooks:
            hooks.keep()

    def _start(self, scheduler: Any, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Starts a run on the pipeline's scheduler or a copy of it."""
        with self._lock:
            self.executor = self._executor_for(scheduler)
            self.executor.clock.claim(scheduler)
        return self.executor.clock.start(scheduler, set_timesteps, *args, **kwargs)

    def _executor_for(self, scheduler: Any) -> Executor:
        """Returns the executor whose run on this scheduler ended or was aborted, else one without a run, else a new one."""
        for clock, executor in self._executors.items():
            if clock.scheduler is scheduler:
                return executor
        for clock, executor in self._executors.items():
            if clock.run is None or clock.scheduler is None:
                return executor
        executor = self._new_executor()
        self._executors[executor.clock] = executor
        return executor

    def _advance(self, scheduler: Any, own_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        clock = next((clock for clock in tuple(self._executors) if clock.scheduler is scheduler), None)
        if clock is None:
            return own_step(*args, **kwargs)
        if scheduler is not self.pipe.scheduler and clock.run is not None and not (clock.run.step or clock.run.calls):
            clock.stop()  # a copy for another network
        return clock.advance(scheduler, own_step, *args, **kwargs)

    def _add_noise(self, scheduler: Any, add_noise: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        clock = next((clock for clock in tuple(self._executors) if clock.scheduler is scheduler), None)
        if clock is None or clock.run is None or clock.times == clock.sampler.timesteps:
            return add_noise(*args, **kwargs)
        return at_own_timesteps(add_noise, clock.times, clock.sampler.timesteps, *args, **kwargs)

    def _call(self, name: str, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Passes the call of a module to the executor of the run that the calling thread or task is in."""
        clock = current_clock(self._executors, entering=not path)
        if clock is None or (not path and owner_of(self.pipe.scheduler) is not self):
            self._refuse_call()
        # tracing replaces the parameters of a block for a while, so compiled runs take turns at calling the network
        with self._compiling if not path and self._settings is not None else nullcontext():
            return self._executors[clock].call(name, path, original, args, kwargs)

    def _refuse_call(self) -> NoReturn:
        """Raises MismatchError: the network is called, and no run of its caller is known."""
        if was_replaced(self._executors):
            raise MismatchError(
                "Another call of the pipeline began with this scheduler while this one ran, and took its place. Give each call "
                "that overlaps others a pipeline with a scheduler of its own: copy.deepcopy(pipe.scheduler)"
            )
        if owner_of(self.pipe.scheduler) is not self:
            raise MismatchError(
                f"The pipeline's scheduler was replaced (now {type(self.pipe.scheduler).__name__}) after the schedule "
                "was applied. remove() the schedule first, then apply one made for the new scheduler."
            )
        raise MismatchError(
            "The transformer was called outside a denoising loop (no set_timesteps before in this thread or task, or all steps "
            "are done), or by a pipeline whose scheduler is no copy made of this one since the schedule was applied. Call the "
            "pipeline, each run in a thread, task or function of its own; give others copy.deepcopy(pipe.scheduler), made anew; "
            "or remove the schedule: sodaprof.remove(pipe)"
        )

    def report(self) -> Report:
        """Returns planned and executed actions of the run that began last."""
        predicted, executor = self.schedule.predicted or {}, self.executor
        branches = max(1, executor.clock.branches)
        return Report(
            planned={action: branches * n for action, n in self.schedule.counts().items()},
            executed=dict(executor.moment.executed),
            complete=executor.complete,
            speedup=predicted.get("speedup"),
            unit=predicted.get("unit"),
            path="hooks" if executor.engine is None else executor.engine.path(),
            guidance_scale=self.schedule.sampler.guidance_scale,
            resized={
                row.key: (row.profiled_tokens, row.tokens) for row in executor.rows if row.tokens != row.profiled_tokens
            },
            counters=Counters() if executor.engine is None else executor.engine.counters(),
        )

    def remove(self) -> None:
        """Detaches the schedule. Safe to call twice, and after an exception inside a run; call it between runs."""
        self._attached.close()
        while self._hooks:
            self._hooks.pop().remove()
        for executor in self._executors.values():
            executor.clock.stop()
            executor.reset()

    def __enter__(self) -> Handle:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def remove(pipe: Any) -> None:
    """Removes the schedule from a pipeline, or from the pipeline that it was copied from; does nothing if there is none."""
    for handle in {owner_of(pipe.scheduler), *chain(*map(hook_owners, transformers_of(pipe).values()))} - {None}:
        handle.remove()


def apply(
    pipe: Any,
    schedule: Schedule | str | Path | None = None,
    *,
    runtime: str | Compiled = "hooks",
    steps: int | None = None,
    allow_resolution: bool = False,
    **former: Any,
) -> Handle:
    """Attaches a schedule, or the file of one, to this pipeline and returns the handle; use it as a context manager.

    Inside the `with` block, call the pipeline as usual.

    schedule: by default the one next to the model's weights that matches; steps: its number of steps, if there are several.
    runtime: "hooks", the reference; "compiled": traced blocks, conditioning tables and cached sums, with the same bits, and
    CUDA graphs on a GPU; tracing takes some seconds in the first run; "whole-steps": the same with guidance and the sampler's
    step inside the graph, equal except for rounding; or `Compiled(...)`, whose settings are described there.
    allow_resolution: run at other resolutions than profiled, too, with the same share of the tokens pruned.

    Raises MismatchError if the schedule does not match the pipeline, UnsupportedModelError if it holds actions that this
    release does not run, SodaprofError if no or several schedules are next to the weights, or for an unknown runtime.
    """
    for keyword in former:
        if keyword not in FORMER_KEYWORDS:
            raise TypeError(f"apply() got an unexpected keyword argument {keyword!r}")
        raise SodaprofError(
            f"apply({keyword}=...) has been replaced: apply(pipe, schedule, {FORMER_KEYWORDS[keyword]})"
        )
    settings = runtime_settings(runtime)
    if schedule is None:
        schedule = find_shipped(pipe, steps)
    if isinstance(schedule, Schedule):
        verify(schedule)
    else:
        schedule = load_schedule(schedule)
    return Handle(pipe, schedule, settings, allow_resolution)


def runtime_settings(runtime: str | Compiled, graphs: bool = True) -> Compiled | None:
    """Returns the settings of a runtime, None for `hooks`; SodaprofError for an unknown name, with the new one if it is old."""
    if isinstance(runtime, Compiled):
        return runtime
    if runtime in FORMER_RUNTIMES:
        raise SodaprofError(f"The runtime {runtime!r} has another name now: --runtime {FORMER_RUNTIMES[runtime]}")
    if runtime not in RUNTIMES:
        raise SodaprofError(f"No runtime {runtime!r}; there are {', '.join(RUNTIMES)}. Try --runtime compiled")
    if runtime == "whole-steps" and not graphs:
        raise SodaprofError("Runtime whole-steps needs graphs. Leave --no-graphs out, or take --runtime compiled")
    return None if runtime == "hooks" else Compiled(graphs=graphs, whole_steps=runtime == "whole-steps")
