"""`apply`: attaches a schedule to a pipeline instance, checks that they fit, and reports what ran."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import MismatchError, SodaprofError
from ..formats.rules import verify
from ..formats.schedule import Plan, Schedule
from ..formats.schedule_file import load_schedule
from ..pipelines.clock import Clock, Moment, TransformerHook
from .checks import HOOK, check_fits, rows_by_module
from .compiled.conditioning import Tables
from .compiled.graphs import Capture, CudaGraphs, Recorder
from .compiled.loop import Loop
from .compiled.sums import Collapse
from .compiled.trace import LoweredBlock, Program
from .hooks.registry import Hooked, refuse_group_offload
from .hooks.resolution import SizeHook
from .hooks.sites import SiteHook, SiteRow
from .hooks.stack import BlockHook, StackRow, block_of
from .sampler.update import StateUpdate, called_steps
from .shipped import find_shipped

RUNTIMES: dict[str, dict[str, Any]] = {  # name -> arguments of apply
    "hooks": {},
    "lowered": {"lower": True},
    "captured": {"lower": True, "capture": True},
    "whole-steps": {"lower": True, "capture": True, "loop": True},
}


@dataclass(frozen=True)
class Counters:
    """What the traced and captured runtimes did: in the latest run, and since the schedule was applied."""

    blocks_from_tables: int  # calls of a block that took values from the conditioning tables, in the latest run
    sums: int  # cached sums taken in the latest run
    kernel_sums: int  # of their streams, those summed by the Triton kernel
    graphs: int  # captured patterns, of all runs
    replays: int  # of these graphs, in the latest run
    steps_replayed: int  # steps of the latest run of which every call was replayed
    programs: int  # traced, of all runs


@dataclass(frozen=True)
class Report:
    """What a run was to do and what it did, in cells of the picture (one site at one step)."""

    planned: dict[str, int]
    executed: dict[str, int]
    complete: bool  # all steps ran
    speedup: float | None  # predicted, in the unit below
    unit: str | None
    path: str  # hooks, lowered or captured, and why not captured where that was asked for
    guidance_scale: float | None  # the scale that the schedule was profiled at; another one runs too
    resized: dict[str, tuple[int, int]]  # site -> tokens profiled and tokens that ran, where they differ
    counters: Counters

    def __str__(self) -> str:
        counts = "  ".join(f"{a} {self.executed.get(a, 0)}/{n}" for a, n in sorted(self.planned.items()))
        sizes = sorted(set(self.resized.values()))
        tokens = "".join(f", {before} tokens re-scaled to {now}" for before, now in sizes)
        speed = "" if self.speedup is None else f", {self.speedup:.2f}x {self.unit} predicted"
        return f"executed/planned: {counts}{speed}, profiled at guidance {self.guidance_scale}{tokens}, {self.path}"


class Handle:
    """A schedule on a pipeline. A context manager; `remove()` takes it off, bit for bit as it was before."""

    def __init__(
        self,
        pipe: Any,
        schedule: Schedule,
        lower: bool,
        tables: bool | str,
        collapse: str | None,
        capture: Recorder | None,
        loop: bool,
        any_resolution: bool,
    ) -> None:
        self.any_resolution = any_resolution
        self.pipe, self.schedule, self.lowered, self.tabled = pipe, schedule, lower, tables
        self.recorder, self.captures, self.loops = capture, list[Capture](), loop
        self.collapse = Collapse(collapse == "fused") if collapse else None
        self.tables: list[Tables] = []
        self.blocks: list[LoweredBlock] = []
        self.programs: dict[Any, Program] = {}
        self.moment = Moment()
        self.rows: list[SiteRow] = []
        self.stacks: list[StackRow] = []
        self._hooked = Hooked()
        self._complete = False
        self.turns: list[TransformerHook] = []
        self.clock = Clock(pipe.scheduler, schedule.sampler, self._start, self._end)
        self.update = self.clock.update = None if schedule.update is None else StateUpdate(schedule)
        self._attached = False
        for name, plan in schedule.transformers.items():
            self._prepare(name, pipe.components[name], plan)
        self.attach()

    def _prepare(self, name: str, transformer: Any, plan: Plan) -> None:
        """Makes the hooks of one transformer, innermost first."""
        modules = rows_by_module(transformer, plan, self.schedule)
        for path, rows in modules.items():
            self._hooked.add(transformer.get_submodule(path), SiteHook(rows, self.moment), HOOK)
            self.rows += rows
        if self.lowered:
            self._lower(transformer, plan, [row for rows in modules.values() for row in rows])
        if self.any_resolution:
            rows = [row for of_module in modules.values() for row in of_module]
            self._hooked.add(transformer, SizeHook(rows, plan, self.schedule), f"{HOOK}.size")
        rests = [step for step, action in enumerate(plan.stack) if action == "-"]
        self.turns.append(
            TransformerHook(
                self.clock, self.moment, self._check_scheduler, name, plan.past(), self._forget, rests, len(plan.rows)
            )
        )
        self._hooked.add(transformer, self.turns[-1], HOOK)
        if "S" in plan.stack:
            for capture in self.captures:
                capture.refused = "the schedule skips the stack, whose forecasts are kept outside of graphs"
            self.stacks.append(StackRow(plan))
            lowered = {block.path: block for block in self.blocks}
            for path in self.stacks[-1].blocks:
                block = BlockHook(self.stacks[-1], path, self.moment, lowered.get(path))
                self._hooked.add(transformer.get_submodule(path), block, HOOK)

    def attach(self) -> None:
        """Puts the schedule on again after `remove()`; what was traced before is still there."""
        if self._attached:
            return
        check_fits(self.pipe, self.schedule)  # much may have happened to the pipeline since
        try:
            self._hooked.attach()
            self.clock.attach()
            self._attached = True
        except BaseException:
            self.remove()
            raise

    def _lower(self, transformer: Any, plan: Plan, all_rows: list[SiteRow]) -> None:
        by_block: dict[str, list[SiteRow]] = {}
        for row in all_rows:
            by_block.setdefault(block_of(row.key), []).append(row)
        blocks = []
        for path, rows in by_block.items():
            module = transformer.get_submodule(path)
            blocks.append(LoweredBlock(path, module, rows, self.moment, self.programs))
            self._hooked.add(module, blocks[-1], f"{HOOK}.lowered")
        self.blocks += blocks
        if self.tabled:
            if self.recorder is not None:
                self.captures.append(Capture(self.recorder, self.moment, blocks, transformer, self.schedule.steps))
            capture = self.captures[-1] if self.captures else None
            own = [step for step, action in enumerate(plan.stack) if action in ".S"]
            self.tables.append(Tables(self.moment, blocks, own, self.collapse, capture, self.tabled == "near"))
            if self.loops and capture is not None:
                self.tables[-1].loop = self.clock.loop = Loop(
                    self.moment, capture, called_steps(self.schedule), self.schedule.sampler, self.update
                )
            self._hooked.add(transformer, self.tables[-1], f"{HOOK}.tables")

    def _check_scheduler(self) -> None:
        if self.pipe.scheduler is not self.clock.scheduler:
            raise MismatchError(
                f"The pipeline's scheduler was replaced (now {type(self.pipe.scheduler).__name__}) after the schedule "
                "was applied. remove() the schedule first, then apply one made for the new scheduler."
            )

    def _forget(self) -> None:
        """Lets go of what is kept: where a transformer's turn begins, it computes everything."""
        for row in self.rows:
            row.reset()
        for stack in self.stacks:
            stack.reset()
        for turn in self.turns:
            turn.reset()

    def _reset(self) -> None:
        self._forget()
        for block in self.blocks:
            block.reset()
        for tables in self.tables:
            tables.reset()
        if self.clock.loop is not None:
            self.clock.loop.reset()
        if self.update is not None:
            self.update.reset()

    def _start(self) -> None:
        for name in self.schedule.transformers:
            refuse_group_offload(name, self.pipe.components[name])
        self._hooked.keep()
        self._reset()
        if self.update is not None:
            self.update.begin(self.pipe.scheduler)
        self.moment.executed, self.moment.served = Counter(), Counter()
        self._complete = False

    def _end(self) -> None:
        differed = [tables for tables in self.tables if tables.differed()]
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
            path=self._path(),
            guidance_scale=self.schedule.sampler.guidance_scale,
            resized={
                row.key: (row.profiled_tokens, row.tokens) for row in self.rows if row.tokens != row.profiled_tokens
            },
            counters=self._counters(),
        )

    def _counters(self) -> Counters:
        served = self.moment.served
        return Counters(
            blocks_from_tables=served["blocks"],
            sums=served["sums"],
            kernel_sums=served["kernel sums"],
            graphs=sum(len(capture.graphs) for capture in self.captures),
            replays=sum(capture.replays for capture in self.captures),
            steps_replayed=sum(capture.replayed_steps() for capture in self.captures),
            programs=self.moment.programs,
        )

    def _path(self) -> str:
        if not self.captures:
            return "lowered" if self.lowered else "hooks"
        if refused := next((c.refused for c in self.captures if c.refused), None):
            return f"lowered: {refused}"
        counters, called = self._counters(), sum(called_steps(self.schedule))
        told = f"captured: {counters.graphs} graphs, {counters.steps_replayed}/{called} steps replayed"
        loop = self.clock.loop
        return (
            told
            if loop is None
            else f"{told}, {f'steps by the pipeline: {loop.refused}' if loop.refused else 'whole steps'}"
        )

    def remove(self) -> None:
        """Takes the schedule off. Safe to call twice, and after an exception inside a run."""
        if self._attached:
            self.clock.detach()
            self._attached = False
        self._hooked.remove()
        self._reset()

    def __enter__(self) -> Handle:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


