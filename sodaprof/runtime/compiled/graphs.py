"""Capture: the transformer under each distinct pattern as one CUDA graph, for any pipeline.

A graph reads and writes fixed places outside of the graphs' own memory, which live as long as it does, so any order of
replays is safe: the arguments of the call and the sites' stores are copied into buffers; what the tables hold is found by a
counter on the device, so the timestep is no part of a graph's key. Filling the tables at the start of a run is a graph,
too. All graphs share one pool and one stream. The two runs that learn how the transformer is called are not captured.
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
from torch.utils._pytree import TreeSpec, tree_map, tree_unflatten

from ...pipelines.clock import Moment
from .arena import Arenas, RowBuffers
from .buffers import Packed, copy_all, expanded_copy, once, pack
from .trace import LoweredBlock, frozen_of


class Recorder(Protocol):
    """What makes graphs."""

    def missing(self, device: torch.device) -> str | None:
        """Returns why nothing can be captured on this device, None where it can."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns (replay, result) of run(): replay() does its work on the device again and changes result in place."""

    def forget(self) -> None:
        """Takes note that graphs were dropped: the next ones share nothing with them."""


class CudaGraphs:
    """Makes CUDA graphs in one pool, on one stream: never dropped one by one, for cuBLAS workspaces go by the stream.

    A pool whose graphs are all gone cannot be captured into again while a workspace lies in it: new graphs get a new pool and
    a new stream.
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
class Graph:
    """One captured pattern."""

    replay: Callable[[], None]
    arguments: list[torch.Tensor]  # buffers: the tensors of the call
    out: Any
    executed: Counter[str]  # cells
    served: Counter[str]  # as the moment counts


@dataclass
class Fill:
    """A captured filling of tables."""

    replay: Callable[[], None]
    arguments: list[torch.Tensor]  # buffers
    packed: Packed


class Capture:
    """The graphs of one transformer under one schedule."""

    def __init__(
        self, recorder: Recorder, moment: Moment, blocks: list[LoweredBlock], transformer: nn.Module, steps: int
    ) -> None:
        self.recorder, self.moment, self.blocks, self.transformer = recorder, moment, blocks, transformer
        self.steps = steps
        self.graphs: dict[Any, Graph] = {}  # by pattern
        self.known: dict[Any, Graph] = {}  # by steps and branches
        self.fills: dict[Any, Fill] = {}
        self.current: dict[int, Fill] = {}  # branch -> what filled the tables of the run under way
        self.owed: list[list[tuple[int, int]]] = []  # replayed steps and branches whose sites have no stores yet
        self.counter = torch.zeros(1, dtype=torch.int64)  # the step, on the device
        self.frozen: Any = None  # what the graphs hold: where the weights are, how the transformer is built
        self.device = torch.device("cpu")
        self.replays = 0  # of steps' graphs, in the latest run
        self.replayed: set[int] = set()  # steps of the latest run of which a call was replayed
        self.called: set[int] = set()  # steps of the latest run of which a call was not
        self.seconds = 0.0  # spent on capturing
        self.bytes = 0  # of GPU memory that the graphs' pool took
        self.refused: str | None = None  # why steps run uncaptured
        self.rows = [row for block in blocks for row in block.rows]
        self.buffers: dict[Any, list[RowBuffers]] = {}  # by the looks of the calls: of each row
        if any(row.rule is not None and row.rule.base == "random" for row in self.rows):
            self.refused = "random token scores are drawn on the host"

    def begin(self, looks: Any) -> None:
        """Begins a run: graphs read weights where they were; elsewhere now, or a module changed: all are made anew."""
        if looks not in self.buffers:
            arenas = Arenas(self.rows)
            self.buffers[looks] = [RowBuffers(arenas, row) for row in self.rows]
        for row, buffers in zip(self.rows, self.buffers[looks], strict=True):
            row.buffers = buffers
        self.current.clear()
        self.owed.clear()
        self.replays = 0
        self.replayed.clear()
        self.called.clear()
        frozen = frozen_of(self.transformer)
        if frozen != self.frozen:
            self.forget()
            self.frozen, self.device = frozen, next(self.transformer.parameters()).device
            self.counter = self.counter.to(self.device)
            self.refused = self.refused or self.recorder.missing(self.device)

    def forget(self) -> None:
        """Drops all graphs."""
        for made in (self.graphs, self.known, self.fills, self.current):
            made.clear()
        self.recorder.forget()

    def refill(self, kind: Any, branch: int, leaves: list[Any]) -> bool:
        """Fills the tables in the places that `fill` gave them, by its graph; False where there is none."""
        fill = self.fills.get(kind)
        if fill is None:
            return False
        copy_all(fill.arguments, [once(leaf) for leaf in leaves if torch.is_tensor(leaf)])
        fill.replay()
        self.current[branch] = fill
        return True

    def fill(
        self, kind: Any, branch: int, leaves: list[Any], body: Callable[[list[Any]], Any], found: Any, steps_of: Any
    ) -> Any:
        """Returns what body(leaves) found in places where `refill` writes again; None where there can be no graph of it."""
        places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        if self.refused is not None or any(leaves[i].device != self.device for i in places):
            return None
        packed, static = pack(found, steps_of, self.steps), list(leaves)
        for i in places:
            static[i] = expanded_copy(leaves[i])
        made = self._record(lambda: packed.write(body(static)))
        if made is None:
            return None
        self.fills[kind] = self.current[branch] = Fill(made[0], [once(static[i]) for i in places], packed)
        return packed.result

    def run(self, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec, kind: Any) -> Any:
        """Returns the transformer's output at a step that the tables are made for, from a graph where there can be one."""
        places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        step, branch = self.moment.step, self.moment.branch

        def body(tensors: list[torch.Tensor]) -> Any:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            args, kwargs = tree_unflatten(filled, spec)
            return forward(*args, **kwargs)

        self.counter.fill_(step)
        return self.through(kind, [(step, branch)], [leaves[i] for i in places], body, self.counter)

    def through(
        self, kind: Any, ats: list[tuple[int, int]], arguments: list[torch.Tensor],
        body: Callable[[list[torch.Tensor]], Any], counter: torch.Tensor,
    ) -> Any:  # fmt: skip
        """Returns body(arguments), which calls the transformer at these steps and branches, from a graph where there can be one.

        Whatever else body reads or writes lies where it lay; kind: all that it depends on beside tensors. counter: int64
        [1], the step.
        """
        mark = kind, *ats
        graph = self.known.get(mark) if all(branch in self.current for _, branch in ats) else None
        if graph is None:
            if self.refused is None and any(a.device != self.device for a in arguments):
                self.refused = "the pipeline calls the transformer with tensors that are not on its device"
            if self.refused is not None or any(branch not in self.current for _, branch in ats):
                self.settle(step for step, _ in ats)
                return body(arguments)
            key = kind, tuple(self._pattern(block, at) for at in ats for block in self.blocks)
            if key not in self.graphs:
                self.settle(step for step, _ in ats)
                return self._first(ats, arguments, body, counter, key)
            graph = self.known[mark] = self.graphs[key]
        if arguments:
            copy_all(graph.arguments, arguments)
        graph.replay()
        self.owed.append(ats)
        self.replays += 1
        self.replayed.update(step for step, _ in ats)
        self.moment.executed.update(graph.executed)
        self.moment.served.update(graph.served)
        return tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, graph.out)

    def settle(self, steps: Iterable[int]) -> None:
        """Lets the sites find what replayed steps left in their buffers: before a call at these steps that is not replayed."""
        self.called.update(steps)
        at, executed = (self.moment.step, self.moment.branch), self.moment.executed.copy()
        for ats in self.owed:
            for self.moment.step, self.moment.branch in ats:
                for row in self.rows:
                    row.write(self.moment, row.recall(self.moment))
        self.owed.clear()
        (self.moment.step, self.moment.branch), self.moment.executed = at, executed

    def _first(
        self, ats: list[tuple[int, int]], arguments: list[torch.Tensor], body: Callable[[list[torch.Tensor]], Any],
        counter: torch.Tensor, key: Any,
    ) -> Any:  # fmt: skip
        """Returns what the first call gives, uncaptured: that makes kernels and workspaces; then captures another."""
        before = [row.snapshot() for row in self.rows]
        executed, served = self.moment.executed.copy(), self.moment.served.copy()
        result = body(arguments)
        after = [row.snapshot() for row in self.rows]
        counted, counted_served = self.moment.executed.copy(), self.moment.served.copy()
        for row, stores in zip(self.rows, before, strict=True):
            row.memory = stores
        static = [a.clone() for a in arguments]
        known = self._kept_names()

        def run() -> Any:
            rows = {at: self.current[at[1]].packed.table.index_select(0, counter)[0] for at in ats}
            with self._reading(rows):
                out = body(static)
            if known != self._kept_names():  # they would lie in the graphs' own memory
                raise RuntimeError("a site keeps what it did not keep in the first run")
            return out

        if (made := self._record(run)) is not None:
            self.graphs[key] = Graph(made[0], static, made[1], counted - executed, counted_served - served)
        self.moment.executed, self.moment.served = counted, counted_served
        for row, stores in zip(self.rows, after, strict=True):
            row.memory = stores
        return result

    def _kept_names(self) -> list[set[Any]]:
        """Returns for each site the names under which its buffers hold something."""
        return [set(row.buffers.places) if isinstance(row.buffers, RowBuffers) else set() for row in self.rows]

    def _record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any] | None:
        """Returns (replay, result) of run() as a graph, None where it cannot be captured: then nothing is, and why is noted."""
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
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # as a capture begins with it: what it gives back is no gain of the capture
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def _pattern(self, block: LoweredBlock, at: tuple[int, int]) -> tuple[Any, ...]:
        """Returns what a block does at a step: its program, its neighbours in a sum, which buffers and values it reads."""
        run, known = block.runs.get(at), self.current[at[1]].packed.places
        place = None if run is None else (len(run.members), run.place(block))
        held = block.ready[at].values if run is None else run.factors_of(block)
        values = tuple(known.get(id(value)) for value in held)
        return (
            block.ready[at].program,
            place,
            values,
            tuple((row.cells[at[0]].arithmetic(), row.cells[at[0]].storage()) for row in block.rows),
        )

    def replayed_steps(self) -> int:
        """Returns how many steps of the latest run were replayed, with all calls of each."""
        return len(self.replayed - self.called)

    @contextmanager
    def _reading(self, rows: dict[tuple[int, int], torch.Tensor]) -> Iterator[None]:
        """Lets the blocks take the values of steps from these rows of the tables, while the block runs."""
        undo = list[Callable[[], None]]()
        for at, row in rows.items():
            known = self.current[at[1]].packed.places

            def there(value: Any, row: torch.Tensor = row, known: Any = known) -> Any:
                return known[id(value)].of(row) if id(value) in known else value

            for block in self.blocks:
                if at in block.runs:
                    undo.append(block.runs[at].swap(block, there))
                else:
                    ready = block.ready[at]
                    block.ready[at] = ready._replace(values=[there(value) for value in ready.values])
                    undo.append(lambda block=block, at=at, ready=ready: block.ready.__setitem__(at, ready))  # type: ignore[misc]
        try:
            yield
        finally:
            for one in undo:
                one()
