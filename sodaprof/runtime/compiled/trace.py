"""Traced blocks: each block's operators under its cells as a graph, without code whose result nothing reads.

Norms, modulation and conditioning in front of a module that does not run are absent from the graph, and no model's forward is
copied. A program is a function of tensors only. Parameters are inputs, so blocks that are built alike share a program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from torch import fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import SodaprofError, UnsupportedModelError
from ...formats.sites import SiteKey
from ...pipelines.clock import Moment
from ..hooks.cells import CellInputs, CellResult
from ..hooks.sites import SiteRow
from .buffers import TableValue
from .identity import build_of, form_of, leaves_of, signature_of, stored_tensors

Position = tuple[int, int]  # step and branch


@dataclass(frozen=True, eq=False)
class Program:
    """A block under its cells: graph(*parameters, *tensors of the call) -> leaves of (output, result of each site)."""

    graph: fx.GraphModule
    results: TreeSpec  # structure of (output, results of the sites)
    parameters: int  # how many of the graph's first inputs are parameters
    key: Any  # all that the program is bound to
    places: list[int]  # of the other inputs among the leaves of (args, kwargs, inputs of the cells)

    def structured(self, found: list[Any]) -> tuple[Any, list[CellResult]]:
        """Returns the block's output and the result of each site, from the leaves that the graph returned."""
        out: tuple[Any, list[CellResult]] = tree_unflatten(found, self.results)
        return out


class Ready(NamedTuple):
    """The rest of a program at one step, and the values from the conditioning tables that it takes."""

    program: Program
    rest: fx.GraphModule
    values: list[Any]  # a TableValue is read from the row of the step's table


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


@dataclass
class RecordedCall:
    """The arguments and the output of one call of a block."""

    leaves: list[Any]
    out: Any = None


