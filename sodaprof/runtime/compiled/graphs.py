"""Graphs: the transformer under each distinct pattern as one CUDA graph, for any pipeline.

A graph reads and writes fixed places outside of the graphs' own memory, which live as long as the graph, so replays may come in
any order. The arguments of the call and the memory of the sites are copied into buffers. Values of the conditioning tables are
found by a counter on the device, so the timestep is no part of a graph's key. Filling the tables at the start of a run is a
graph, too. All graphs share one pool and one stream. The two runs that record and probe the transformer's calls are not captured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...pipelines.clock import Moment
from .buffers import Arenas, Packed, RowBuffers, TableValue, compact, copy_all, expanded_copy, pack
from .dependence import TransformerCall
from .identity import build_of, stored_tensors, tensor_places, tensors_now, with_tensors
from .trace import Position, TracedBlock


class Recorder(Protocol):
    """Makes graphs."""

    def missing(self, device: torch.device) -> str | None:
        """Returns why nothing can be captured on this device, None if it can."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns (replay, result) of run(): replay() does its work on the device again and updates result in place."""

    def forget(self) -> None:
        """Is called when all graphs are dropped: later ones share nothing with them."""


class CudaGraphs:
    """Makes CUDA graphs in one pool, on one stream. They are dropped only all at once: cuBLAS keeps a workspace for a stream.

    A pool whose graphs are all dropped cannot be captured into again while it holds a workspace, so new graphs get a new
    pool and a new stream.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: Any = None

    def missing(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"CUDA graphs need a GPU, the transformer is on {device.type}"

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.pool is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    def forget(self) -> None:
        self.pool = self.stream = None


@dataclass
class StepsCall:
    """Calls of the transformer at some steps and branches as one function; all else that it reads or writes stays in place."""

    variant: Any  # all that `body` depends on except tensors
    positions: list[Position]
    arguments: list[torch.Tensor]
    body: Callable[[list[torch.Tensor]], Any]  # takes the arguments
    counter: torch.Tensor  # int64 [1], the step


@dataclass
class Graph:
    """One captured pattern."""

    replay: Callable[[], None]
    arguments: list[torch.Tensor]  # buffers for the tensors of the call
    out: Any
    executed: Counter[str]  # cells
    served: Counter[str]  # as `Moment.served` counts


@dataclass
class Fill:
    """A captured filling of tables."""

    replay: Callable[[], None]
    arguments: list[torch.Tensor]  # buffers
    packed: Packed


class Graphs:
    """The graphs of one transformer under one schedule."""

    def __init__(
        self, recorder: Recorder, moment: Moment, blocks: list[TracedBlock], transformer: nn.Module, steps: int
    ) -> None:
        self.recorder, self.moment, self.blocks, self.transformer = recorder, moment, blocks, transformer
        self.steps = steps
        self.graphs: dict[Any, Graph] = {}  # by pattern
        self.known: dict[Any, Graph] = {}  # the same graphs by steps and branches
        self.fills: dict[Any, Fill] = {}
        self.current: dict[int, Fill] = {}  # branch -> what filled the tables of the run that runs now
        self.pending_replays: list[list[Position]] = []  # replayed, and not yet in the memory of the sites
        self.counter = torch.zeros(1, dtype=torch.int64)  # the step, on the device
        self.frozen: Any = None  # what the graphs depend on: where the weights are, how the transformer is built
        self.device = torch.device("cpu")
        self.replays = 0  # of steps' graphs, in the latest run
        self.replayed: set[int] = set()  # steps of the latest run with a replayed call
        self.called: set[int] = set()  # steps of the latest run with a call that was not replayed
        self.seconds = 0.0  # spent on capturing
        self.bytes = 0  # of GPU memory that the graphs' pool took
        self.refused: str | None = None  # why steps run without graphs
        self.rows = [row for block in blocks for row in block.rows]
        self.buffers: dict[Any, list[RowBuffers]] = {}  # of each row, by signature of the calls
        self.row_buffers: list[RowBuffers] = []  # those of the run that runs now
        if any(row.rule is not None and row.rule.base == "random" for row in self.rows):
            self.refused = "random token scores are drawn on the host"

    def begin(self, signature: Any) -> None:
        """Begins a run; drops all graphs if weights have moved or a module has changed."""
        if signature not in self.buffers:
            arenas = Arenas(self.rows)
            self.buffers[signature] = [RowBuffers(arenas, row) for row in self.rows]
        self.row_buffers = self.buffers[signature]
        for row, buffers in zip(self.rows, self.row_buffers, strict=True):
            row.buffers = buffers
        self.current.clear()
        self.pending_replays.clear()
        self.replays = 0
        self.replayed.clear()
        self.called.clear()
        modules = list(self.transformer.named_modules())
        weights = tensors_now(stored_tensors(modules))
        frozen = build_of(modules), [(weight.data_ptr(), weight.shape, weight.dtype) for weight in weights]
        if frozen != self.frozen:
            self.forget()
            self.frozen, self.device = frozen, next(self.transformer.parameters()).device
            self.counter = self.counter.to(self.device)
            self.refused = self.refused or self.recorder.missing(self.device)

    def forget(self) -> None:
        """Drops all graphs."""
        for graphs in (self.graphs, self.known, self.fills, self.current):
            graphs.clear()
        self.recorder.forget()

    def refill(self, variant: int, branch: int, leaves: list[Any]) -> bool:
        """Fills the tables in the places that `fill` returned, by its graph; returns False if there is none."""
        fill = self.fills.get(variant)
        if fill is None:
            return False
        copy_all(fill.arguments, [compact(leaves[i]) for i in tensor_places(leaves)])
        fill.replay()
        self.current[branch] = fill
        return True

    def fill(
        self,
        variant: int,
        branch: int,
        leaves: list[Any],
        body: Callable[[list[Any]], Any],
        found: tuple[Any, list[Any]],
    ) -> Packed | None:
        """Returns `found` = body(leaves) in places that `refill` writes again; None if there can be no graph of it.

        found: the values that hold for the run, and those of each step (`pack`).
        """
        places = tensor_places(leaves)
        if self.refused is not None or any(leaves[i].device != self.device for i in places):
            return None
        packed = pack(*found)
        static = [expanded_copy(leaves[i]) for i in places]
        recorded = self._record(lambda: packed.write(body(with_tensors(leaves, places, static))))
        if recorded is None:
            return None
        self.fills[variant] = self.current[branch] = Fill(recorded[0], [compact(tensor) for tensor in static], packed)
        return packed

    def run(self, call: TransformerCall, variant: int) -> Any:
        """Returns the transformer's output at a step with tables, from a graph if there can be one."""
        places, step = tensor_places(call.leaves), self.moment.step

        def body(tensors: list[torch.Tensor]) -> Any:
            return call.output(with_tensors(call.leaves, places, tensors))

        self.counter.fill_(step)
        tensors = [call.leaves[i] for i in places]
        return self.through(StepsCall(variant, [(step, self.moment.branch)], tensors, body, self.counter))

    def through(self, call: StepsCall) -> Any:
        """Returns the result of the call, from a graph if there can be one."""
        positions, arguments = call.positions, call.arguments
        known_key = call.variant, *positions
        tabled = all(branch in self.current for _, branch in positions)
        graph = self.known.get(known_key) if tabled else None
        if graph is None:
            if self.refused is None and any(a.device != self.device for a in arguments):
                self.refused = "the pipeline calls the transformer with tensors that are not on its device"
            if self.refused is not None or not tabled:
                self.sync_stores(step for step, _ in positions)
                return call.body(arguments)
            key = call.variant, tuple(self._pattern(block, position) for position in positions for block in self.blocks)
            if key not in self.graphs:
                self.sync_stores(step for step, _ in positions)
                return self._first_call(key, call)
            graph = self.known[known_key] = self.graphs[key]
        if arguments:
            copy_all(graph.arguments, arguments)
        graph.replay()
        self.pending_replays.append(positions)
        self.replays += 1
        self.replayed.update(step for step, _ in positions)
        self.moment.executed.update(graph.executed)
        self.moment.served.update(graph.served)
        return tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, graph.out)

    def sync_stores(self, steps: Iterable[int]) -> None:
        """Puts what replayed steps left in the buffers into the memory of the sites, before calls at these steps that read it."""
        self.called.update(steps)
        now, executed = (self.moment.step, self.moment.branch), self.moment.executed.copy()
        for positions in self.pending_replays:
            for self.moment.step, self.moment.branch in positions:
                for row in self.rows:
                    row.write(self.moment, row.recall(self.moment))
        self.pending_replays.clear()
        (self.moment.step, self.moment.branch), self.moment.executed = now, executed

    def replayed_steps(self) -> int:
        """Returns how many steps of the latest run were replayed, with all calls of each."""
        return len(self.replayed - self.called)

    def _first_call(self, key: Any, call: StepsCall) -> Any:
        """Returns the result of the call without a graph: that makes kernels and workspaces. Then captures a second call."""
        before = [row.snapshot() for row in self.rows]
        executed, served = self.moment.executed.copy(), self.moment.served.copy()
        result = call.body(call.arguments)
        after = [row.snapshot() for row in self.rows]
        executed_after, served_after = self.moment.executed.copy(), self.moment.served.copy()
        for row, memory in zip(self.rows, before, strict=True):
            row.memory = memory
        static = [a.clone() for a in call.arguments]
        kept = [set(buffers.places) for buffers in self.row_buffers]  # their names

        def run() -> Any:
            tables = {position: self.current[position[1]].packed.table for position in call.positions}
            with self._reading({p: table.index_select(0, call.counter)[0] for p, table in tables.items()}):
                out = call.body(static)
            if kept != [
                set(buffers.places) for buffers in self.row_buffers
            ]:  # new ones would lie in the graphs' own memory
                raise RuntimeError("a site keeps what it did not keep in the first run")
            return out

        if (recorded := self._record(run)) is not None:
            replay, out = recorded
            self.graphs[key] = Graph(replay, static, out, executed_after - executed, served_after - served)
        self.moment.executed, self.moment.served = executed_after, served_after
        for row, memory in zip(self.rows, after, strict=True):
            row.memory = memory
        return result

    def _record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any] | None:
        """Returns (replay, result) of run() as a graph; None if it cannot be captured, after which nothing is captured."""
        began, reserved = time.perf_counter(), self._reserved()
        try:
            with torch.no_grad():
                return self.recorder.capture(run)
        except RuntimeError as error:  # out of memory, or an operator that cannot be captured
            self.forget()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self.refused = f"the capture failed ({first})"
            return None
        finally:
            self.seconds += time.perf_counter() - began
            self.bytes += max(0, self._reserved() - reserved)

    def _reserved(self) -> int:
        """Returns the bytes that torch has reserved on the GPU."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()  # a capture begins with it: memory that it frees does not count for the capture
        return torch.cuda.memory_reserved(self.device)

    def _pattern(self, block: TracedBlock, position: Position) -> tuple[Any, ...]:
        """Returns what a block does at a step: program, place in a cached sum, places of its table values, buffers."""
        ready, member = block.ready[position], block.sums.get(position)
        values = ready.values if member is None else member.factors.values()
        slots = tuple(value if isinstance(value, TableValue) else None for value in values)
        cells = tuple((cell.arithmetic(), cell.storage()) for cell in (row.cells[position[0]] for row in block.rows))
        return ready.program, None if member is None else member.place(), slots, cells

    @contextmanager
    def _reading(self, rows: dict[Position, torch.Tensor]) -> Iterator[None]:
        """Makes the blocks read their table values from these rows."""
        before = [block.table_rows for block in self.blocks]
        for block in self.blocks:
            block.table_rows = rows
        try:
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                block.table_rows = own