def apply(
    pipe: Any,
    schedule: Schedule | str | Path | None = None,
    *,
    steps: int | None = None,
    lower: bool = False,
    tables: bool | str = True,
    collapse: str | None = "ordered",
    capture: bool | Recorder = False,
    loop: bool = False,
    allow_resolution: bool = False,
) -> Handle:
    """Attaches the schedule (or the file of one) to this pipeline and returns the handle; use it as a context manager.

    Inside, call the pipeline as ever.

    schedule: by default the one beside the model's weights that fits; steps: of so many, where there are several.
    lower: run each block as traced programs, without what only fed modules that are not run: the same bits, faster steps,
    some seconds of tracing in the first run.
    tables: with lower, compute ahead what does not depend on the latents, once two runs have shown what that is; "near" fills
    them in a few large products, equal except for rounding, which a GPU does much faster than with the same bits.
    collapse: with tables, blocks in a row that compute nothing become one sum: "ordered" with the same bits, "fused" faster
    and equal but for rounding, None not.
    capture: with tables, the transformer under each pattern as a CUDA graph; the report says what ran and why.
    loop: with capture, all steps but the first without the pipeline's Python, guidance and solver in the graph: equal but
    for rounding; a pipeline's callbacks between steps are not heard.

    allow_resolution: run at other resolutions than profiled, too, with the same share of the tokens pruned.

    Raises MismatchError where the schedule does not fit the pipeline, UnsupportedModelError where it holds actions that this
    release does not run, SodaprofError where no or several schedules are beside the weights.
    """
    if schedule is None:
        schedule = find_shipped(pipe, steps)
    if not isinstance(schedule, Schedule):
        schedule = load_schedule(schedule)
    verify(schedule)
    check_fits(pipe, schedule)
    if collapse not in ("ordered", "fused", None):
        raise SodaprofError(f"collapse is {collapse!r}; expected 'ordered', 'fused' or None.")
    if tables not in (True, False, "near"):
        raise SodaprofError(f"tables is {tables!r}; expected True, False or 'near'.")
    if capture and not (lower and tables):
        raise SodaprofError(
            "Only traced blocks with their tables are captured. Type: apply(..., lower=True, capture=True)"
        )
    if loop and (not capture or len(schedule.transformers) > 1):
        raise SodaprofError("The whole-step loop is for one captured transformer: apply(..., capture=True, loop=True)")
    recorder = CudaGraphs() if capture is True else capture or None
    return Handle(pipe, schedule, lower, tables if lower else False, collapse, recorder, loop, allow_resolution)


def apply_with(pipe: Any, schedule: Schedule, runtime: str, **others: Any) -> Handle:
    """Returns `apply` with `others` and the arguments that a name in RUNTIMES stands for; SodaprofError for another name."""
    if runtime not in RUNTIMES:
        raise SodaprofError(f"No runtime {runtime!r}; there are {', '.join(RUNTIMES)}. Try --runtime lowered")
    return apply(pipe, schedule, **RUNTIMES[runtime], **others)