class TracedBlock(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a block that runs its programs, traced at their first use and kept in `programs`."""

    def __init__(
        self, path: str, block: nn.Module, rows: list[SiteRow], moment: Moment, programs: dict[Any, Program]
    ) -> None:
        super().__init__()
        self.path, self.block, self.rows, self.moment, self.programs = path, block, rows, moment, programs
        self.built: Any = None  # how the block is built; None: not read in this run
        self.known: dict[Any, Program] = {}  # programs of the latest build, by all else that they are bound to
        self.known_built: Any = None
        self.tensors: list[tuple[str, dict[str, Any], str]] = []  # where the parameters and buffers are stored
        # the rest is for the conditioning tables
        self.by_step: dict[Position, list[Program]] = {}  # programs that ran there, of all batch sizes
        self.ready: dict[Position, Ready] = {}
        self.sums: dict[Position, Any] = {}  # cached sums that the block belongs to
        self.table_rows: Mapping[
            Position, torch.Tensor
        ] = {}  # rows to read table values from, while a graph is recorded
        self.recorded: RecordedCall | None = None  # filled by the next call
        self.stub: tuple[Any] | None = None  # stubbed: the block returns this and records its inputs
        self.recorded_inputs: list[Any] = []

    def reset(self) -> None:
        """Drops the values of a run; a change of the block since (an adapter, another processor) is noticed afterwards."""
        self.built = None
        self.ready.clear()
        self.sums.clear()

    def parameters(self) -> list[torch.Tensor]:
        """Returns parameters and buffers as they are now, in the order in which programs take them."""
        if self.built is None:
            self._read_build()
        return [found[name] for _, found, name in self.tensors]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.built is None:
            self._read_build()
        if self.stub is not None:
            self.recorded_inputs = tree_flatten((args, kwargs))[0]
            return self.stub[0]
        position, tabled = (self.moment.step, self.moment.branch), self.moment.tabled
        if tabled and position in self.sums and not torch.is_grad_enabled():
            return self.sums[position].call(self.moment, args, kwargs)
        inputs = [row.read(self.moment) for row in self.rows]
        leaves = leaves_of((args, kwargs, inputs), [])
        if tabled and position in self.ready:  # called as when the tables were made: the signature needs no check
            program, graph, values = self.ready[position]
            row = self.table_rows.get(position)
            values = [value.read(row) if type(value) is TableValue else value for value in values]
            self.moment.served["blocks"] += 1
        else:
            program, values = self._program((args, kwargs, inputs), leaves, position), []
            graph = program.graph
        found = graph.forward(*self.parameters(), *[leaves[i] for i in program.places], *values)
        out, results = program.structured(found)
        if self.recorded is not None:
            self.recorded.leaves, self.recorded.out = tree_flatten((args, kwargs))[0], out
        for site_row, result in zip(self.rows, results, strict=True):
            site_row.write(self.moment, result)
        return out

    def _program(self, call: tuple[Any, ...], leaves: list[Any], position: Position) -> Program:
        """Returns the program for these arguments at this step, traced if there is none yet."""
        cells = tuple([row.cells[position[0]].arithmetic() for row in self.rows])
        signatures = tuple([signature_of(leaf) for leaf in leaves])
        settings = torch.is_autocast_enabled(), torch.get_default_dtype()
        known_key = cells, form_of(call), signatures, *settings
        program = self.known.get(known_key)
        if program is None:
            spec = tree_flatten(call)[1]
            key = self.built, cells, spec, signatures, *settings
            program = self.programs.get(key)
            if program is None:
                program = self.programs[key] = self._trace(key, leaves, spec, position[0])
            self.known[known_key] = program
        if program not in (ran := self.by_step.setdefault(position, [])):
            ran.append(program)
        return program

    def takes(self, program: Program, leaves: list[Any]) -> bool:
        """Returns whether a call with these arguments still runs the program; call `parameters` first, which reads the build."""
        signatures = tuple(signature_of(leaf) for leaf in leaves)
        now = self.built, signatures, torch.is_autocast_enabled(), torch.get_default_dtype()
        built, _, _, traced, *settings = program.key
        return now == (built, traced[: len(leaves)], *settings)

    def _read_build(self) -> None:
        """Reads how the block is built and where its parameters are stored; each call reads them there, so new weights count."""
        self.tensors = stored_tensors(self.block.named_modules())
        names = tuple(path for path, _, _ in self.tensors)
        signatures = tuple(signature_of(found[name]) for _, found, name in self.tensors)
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
        built = (names, signatures, build_of(self.block), sites)
        if built != self.known_built:
            self.known.clear()
            # one object for all blocks that are built alike: it compares equal by identity
            self.known_built = next((p.key[0] for p in self.programs.values() if p.key[0] == built), built)
        self.built = self.known_built

    def _trace(self, key: Any, leaves: list[Any], spec: TreeSpec, step: int) -> Program:
        constants = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        names = [f"block.{path}" for path, _, _ in self.tensors]
        results: list[TreeSpec] = []

        def run(*flat: torch.Tensor) -> list[Any]:
            filled = list(constants)
            for place, tensor in zip(places, flat[len(names) :], strict=True):
                filled[place] = tensor
            args, kwargs, inputs = tree_unflatten(filled, spec)
            cells = TracedCells(self.rows, inputs, step)
            for row in self.rows:
                row.runner = cells.run
            parameters = dict(zip(names, flat, strict=False))
            out = functional_call(Bare(self.block, self.fn_ref.original_forward), parameters, args, kwargs)
            missing = [row.key for row in self.rows if row.key not in cells.results]
            if missing:
                raise UnsupportedModelError(
                    f'{missing[0]} was not called by its block. Run the schedule with runtime="hooks".'
                )
            found, structure = tree_flatten((out, [cells.results[row.key] for row in self.rows]))
            results.append(structure)
            return found

        self.moment.forward += 1  # the first call of a site while it is traced is its first in a forward pass
        try:
            with torch.no_grad():
                graph = graph_of(run, [*self.parameters(), *(leaves[i] for i in places)])
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
        return Program(graph, results[-1], len(names), key, places)


def graph_of(run: Callable[..., list[Any]], inputs: list[Any]) -> fx.GraphModule:
    """Returns run(*inputs) as a graph without dead code. Fake tensors: a branch on data fails and becomes no constant."""
    graph = make_fx(functionalize(run), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


class Bare(nn.Module):
    """A block without the hooks of others: they run around its program and must not run inside it as well."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.run = block, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)
