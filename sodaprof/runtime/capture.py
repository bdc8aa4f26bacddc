"""Capture: the transformer under each distinct pattern as one CUDA graph, for any pipeline.

A graph reads and writes fixed places: the arguments of the call, what the tables hold for the step, and the sites'
stores are copied into buffers that live as long as the graphs, so any order of replays is safe and the timestep is no
part of a graph's key. All graphs share one pool and one stream. The first step of a run, which fills the tables, is not
captured; neither is the run that notes how the transformer is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_map, tree_unflatten

from ..models.clock import Moment
from .arena import Arenas
from .lower import LoweredBlock, build_of


class Recorder(Protocol):
    """What makes graphs."""

    def missing(self, device: torch.device) -> str | None:
        """Returns why nothing can be captured on this device, None where it can."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns (replay, result) of run(): replay() does its work on the device again and changes result in place."""


class CudaGraphs:
    """Makes CUDA graphs in one pool, on one stream: never dropped one by one, for cuBLAS workspaces go by the stream."""

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


@dataclass
class Graph:
    """One captured pattern."""

    replay: Callable[[], None]
    arguments: list[torch.Tensor]  # buffers: the tensors of the call
    values: list[torch.Tensor]  # buffers: what the blocks take from the tables
    loaded: list[torch.Tensor | None]  # whose numbers the value buffers hold
    out: Any

    def load(self, arguments: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Copies in what this step is called with; values that are there already (text, of all steps) are not copied."""
        news = [i for i, value in enumerate(values) if self.loaded[i] is not value]
        torch._foreach_copy_(
            [*self.arguments, *(self.values[i] for i in news)], [*arguments, *(values[i] for i in news)]
        )
        for i in news:
            self.loaded[i] = values[i]


class Capture:
    """The graphs of one transformer under one schedule."""

    def __init__(self, recorder: Recorder, moment: Moment, blocks: list[LoweredBlock], transformer: nn.Module) -> None:
        self.recorder, self.moment, self.blocks, self.transformer = recorder, moment, blocks, transformer
        self.graphs: dict[Any, Graph] = {}
        self.frozen: Any = None  # what the graphs hold: where the weights are, how the transformer is built
        self.device = torch.device("cpu")
        self.seconds = 0.0  # spent on capturing
        self.bytes = 0  # of GPU memory that the graphs' pool took
        self.refused: str | None = None  # why steps run uncaptured
        self.rows = [row for block in blocks for row in block.rows]
        self.buffers: dict[Any, tuple[Arenas, list[dict[Any, Any]]]] = {}  # by the looks of the calls: of each row
        if any(row.rule is not None and row.rule.base == "random" for row in self.rows):
            self.refused = "random token scores are drawn on the host"

    def begin(self, looks: Any) -> None:
        """Begins a run: graphs read weights where they were; elsewhere now, or a module changed: all are made anew."""
        if looks not in self.buffers:
            self.buffers[looks] = Arenas(self.rows), [{} for _ in self.rows]
        arenas, buffers = self.buffers[looks]
        for row, mine in zip(self.rows, buffers, strict=True):
            row.buffers, row.make_buffer = mine, arenas.make
        weights = tuple((name, t.data_ptr(), t.shape, t.dtype) for name, t in _tensors(self.transformer))
        frozen = weights, build_of(self.transformer)
        if frozen != self.frozen:
            self.graphs.clear()
            self.frozen, self.device = frozen, _tensors(self.transformer)[0][1].device
            self.refused = self.refused or self.recorder.missing(self.device)

    def run(self, forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec, looks: Any) -> Any:
        """Returns the transformer's output at a step that the tables are made for, from a graph where there can be one."""
        places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]

        def body(tensors: list[torch.Tensor]) -> Any:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            args, kwargs = tree_unflatten(filled, spec)
            return forward(*args, **kwargs)

        return self.through(looks, [(self.moment.step, self.moment.branch)], [leaves[i] for i in places], body)

    def through(
        self, looks: Any, ats: list[tuple[int, int]], arguments: list[torch.Tensor],
        body: Callable[[list[torch.Tensor]], Any],
    ) -> Any:  # fmt: skip
        """Returns body(arguments), which calls the transformer at these steps and branches, from a graph where there can be one.

        Whatever else body reads or writes lies where it lay; looks: all that it depends on beside tensors.
        """
        if self.refused is None and any(a.device != self.device for a in arguments):
            self.refused = "the pipeline calls the transformer with tensors that are not on its device"
        if self.refused is not None or any(at not in block.ready for block in self.blocks for at in ats):
            return body(arguments)
        key = looks, tuple(_pattern(block, at) for at in ats for block in self.blocks)
        values = [value for at in ats for held in self._values(at) for value in held]
        graph = self.graphs.get(key)
        if graph is None:
            return self._first(ats, arguments, body, key, values)
        graph.load(arguments, values)
        graph.replay()
        for self.moment.step, self.moment.branch in ats:
            for row in self.rows:
                row.write(self.moment, row.recall(self.moment))
        return tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, graph.out)

    def _first(
        self, ats: list[tuple[int, int]], arguments: list[torch.Tensor], body: Callable[[list[torch.Tensor]], Any],
        key: Any, values: list[torch.Tensor],
    ) -> Any:  # fmt: skip
        """Returns what the first call gives, uncaptured: that makes kernels and workspaces; then captures another."""
        before = [row.snapshot() for row in self.rows]
        result = body(arguments)
        after, executed = [row.snapshot() for row in self.rows], self.moment.executed.copy()
        for row, stores in zip(self.rows, before, strict=True):
            row.stores = stores
        graph = self._capture(ats, arguments, body, values)
        if graph is not None:
            self.graphs[key] = graph
        self.moment.executed = executed
        for row, stores in zip(self.rows, after, strict=True):
            row.stores = stores
        return result

    def _capture(
        self, ats: list[tuple[int, int]], arguments: list[torch.Tensor], body: Callable[[list[torch.Tensor]], Any],
        values: list[torch.Tensor],
    ) -> Graph | None:  # fmt: skip
        began, reserved = time.perf_counter(), self._reserved()
        static, buffers = [a.clone() for a in arguments], [value.clone() for value in values]
        try:
            with torch.no_grad(), self._reading(ats, buffers):
                known = [list(row.buffers or ()) for row in self.rows]
                replay, out = self.recorder.capture(lambda: body(static))
                if known != [list(row.buffers or ()) for row in self.rows]:
                    raise RuntimeError(
                        "a site keeps what it did not keep in the first run"
                    )  # in the graphs' own memory
        except RuntimeError as error:  # out of memory, or an operator that cannot be captured
            self.graphs.clear()
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self.refused = f"the capture failed ({first})"
            return None
        finally:
            self.seconds += time.perf_counter() - began
            self.bytes += max(0, self._reserved() - reserved)
        return Graph(replay, static, buffers, list(values), out)

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def _values(self, at: tuple[int, int]) -> Iterator[list[torch.Tensor]]:
        """What each block takes from the tables at a step: tensors, in their order."""
        for block in self.blocks:
            held = block.runs[at].factors_of(block) if at in block.runs else block.ready[at][2]
            yield [value for value in held if torch.is_tensor(value)]

    @contextmanager
    def _reading(self, ats: list[tuple[int, int]], buffers: list[torch.Tensor]) -> Iterator[None]:
        """Lets the blocks take the buffers instead of the values, while the block runs."""
        queue, undo = iter(buffers), list[Callable[[], None]]()
        for at in ats:
            for block in self.blocks:
                if at in block.runs:
                    undo.append(block.runs[at].swap(block, queue))
                else:
                    ready = block.ready[at]
                    block.ready[at] = (*ready[:2], [next(queue) if torch.is_tensor(v) else v for v in ready[2]])
                    undo.append(lambda block=block, at=at, ready=ready: block.ready.__setitem__(at, ready))  # type: ignore[misc]
        try:
            yield
        finally:
            for one in undo:
                one()


def _pattern(block: LoweredBlock, at: tuple[int, int]) -> tuple[Any, ...]:
    """Returns what a block does at a step: its program, its neighbours in a sum, and which buffers its sites use."""
    run = block.runs.get(at)
    place = None if run is None else (len(run.members), run.place(block))
    return block.ready[at][0], place, tuple(row.places(at[0]) for row in block.rows)


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
