"""The compiled runtime: its settings, and what it consists of for one schedule on one pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import SodaprofError
from ...formats.schedule import Plan, Schedule
from ...pipelines.clock import Moment
from ..hooks.sites import SiteRow
from ..hooks.stack import block_of
from ..sampler.update import StateUpdate, called_steps
from .conditioning import ConditioningTables
from .graphs import CudaGraphs, Graphs, Recorder
from .loop import Loop
from .sums import Sums
from .trace import Programs, TracedBlock


@dataclass(frozen=True)
class Compiled:
    """Settings of the compiled runtime, for `apply(..., runtime=Compiled(...))`. Raises SodaprofError for unknown values.

    tables: compute ahead what does not depend on the latents: True with the same bits; "near" in few large products, equal
    except for rounding, which a GPU does much faster; False not at all.
    sums: blocks in a row that compute nothing become one sum: "ordered" with the same bits, "fused" faster and equal except
    for rounding, None not at all. graphs: CUDA graphs on a GPU; or what records graphs instead. whole_steps: guidance and the
    sampler's step inside the graph, equal except for rounding; callbacks between steps are then not called.
    """

    tables: bool | str = True
    sums: str | None = "ordered"
    graphs: bool | Recorder = True
    whole_steps: bool = False

    def __post_init__(self) -> None:
        if self.tables not in (True, False, "near"):
            raise SodaprofError(f"Compiled: tables is {self.tables!r}; expected True, False or 'near'.")
        if self.sums not in ("ordered", "fused", None):
            raise SodaprofError(f"Compiled: sums is {self.sums!r}; expected 'ordered', 'fused' or None.")
        if self.whole_steps and not (self.tables and self.graphs):
            raise SodaprofError("Compiled: whole_steps needs tables and graphs. Leave tables and graphs as they are.")


@dataclass(frozen=True)
class Counters:
    """What the compiled runtime did: in the latest run, and since the schedule was applied."""

    blocks_from_tables: int = 0  # calls of a block that took values from the conditioning tables, in the latest run
    sums: int = 0  # cached sums taken in the latest run
    kernel_sums: int = 0  # of their streams, those summed by the Triton kernel
    graphs: int = 0  # captured patterns, of all runs
    replays: int = 0  # of these graphs, in the latest run
    steps_replayed: int = 0  # steps of the latest run of which every call was replayed
    programs: int = 0  # traced, of all runs


class Engine:
    """Traced blocks, conditioning tables, cached sums and graphs of every transformer of a schedule."""

    def __init__(
        self,
        settings: Compiled,
        schedule: Schedule,
        moment: Moment,
        update: StateUpdate | None,
        device: torch.device,
        programs: Programs,
    ) -> None:
        """programs: filled with what is traced; the engines of overlapping runs share them."""
        if settings.whole_steps and len(schedule.transformers) > 1:
            raise SodaprofError("Runtime whole-steps is for one transformer. Take --runtime compiled")
        self.settings, self.schedule, self.moment, self.update, self.device = settings, schedule, moment, update, device
        self.recorder: Recorder | None = None
        if settings.tables and not isinstance(settings.graphs, bool):
            self.recorder = settings.graphs
        elif settings.tables and settings.graphs and (device.type == "cuda" or settings.whole_steps):
            self.recorder = CudaGraphs()
        self.sums = Sums(settings.sums == "fused") if settings.sums else None
        self.blocks: list[TracedBlock] = []
        self.tables: list[ConditioningTables] = []
        self.captures: list[Graphs] = []
        self.programs = programs
        self.loop: Loop | None = None

    def hooks(self, transformer: nn.Module, plan: Plan, rows: list[SiteRow]) -> list[tuple[str, Any]]:
        """Returns (path of the module, hook) of a transformer's traced blocks and of its tables, innermost first."""
        by_block: dict[str, list[SiteRow]] = {}
        for row in rows:
            by_block.setdefault(block_of(row.key), []).append(row)
        blocks = [
            TracedBlock(path, transformer.get_submodule(path), of_block, self.moment, self.programs)
            for path, of_block in by_block.items()
        ]
        self.blocks += blocks
        hooks: list[tuple[str, Any]] = [(block.path, block) for block in blocks]
        if self.settings.tables:
            hooks.append(("", self._tables(transformer, plan, blocks)))
        return hooks

    def _tables(self, transformer: nn.Module, plan: Plan, blocks: list[TracedBlock]) -> ConditioningTables:
        capture = None
        if self.recorder is not None:
            capture = Graphs(self.recorder, self.moment, blocks, transformer, self.schedule.steps)
            if "S" in plan.stack:
                capture.refused = "the schedule skips the stack, whose forecasts are kept outside of graphs"
            self.captures.append(capture)
        called = [step for step, action in enumerate(plan.stack) if action in ".S"]
        near = self.settings.tables == "near"
        tables = ConditioningTables(transformer, self.moment, blocks, called, self.sums, capture, near)
        self.tables.append(tables)
        if self.settings.whole_steps and capture is not None:
            steps = called_steps(self.schedule)
            self.loop = tables.loop = Loop(self.moment, capture, steps, self.schedule.sampler, self.update)
        return tables

    def reset(self) -> None:
        """Forgets the values of a run."""
        for block in self.blocks:
            block.reset()
        for tables in self.tables:
            tables.reset()
        if self.loop is not None:
            self.loop.reset()

    def differed(self) -> bool:
        """Returns whether arguments on a device were not those of the tables in the run that ends; all tables are asked."""
        found = [tables.arguments.differed() for tables in self.tables]
        return any(found)

    def counters(self) -> Counters:
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

    def path(self) -> str:
        """Returns what ran, and why graphs did not."""
        if not self.captures:
            if self.settings.graphs is not True:
                return "compiled"
            return f"compiled, no CUDA graphs: the pipeline was on {self.device.type} when the schedule was applied"
        if refused := next((capture.refused for capture in self.captures if capture.refused), None):
            return f"compiled, no CUDA graphs: {refused}"
        counters, called = self.counters(), sum(called_steps(self.schedule))
        path = f"compiled: {counters.graphs} graphs, {counters.steps_replayed}/{called} steps replayed"
        if self.loop is None:
            return path
        return f"{path}, {f'steps by the pipeline: {self.loop.refused}' if self.loop.refused else 'whole steps'}"
