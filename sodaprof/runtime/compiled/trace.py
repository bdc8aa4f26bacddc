"""Lowering: each block traced under its cells, through the hooks of its sites, and cleaned of what nobody reads.

Norms, modulation and conditioning in front of a module that is not run vanish, without a copy of any model's forward.
A program is a function of tensors alone: parameters are inputs, so blocks that are built alike share it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from torch import fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ...errors import SodaprofError, UnsupportedModelError
from ...pipelines.clock import Moment
from ..hooks.cells import CellInputs, CellResult
from ..hooks.sites import SiteRow

PLAIN = (bool, int, float, str, type(None))
LEAVES = {*PLAIN, torch.Tensor, nn.Parameter}
CONTAINERS = {tuple, list, dict, CellInputs}
MODULES_OWN = {*vars(nn.Module()), "_diffusers_hook"} - {"training"}  # attributes that say nothing of how it is built


@dataclass(frozen=True, eq=False)
class Program:
    """A block under its cells: graph(*parameters, *tensors of the call) -> leaves of (output, what each site made)."""

    graph: fx.GraphModule
    made: TreeSpec
    parameters: int  # how many of the graph's inputs are parameters, the first ones
    key: Any  # what it was traced for
    places: list[int]  # of the other inputs among the leaves of (args, kwargs, what the sites are given)

    def structured(self, found: list[Any]) -> tuple[Any, list[CellResult]]:
        """Returns the block's output and what each site made, from what the graph returned."""
        out: tuple[Any, list[CellResult]] = tree_unflatten(found, self.made)
        return out


class Ready(NamedTuple):
    """What is left of a program at a step, and the values that it takes beside its inputs."""

    program: Program
    rest: fx.GraphModule
    values: list[Any]


