"""Traced blocks: each block's operators under its cells as a graph, without code whose result nothing reads.

Norms, modulation and conditioning in front of a module that does not run are absent from the graph, and no model's forward is
copied. A program is a function of tensors only. Parameters are inputs, so blocks that are built alike share a program.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from torch import fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...errors import SodaprofError, UnsupportedModelError
from ...formats.sites import SiteKey
from ...pipelines.clock import Moment
from ..hooks.cells import CellInputs, CellResult
from ..hooks.sites import SiteRow
from .buffers import TableValue
from .identity import (
    CONTAINERS,
    Stored,
    build_of,
    form_of,
    leaves_of,
    refuse_subclasses,
    signature_of,
    stored_tensors,
    tensor_places,
    tensors_now,
    with_tensors,
)

Position = tuple[int, int]  # step and branch
TRACING = threading.RLock()  # torch traces in one thread at a time


class Key(NamedTuple):
    """All that a program is bound to, except how its block is built."""

    cells: tuple[Any, ...]  # what the output of each site depends on besides tensors
    form: Any  # structure of (args, kwargs, inputs of the cells)
    signatures: tuple[Any, ...]  # of their leaves
    settings: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A block under its cells: graph(*parameters, *tensors of the call) -> (output, fields of each site's CellResult)."""

    graph: fx.GraphModule
    parameters: int  # how many of the graph's first inputs are parameters
    places: list[int]  # of the other inputs among the leaves of (args, kwargs, inputs of the cells)
    key: Key


Programs = dict[Any, dict[Key, Program]]  # by the build of the block


class Ready(NamedTuple):
    """The rest of a program at one step, and the values from the conditioning tables that it takes."""

    program: Program
    rest: fx.GraphModule
    values: list[Any]  # a TableValue is read from the row of its step


