"""`apply`: attaches a schedule to a pipeline instance, checks that they match, and reports what ran."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import MismatchError, SodaprofError
from ..formats.rules import verify
from ..formats.schedule import Plan, Schedule
from ..formats.schedule_file import load_schedule
from ..pipelines.clock import Clock, Moment, TransformerHook
from .checks import HOOK, check_matches, rows_by_module
from .compiled.engine import Compiled, Counters, Engine
from .hooks.registry import Hooks, refuse_group_offload
from .hooks.resolution import SizeHook
from .hooks.sites import SiteHook, SiteRow
from .hooks.stack import BlockHook, StackRow
from .sampler.update import StateUpdate
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
    """What a run was planned to do and what it did, in cells (one site at one step)."""

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
        return f"executed/planned: {counts}{speed}, profiled at guidance {self.guidance_scale}{tokens}, {self.path}"


class Handle:
    """A schedule on a pipeline, a context manager; `remove()` restores the pipeline bit for bit."""

    def __init__(self, pipe: Any, schedule: Schedule, settings: Compiled | None, any_resolution: bool) -> None:
        self.pipe, self.schedule, self.any_resolution = pipe, schedule, any_resolution
        self.moment = Moment()
        self.rows: list[SiteRow] = []
        self.stacks: list[StackRow] = []
        self.turns: list[TransformerHook] = []
        self.clock = Clock(pipe.scheduler, schedule.sampler, self._start, self._end)
        self.update = self.clock.update = None if schedule.update is None else StateUpdate(schedule)
        self.engine: Engine | None = None
        if settings is not None:
            first = pipe.components[next(iter(schedule.transformers))]
            device = torch.device(getattr(pipe, "_execution_device", None) or next(first.parameters()).device)
            self.engine = Engine(settings, schedule, self.moment, self.update, device)
        self._hooks = Hooks()
        self._complete = self._attached = False
        for name, plan in schedule.transformers.items():
            self._prepare(name, pipe.components[name], plan)
        if self.engine is not None:
            self.clock.loop = self.engine.loop
        self.attach()

    def _prepare(self, name: str, transformer: Any, plan: Plan) -> None:
        """Adds the hooks of one transformer, innermost first."""
        modules = rows_by_module(transformer, plan, self.schedule)
        rows = [row for of_module in modules.values() for row in of_module]
        self.rows += rows
        for path, of_module in modules.items():
            self._hooks.add(transformer.get_submodule(path), SiteHook(of_module, self.moment), HOOK)
        if self.engine is not None:
            for module, hook, kind in self.engine.hooks(transformer, plan, rows):
                self._hooks.add(module, hook, f"{HOOK}.{kind}")
        if self.any_resolution:
            self._hooks.add(transformer, SizeHook(rows, plan, self.schedule), f"{HOOK}.size")
        skipped = [step for step, action in enumerate(plan.stack) if action == "-"]
        turn = TransformerHook(
            self.clock, self.moment, self._check_scheduler, name, plan.past(), self._forget, skipped, len(plan.rows)
        )
        self.turns.append(turn)
        self._hooks.add(transformer, turn, HOOK)
        if "S" in plan.stack:
            stack = StackRow(plan)
            self.stacks.append(stack)
            traced = {block.path: block for block in self.engine.blocks} if self.engine is not None else {}
            for path in stack.blocks:
                hook = BlockHook(stack, path, self.moment, traced.get(path))
                self._hooks.add(transformer.get_submodule(path), hook, HOOK)

    def attach(self) -> None:
        """Attaches the schedule again after `remove()`; programs that were traced are kept."""
        if self._attached:
            return
        check_matches(self.pipe, self.schedule)  # the pipeline may have changed since
        try:
            self._hooks.attach()
            self.clock.attach()
            self._attached = True
        except BaseException:
            self.remove()
            raise

    def _check_scheduler(self) -> None:
        if self.pipe.scheduler is not self.clock.scheduler:
            raise MismatchError(
                f"The pipeline's scheduler was replaced (now {type(self.pipe.scheduler).__name__}) after the schedule "
                "was applied. remove() the schedule first, then apply one made for the new scheduler."
            )

    def _forget(self) -> None:
        """Drops all caches: at the begin of its turn a transformer computes everything."""
        parts: list[Any] = [*self.rows, *self.stacks, *self.turns]
        for part in parts:
            part.reset()

    def _reset(self) -> None:
        self._forget()
        for part in (self.engine, self.update):
            if part is not None:
                part.reset()

    def _start(self) -> None:
        for name in self.schedule.transformers:
            refuse_group_offload(name, self.pipe.components[name])
        self._hooks.keep()
        self._reset()
        if self.update is not None:
            self.update.begin(self.pipe.scheduler)
        self.moment.executed, self.moment.served = Counter(), Counter()
        self._complete = False

    def _end(self) -> None:
        differed = self.engine is not None and self.engine.differed()
        self._reset()
        self._complete = True
        if differed:
            raise MismatchError(
                "The pipeline called the transformer with other arguments (timesteps, say) than in the run in which the "
                "conditioning tables were prepared: this generation is wrong. Call it again; such calls now run without tables."
            )

    def report(self) -> Report:
        """Returns planned and executed actions of the latest run."""
        predicted = self.schedule.predicted or {}
        return Report(
            planned=dict(self.schedule.counts()),
            executed=dict(self.moment.executed),
            complete=self._complete,
            speedup=predicted.get("speedup"),
            unit=predicted.get("unit"),
            path="hooks" if self.engine is None else self.engine.path(),
            guidance_scale=self.schedule.sampler.guidance_scale,
            resized={
                row.key: (row.profiled_tokens, row.tokens) for row in self.rows if row.tokens != row.profiled_tokens
            },
            counters=Counters() if self.engine is None else self.engine.counters(),
        )

    def remove(self) -> None:
        """Detaches the schedule. Safe to call twice, and after an exception inside a run."""
        if self._attached:
            self.clock.detach()
            self._attached = False
        self._hooks.remove()
        self._reset()

    def __enter__(self) -> Handle:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


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
