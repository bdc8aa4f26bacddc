"""Everything that one run at a time needs: cells, caches, clock and compiled state. Runs that overlap have one each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from diffusers.hooks import ModelHook

from ..errors import MismatchError
from ..formats.schedule import Plan, Schedule
from ..pipelines.clock import Clock, Moment
from ..pipelines.recording import refuse_caches
from ..pipelines.transformer_hook import TransformerHook
from .checks import rows_by_module
from .compiled.engine import Compiled, Engine
from .compiled.trace import Programs
from .hooks.registry import chain, refuse_group_offload
from .hooks.resolution import SizeHook
from .hooks.sites import SiteHook, SiteRow
from .hooks.stack import BlockHook, StackRow
from .row_order import RowOrder
from .sampler.update import StateUpdate


class Executor:
    """Runs a schedule on the transformers of a pipeline, one run at a time."""

    def __init__(
        self,
        pipe: Any,
        schedule: Schedule,
        settings: Compiled | None,
        any_resolution: bool,
        on_start: Callable[[], None],
        programs: Programs,
    ) -> None:
        """programs: traced ones, which the executors of a handle share."""
        self.pipe, self.parts = pipe, {name: pipe.components[name] for name in schedule.transformers}
        self.schedule, self.any_resolution, self.on_start = schedule, any_resolution, on_start
        self.moment = Moment()
        self.rows: list[SiteRow] = []
        self.stacks: list[StackRow] = []
        self.turns: list[TransformerHook] = []
        self.complete = False  # the latest run took all steps
        self.clock = Clock(pipe.scheduler, schedule.sampler, self._start, self._end)
        self.clock.times, self.clock.times_unchecked = schedule.times, schedule.times != schedule.sampler.timesteps
        self.update = self.clock.update = None if schedule.update is None else StateUpdate(schedule)
        self.order = self.clock.order = RowOrder(schedule, self.clock)
        self.engine: Engine | None = None
        if settings is not None:
            first = next(iter(self.parts.values()))
            device = torch.device(getattr(pipe, "_execution_device", None) or next(first.parameters()).device)
            self.engine = Engine(settings, schedule, self.moment, self.update, device, programs)
        self.hooks: dict[tuple[str, str], list[ModelHook]] = {}  # of each module of each transformer, innermost first
        self._chains: dict[tuple[str, str], tuple[Any, Callable[..., Any]]] = {}  # with the `forward` inside
        for name, plan in schedule.transformers.items():
            self._prepare(name, plan)
        if self.engine is not None:
            self.clock.loop = self.engine.loop

    def _prepare(self, name: str, plan: Plan) -> None:
        """Adds the hooks of one transformer."""
        transformer = self.parts[name]
        modules = rows_by_module(transformer, plan, self.schedule)
        rows = [row for of_module in modules.values() for row in of_module]
        self.rows += rows
        for path, of_module in modules.items():
            self._add(name, path, SiteHook(of_module, self.moment))
        if self.engine is not None:
            for path, hook in self.engine.hooks(transformer, plan, rows):
                self._add(name, path, hook)
        if self.any_resolution:
            self._add(name, "", SizeHook(rows, plan, self.schedule))
        skipped = [step for step, action in enumerate(plan.stack) if action == "-"]
        turn = TransformerHook(self.clock, self.moment, name, plan.past(), self._forget, skipped, len(plan.rows))
        self.turns.append(turn)
        self._add(name, "", turn)
        if "S" in plan.stack:
            stack = StackRow(plan)
            self.stacks.append(stack)
            traced = {block.path: block for block in self.engine.blocks} if self.engine is not None else {}
            for path in stack.blocks:
                self._add(name, path, BlockHook(stack, path, self.moment, traced.get(path)))

    def _add(self, name: str, path: str, hook: ModelHook) -> None:
        self.hooks.setdefault((name, path), []).append(hook)

    def call(self, name: str, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns what the hooks of a module make of a call; original: its own `forward`."""
        inside, function = self._chains.get((name, path), (None, None))
        if function is None or inside is not original:
            function = chain(self.hooks[name, path], self.parts[name].get_submodule(path), original)
            self._chains[name, path] = original, function
        return function(*args, **kwargs)

    def _forget(self) -> None:
        """Drops all caches: at the beginning of its turn a transformer computes everything."""
        parts: list[Any] = [*self.rows, *self.stacks, *self.turns]
        for part in parts:
            part.reset()

    def reset(self) -> None:
        """Drops what a run kept."""
        self._forget()
        for part in (self.engine, self.update, self.order):
            if part is not None:
                part.reset()

    def _start(self) -> None:
        for name, transformer in self.parts.items():
            if self.clock.scheduler is self.pipe.scheduler and self.pipe.components[name] is not transformer:
                self._refuse_replaced(name)
            refuse_group_offload(name, transformer)
            refuse_caches(name, transformer)
        self.on_start()
        self.reset()
        if self.update is not None:
            self.update.begin(self.clock.scheduler)
        self.moment.executed, self.moment.served = Counter(), Counter()
        self.complete = False

    def _refuse_replaced(self, name: str) -> NoReturn:
        raise MismatchError(
            f"pipe.{name} was replaced (now {type(self.pipe.components[name]).__name__}) after the schedule was applied to "
            "another network. Type sodaprof.remove(pipe), then apply the schedule again."
        )

    def _end(self) -> None:
        differed = self.engine is not None and self.engine.differed()
        moved = self.order.moved_at()
        self.reset()
        self.complete = True
        planned = Counter({action: self.clock.branches * n for action, n in self.schedule.counts().items()})
        if missing := planned - self.moment.executed:
            cells = ", ".join(f"{count} {action} cells" for action, count in missing.items())
            raise MismatchError(
                f"Something else ran in place of {cells} of the schedule (a cache that was enabled before or within the run, "
                "say): this generation is wrong. Disable it, then call the pipeline again."
            )
        if moved is not None:
            self.order.refuse(moved)
        if differed:
            raise MismatchError(
                "The pipeline called the transformer with other arguments (timesteps, say) than in the run in which the "
                "conditioning tables were prepared: this generation is wrong. Call it again; such calls now run without tables."
            )