class TracedCells:
    """Runs the cells of a block's sites while the block is traced: from given inputs, without the sites' memory."""

    def __init__(self, rows: list[SiteRow], inputs: list[CellInputs], step: int) -> None:
        self.inputs, self.step = {row.key: one for row, one in zip(rows, inputs, strict=True)}, step
        self.results: dict[str, CellResult] = {}

    def run(self, row: SiteRow, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = self.inputs[row.key]
        source = self.results.get(row.scored_by.key) if row.scored_by is not None else None
        if source is not None and source.statistic is not None:  # observed earlier in this call of the block
            inputs = inputs._replace(scored=source.statistic)
        result = self.results[row.key] = row.act(self.step, inputs, forward, args, kwargs)
        return result.out


class TracedBlock(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a block that runs its programs, traced at their first use and kept in `programs`."""

    def __init__(self, path: str, block: nn.Module, rows: list[SiteRow], moment: Moment, programs: Programs) -> None:
        super().__init__()
        self.path, self.block, self.rows, self.moment, self.programs = path, block, rows, moment, programs
        self.known: dict[Key, Program] | None = None  # programs of the block as it is built; None: not read in this run
        self.tensors: Stored = []  # its parameters and buffers
        # the rest is for the conditioning tables
        self.by_step: dict[Position, list[Program]] = {}  # programs that ran there, of all batch sizes
        self.ready: dict[Position, Ready] = {}
        self.sums: dict[Position, Any] = {}  # this block's members of cached sums
        self.table_rows: dict[Position, torch.Tensor] = {}  # rows of a table, in which a TableValue has its place
        self.recorded: Any = None  # the `BlockCall` that the next call fills in
        self.stub: tuple[Any] | None = None  # what the block returns without running

    def reset(self) -> None:
        """Drops the values of a run; a change of the block since (an adapter, another processor) is noticed afterwards."""
        self.known = None
        self.ready.clear()
        self.sums.clear()
        self.table_rows.clear()

    def parameters(self) -> list[torch.Tensor]:
        """Returns parameters and buffers as they are now, in the order in which programs take them."""
        if self.known is None:
            self.known = self._known()
        return tensors_now(self.tensors)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.recorded is not None:
            self.recorded.leaves = tree_flatten((args, kwargs))[0]
        if self.stub is not None:
            return self.stub[0]
        position, tabled = (self.moment.step, self.moment.branch), self.moment.tabled
        if tabled and position in self.sums and not torch.is_grad_enabled():
            return self.sums[position].call(self.moment, args, kwargs)
        inputs, parameters = [row.read(self.moment) for row in self.rows], self.parameters()
        leaves, values = leaves_of((args, kwargs, inputs), []), list[Any]()
        if tabled and position in self.ready:  # called as when the tables were made: the signature needs no check
            program, graph, values = self.ready[position]
            if (row := self.table_rows.get(position)) is not None:
                values = [value.read(row) if type(value) is TableValue else value for value in values]
            self.moment.served["blocks"] += 1
        else:
            program = self._program((args, kwargs, inputs), leaves, position)
            graph = program.graph
        out, results = graph.forward(*parameters, *[leaves[i] for i in program.places], *values)
        if self.recorded is not None:
            self.recorded.out = out
        for site_row, result in zip(self.rows, results, strict=True):
            site_row.write(self.moment, CellResult(*result))
        return out

    def takes(self, program: Program, leaves: list[Any]) -> bool:
        """Returns whether a call with these arguments still runs the program; call `parameters` first, which reads the build."""
        key, signatures = program.key, tuple(map(signature_of, leaves))
        alike = (key.signatures[: len(leaves)], key.settings) == (signatures, settings_now())
        return alike and self.known is not None and self.known.get(key) is program

    def _program(self, call: tuple[Any, ...], leaves: list[Any], position: Position) -> Program:
        """Returns the program for these arguments at this step, traced if there is none yet."""
        assert self.known is not None
        cells = tuple([row.cells[position[0]].arithmetic() for row in self.rows])
        key = Key(cells, form_of(call), tuple(map(signature_of, leaves)), settings_now())
        program = self.known.get(key)
        if program is None:
            program = self.known[key] = self._trace(key, call, position[0])
        if program not in (ran := self.by_step.setdefault(position, [])):
            ran.append(program)
        return program

    def _known(self) -> dict[Key, Program]:
        """Returns the programs of all blocks that are built as this one is now; finds where its parameters are stored."""
        modules = list(self.block.named_modules())
        refuse_subclasses(self.path, modules)
        self.tensors = stored_tensors(modules)
        sites = tuple(
            (
                SiteKey.parse(row.key).name,
                row.tokens,
                row.raster,
                row.rule,
                row.scored_by and SiteKey.parse(row.scored_by.key).name,
            )
            for row in self.rows
        )
        paths, signatures = tuple(path for path, _, _ in self.tensors), map(signature_of, tensors_now(self.tensors))
        return self.programs.setdefault((paths, *signatures, build_of(modules), sites), {})

    def _trace(self, key: Key, call: tuple[Any, ...], step: int) -> Program:
        leaves, spec = tree_flatten(call)

        def run(forward: Callable[..., Any], filled: list[Any]) -> tuple[Any, list[tuple[Any, ...]]]:
            args, kwargs, inputs = tree_unflatten(filled, spec)
            cells = TracedCells(self.rows, inputs, step)
            for row in self.rows:
                row.runner = cells.run
            out = forward(args, kwargs)
            if missing := [row.key for row in self.rows if row.key not in cells.results]:
                raise UnsupportedModelError(
                    f'{missing[0]} was not called by its block. Run the schedule with runtime="hooks".'
                )
            if not torch.is_tensor(out) and type(out) not in CONTAINERS:
                raise UnsupportedModelError(
                    f'{self.path} returns a {type(out).__name__}. Run the schedule with runtime="hooks".'
                )
            return out, [
                tuple(cells.results[row.key]) for row in self.rows
            ]  # a named tuple would be an operator of the graph

        self.moment.forward += 1  # the first call of a site while it is traced is its first in a forward pass
        try:
            graph, places = graph_of(self.block, self.fn_ref.original_forward, self.tensors, leaves, run)
        except SodaprofError:  # raised by a site: another resolution, an output of another kind
            raise
        except Exception as error:  # any error of an operator that cannot be traced
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UnsupportedModelError(
                f"{self.path} ({type(self.block).__name__}) cannot be traced: it depends on data or has an operator that "
                f'cannot be traced ({type(error).__name__}: {first}). Run the schedule with runtime="hooks".'
            ) from error
        finally:
            for row in self.rows:
                row.runner = None
        self.moment.programs += 1
        return Program(graph, len(self.tensors), places, key)


def settings_now() -> tuple[Any, ...]:
    """Returns the settings of torch that a traced program is bound to."""
    return torch.is_autocast_enabled(), torch.get_default_dtype()


def graph_of(
    module: nn.Module,
    forward: Callable[..., Any],
    tensors: Stored,
    leaves: Sequence[Any],
    run: Callable[[Callable[..., Any], list[Any]], Any],
) -> tuple[fx.GraphModule, list[int]]:
    """Returns (graph, places): run(bare, leaves) as a graph of the parameters and the leaves in these places, its tensors.

    bare(args, kwargs) is the module's forward with the traced parameters. Tensors are fake: a branch on data fails and becomes no
    constant. There is no dead code.
    """
    paths, places = [f"module.{path}" for path, _, _ in tensors], tensor_places(leaves)

    def of_tensors(*flat: torch.Tensor) -> Any:
        parameters, bare = dict(zip(paths, flat, strict=False)), Bare(module, forward)
        filled = with_tensors(leaves, places, flat[len(paths) :])
        return run(lambda args, kwargs: functional_call(bare, parameters, args, kwargs), filled)

    with torch.no_grad(), TRACING:
        trace = make_fx(functionalize(of_tensors), tracing_mode="fake", _allow_non_fake_inputs=True)
        graph = trace(*tensors_now(tensors), *(leaves[i] for i in places))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, places


class Bare(nn.Module):
    """A module without the hooks of others: they run around its program and must not run inside it as well."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.run = module, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)