class Tracer:
    """Stands in for the rows' stores while a block is traced: what each site is given, and what it makes."""

    def __init__(self, rows: list[SiteRow], given: list[CellInputs], step: int) -> None:
        self.given, self.step = {row.key: g for row, g in zip(rows, given, strict=True)}, step
        self.made: dict[str, CellResult] = {}

    def run(self, row: SiteRow, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self.given[row.key]
        source = self.made.get(row.scored_by.key) if row.scored_by is not None else None
        if source is not None and source.statistic is not None:  # taken at this step, a moment ago
            given = given._replace(scored=source.statistic)
        made = self.made[row.key] = row.act(self.step, given, forward, args, kwargs)
        return made.out


class LoweredBlock(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a block that runs its programs, traced at their first use and kept in `programs`."""

    def __init__(
        self, path: str, block: nn.Module, rows: list[SiteRow], moment: Moment, programs: dict[Any, Program]
    ) -> None:
        super().__init__()
        self.path, self.block, self.rows, self.moment, self.programs = path, block, rows, moment, programs
        self.built: Any = None
        self.known: dict[Any, Program] = {}  # built as it was last: by all else that a program is bound to
        self.known_built: Any = None
        self.tensors: list[tuple[dict[str, Any], str]] = []  # where the block's parameters and buffers are found
        self.names: list[str] = []
        # for conditioning tables
        self.by_step: dict[
            tuple[int, int], list[Program]
        ] = {}  # (step, branch) -> programs that ran, of all batch sizes
        self.ready: dict[tuple[int, int], Ready] = {}
        self.runs: dict[tuple[int, int], Any] = {}  # collapsed with its neighbours
        self.listener: BlockCall | None = None  # is told arguments and output of the next call
        self.answer: tuple[Any] | None = None  # stands still: returns this, notes what it was asked
        self.asked: list[Any] = []

    def reset(self) -> None:
        """Forgets the values of a run; notices what was built into the block since: adapters, other processors."""
        self.built = None
        self.ready.clear()
        self.runs.clear()

    def parameters(self) -> list[torch.Tensor]:
        """Returns parameters and buffers as they are now, in the order in which programs take them."""
        if self.built is None:
            self._look()
        return [found[name] for found, name in self.tensors]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.built is None:
            self._look()
        if self.answer is not None:
            self.asked = tree_flatten((args, kwargs))[0]
            return self.answer[0]
        at, tabled = (self.moment.step, self.moment.branch), self.moment.tabled
        if tabled and at in self.runs and not torch.is_grad_enabled():
            return self.runs[at].call(self.moment, args, kwargs)
        given = [row.read(self.moment) for row in self.rows]
        leaves = leaves_of((args, kwargs, given), [])
        if tabled and at in self.ready:  # called as it was when the tables were made: no need to look again
            program, graph, values = self.ready[at]
            self.moment.served["blocks"] += 1
        else:
            program, values = self._program((args, kwargs, given), leaves, at), []
            graph = program.graph
        found = graph.forward(*self.parameters(), *[leaves[i] for i in program.places], *values)
        out, made = program.structured(found)
        if self.listener is not None:
            self.listener.leaves, self.listener.out = tree_flatten((args, kwargs))[0], out
        for row, one in zip(self.rows, made, strict=True):
            row.write(self.moment, one)
        return out

    def _program(self, call: tuple[Any, ...], leaves: list[Any], at: tuple[int, int]) -> Program:
        """Returns the program for these arguments at this step, traced where there is none yet."""
        cells = tuple([row.cells[at[0]].arithmetic() for row in self.rows])
        kinds = tuple([kind_of(leaf) for leaf in leaves])
        settings = torch.is_autocast_enabled(), torch.get_default_dtype()
        mark = cells, form_of(call), kinds, *settings
        program = self.known.get(mark)
        if program is None:
            spec = tree_flatten(call)[1]
            key = self.built, cells, spec, kinds, *settings
            program = self.programs.get(key)
            if program is None:
                program = self.programs[key] = self._trace(key, leaves, spec, at[0])
            self.known[mark] = program
        if program not in (ran := self.by_step.setdefault(at, [])):
            ran.append(program)
        return program

    def fits(self, program: Program, leaves: list[Any]) -> bool:
        """Whether a program noted before is still that of a call with these arguments; after `parameters`, which looks."""
        now = (
            self.built,
            tuple(kind_of(leaf) for leaf in leaves),
            torch.is_autocast_enabled(),
            torch.get_default_dtype(),
        )
        built, _, _, kinds, *settings = program.key
        return now == (built, kinds[: len(leaves)], *settings)

    def _look(self) -> None:
        """Notes how the block is built, and where its parameters are: read at each call, so that new weights count."""
        self.names, self.tensors = [], []
        for prefix, module in self.block.named_modules():
            for found in (module._parameters, module._buffers):
                for name, value in found.items():
                    if value is not None:
                        self.names.append(f"{prefix}.{name}" if prefix else name)
                        self.tensors.append((found, name))
        shapes = tuple(kind_of(found[name]) for found, name in self.tensors)
        sites = tuple(
            (row.key.split(".", 2)[2], row.tokens, row.raster, row.rule,
             None if row.scored_by is None else row.scored_by.key.split(".", 2)[2])
            for row in self.rows
        )  # fmt: skip
        built = (tuple(self.names), shapes, build_of(self.block), sites)
        if built != self.known_built:
            self.known.clear()
            # one object for all that are built alike, which is compared and hashed at once
            self.known_built = next((p.key[0] for p in self.programs.values() if p.key[0] == built), built)
        self.built = self.known_built

    def _trace(self, key: Any, leaves: list[Any], spec: TreeSpec, step: int) -> Program:
        constants = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        made_spec: list[TreeSpec] = []

        def run(*flat: torch.Tensor) -> list[Any]:
            filled = list(constants)
            for place, tensor in zip(places, flat[len(self.names) :], strict=True):
                filled[place] = tensor
            args, kwargs, given = tree_unflatten(filled, spec)
            tracer = Tracer(self.rows, given, step)
            for row in self.rows:
                row.runner = tracer
            parameters = {f"block.{name}": value for name, value in zip(self.names, flat, strict=False)}
            out = functional_call(Bare(self.block, self.fn_ref.original_forward), parameters, args, kwargs)
            missing = [row.key for row in self.rows if row.key not in tracer.made]
            if missing:
                raise UnsupportedModelError(
                    f"{missing[0]} was not called by its block. Run the schedule without lowering."
                )
            found, made = tree_flatten((out, [tracer.made[row.key] for row in self.rows]))
            made_spec.append(made)
            return found

        self.moment.forward += 1  # a site's first call under the trace is its first
        try:
            with torch.no_grad():
                # fake tensors: a branch on data is refused here instead of being baked into the program
                trace = make_fx(functionalize(run), tracing_mode="fake", _allow_non_fake_inputs=True)
                graph = trace(*self.parameters(), *[leaves[i] for i in places])
        except SodaprofError:  # a site's own word: another resolution, an output of another kind
            raise
        except Exception as error:  # whatever an operator says that cannot be traced
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UnsupportedModelError(
                f"{self.path} ({type(self.block).__name__}) cannot be lowered, it depends on data or has an operator that "
                f"cannot be traced ({type(error).__name__}: {first}). Run the schedule without lowering: apply(pipe, schedule)."
            ) from error
        finally:
            for row in self.rows:
                row.runner = None
        graph.graph.eliminate_dead_code()
        graph.recompile()
        self.moment.programs += 1
        return Program(graph, made_spec[-1], len(self.names), key, places)


class Bare(nn.Module):
    """A block without what others hooked to it: that runs around its program, and must not run within it, too."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.run = block, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


@dataclass
class BlockCall:
    """How one block is called in the run under way."""

    block: LoweredBlock
    leaves: list[Any] = field(default_factory=list)  # its arguments at step 0
    out: Any = None  # its output at step 0
    late: set[int] = field(default_factory=set)  # arguments that depend on the latents
    handed: bool = False  # the next block takes its output, and nobody else does
    changed: dict[int, dict[int, Any]] = field(default_factory=dict)  # step -> argument -> value, where it changes

    @property
    def moving(self) -> set[int]:
        return {i for values in self.changed.values() for i in values}

    def at(self, step: int) -> list[Any]:
        """Returns its arguments at a step; those that depend on the latents as they were at step 0."""
        changed = self.changed.get(step, {})
        return [changed.get(i, leaf) for i, leaf in enumerate(self.leaves)]


def leaves_of(tree: Any, into: list[Any]) -> list[Any]:
    """Returns the leaves of a call as `tree_flatten` orders them, added to `into`, without the time that it takes."""
    for value in tree.values() if type(tree) is dict else tree:
        kind = type(value)
        if kind in LEAVES:
            into.append(value)
        elif kind in CONTAINERS:
            leaves_of(value, into)
        else:
            into += tree_leaves(value)
    return into


def form_of(tree: Any) -> Any:
    """Returns the structure of a call, to compare with another's."""
    parts = [
        form_of(v) if (kind := type(v)) in CONTAINERS else None if kind in LEAVES else tree_flatten(v)[1]
        for v in (tree.values() if type(tree) is dict else tree)
    ]
    return type(tree), tuple(tree) if type(tree) is dict else None, *parts


def kind_of(leaf: Any) -> Any:
    """Returns what a program is bound to of an argument: all of a plain value, the looks of a tensor."""
    if torch.is_tensor(leaf):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    if not isinstance(leaf, Hashable):
        raise UnsupportedModelError(
            f"A block is called with a {type(leaf).__name__}. Run the schedule without lowering."
        )
    return leaf


def build_of(block: nn.Module) -> tuple[Any, ...]:
    """Returns how a module is built: classes and settings of its modules and of what these hold, its own name aside.

    Whatever a trace would bake in counts, an adapter's scale or a processor's, so that a change of it is noticed.
    """
    return tuple((name, type(module), setting_of(vars(module))) for name, module in block.named_modules())


def frozen_of(module: nn.Module) -> tuple[Any, ...]:
    """Returns what a graph of the module freezes: how it is built, and where its parameters and buffers lie."""
    found: list[Any] = []
    for part in module.modules():
        found.append(type(part))
        for name, value in vars(part).items():
            if name not in MODULES_OWN:
                found.append(value if type(value) in PLAIN else setting_of(value))
            elif name in ("_parameters", "_buffers"):
                found += [None if t is None else (t.data_ptr(), t.shape, t.dtype) for t in value.values()]
    return tuple(found)


def setting_of(value: Any, depth: int = 0) -> Any:
    """Returns what a trace would bake in of an attribute of a module, to compare."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, tuple | list):
        return tuple(setting_of(v, depth + 1) for v in value)
    if isinstance(value, set | frozenset):
        return frozenset(setting_of(v, depth + 1) for v in value)
    if isinstance(value, dict):
        return tuple((key, setting_of(v, depth + 1)) for key, v in value.items() if key not in MODULES_OWN)
    if isinstance(value, torch.Tensor):  # a constant of the trace, which keeps it alive
        return id(value), value._version
    if isinstance(value, FunctionType | BuiltinFunctionType | type | torch.dtype | torch.device):
        return value
    if not isinstance(value, nn.Module) and hasattr(value, "__dict__") and depth < 3:
        return type(value), setting_of(vars(value), depth + 1)
    return type(value)
