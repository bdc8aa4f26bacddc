"""The values of the conditioning tables: each program is split by what it depends on, and its early parts run ahead of the loop.

A part that depends on the step is computed for all its steps at once if that gives the same bits, which is tried when the
tables are filled for the first time: the matrix products of all steps are one batch of the products of the steps. With `near`
they are one larger product, and values may differ by rounding; without it, a part whose bits change in a batch takes its
operators once for each step and block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from .dependence import BlockCall
from .identity import same, signature_of, with_tensors
from .trace import TRACING, Position, Program, Ready


def draws(node: fx.Node) -> bool:
    """Returns whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def split(graph: fx.GraphModule, parameters: int, late: set[int]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Returns (early, rest): early maps the inputs to values, rest takes the inputs and these values.

    late: numbers of the inputs that are not known yet when `early` runs. The first inputs are parameters: an operator that
    depends only on them stays in the part that uses its result. Operators that draw random numbers are late.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    constant, not_yet = set(inputs[:parameters]), {inputs[i] for i in late}
    early: set[fx.Node] = set()
    work = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    for node in work:
        sources = node.all_input_nodes
        if any(n in not_yet for n in sources) or draws(node):
            not_yet.add(node)
        else:
            (constant if all(n in constant for n in sources) else early).add(node)
    passed = [node for node in work if node in early and any(u in not_yet or u.op == "output" for u in node.users)]

    first, rest = fx.Graph(), fx.Graph()
    for new, values, part in ((first, [], early), (rest, passed, not_yet)):
        copies = {node: new.placeholder(node.name) for node in inputs}
        copies |= {node: new.placeholder(f"{node.name}_early") for node in values}
        for node, copy in copies.items():
            copy.meta = dict(node.meta)
        for node in work:
            if node in constant or node in part:
                copies[node] = new.node_copy(node, copies.__getitem__)
        out = graph.graph.output_node().args[0]
        new.output([copies[node] for node in passed] if new is first else fx.map_arg(out, copies.__getitem__))
        new.eliminate_dead_code()
    return fx.GraphModule(graph, first), fx.GraphModule(graph, rest)


ATEN = torch.ops.aten
ADDMM, SPLIT, SLICE, T = ATEN.addmm.default, ATEN.split.Tensor, ATEN.slice.Tensor, ATEN.t.default


def _copied(graph: fx.GraphModule) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph.graph, {}))
    return new


def narrowed(graph: fx.GraphModule) -> fx.GraphModule:
    """Returns the graph with linear layers cut to the parts of their output that are used.

    Example: the gates of a block without the shifts and scales, which only norms take.
    """
    new = _copied(graph)
    for node in list(new.nodes):
        parts: Any = _parts_of_linear(node)
        if parts is not None:
            bias, x, weight, number, size = parts
            ends = (0, number * size, (number + 1) * size)
            with new.inserting_before(node):
                rows, offset = (new.call_function(SLICE, (tensor, *ends)) for tensor in (weight, bias))
                cut = new.call_function(ADDMM, (offset, x, new.call_function(T, (rows,))))
            node.replace_all_uses_with(cut)
    new.eliminate_dead_code()
    return fx.GraphModule(graph, new)


def with_affine(graph: fx.GraphModule) -> fx.GraphModule:
    """Returns the graph with each linear layer as `affine`."""
    new = _copied(graph)
    for node in new.nodes:
        if node.target is ADDMM and not node.kwargs:
            node.target = affine
    return fx.GraphModule(graph, new)


class Parts(NamedTuple):
    """A program in three parts: for a run, for each step, and the rest, which takes the values of the other two."""

    of_run: fx.GraphModule
    of_step: fx.GraphModule
    rest: fx.GraphModule


def parts_of(graph: fx.GraphModule, parameters: int, late: set[int], changing: set[int]) -> Parts:
    """Returns the graph in parts; late, changing: numbers of the inputs that depend on the latents, or only on the step."""
    of_run, rest = split(graph, parameters, late | changing)
    of_step, rest = split(rest, parameters, late)
    return Parts(of_run, of_step, rest)


class Affine(torch.autograd.Function):
    """bias + x @ weight, whose batch over steps is one operator, rounded once as the operator of one step is.

    If the weights are batched as well it is one product for each step, else one product of all steps.
    """

    @staticmethod
    def forward(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.addmm(bias, x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Saves nothing: there is no backward pass."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, bias: Any, x: Any, weight: Any) -> tuple[torch.Tensor, int]:
        if in_dims == (None, 0, None):
            return torch.addmm(bias, x.flatten(0, 1), weight).unflatten(0, x.shape[:2]), 0
        bias, x, weight = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((bias, x, weight), in_dims, strict=True)
        )
        bias = bias.reshape(bias.shape[0], *(1,) * (3 - bias.dim()), *bias.shape[1:])
        return torch.baddbmm(bias, x, weight), 0


def affine(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = Affine.apply(bias, x, weight)
    return out


# how much values may differ with `near`: the larger of so many roundings and this share of the largest number
NEAR_ROUNDINGS, NEAR_SHARE = 4, 1e-5


class Filler:
    """Computes the values of blocks, one block after the other, so that the weights of a block stay in the processor's cache.

    near: all steps as one product, equal except for rounding, instead of the same bits.
    """

    def __init__(self, near: bool = False) -> None:
        self.near = near
        self.parts: dict[Any, Parts] = {}  # by program and its late and changing inputs
        self.at_once: dict[fx.GraphModule, fx.GraphModule | None] = {}  # part of a step -> graph whose batch equals it
        self.batches: dict[Any, fx.GraphModule] = {}  # traced batches, by graph, number of steps and inputs

    def fill(self, call: BlockCall, steps: Sequence[int], branch: int) -> dict[Position, Ready]:
        """Returns the values of the block at these steps, as far as a program that runs there is known."""
        block, parameters = call.block, call.block.parameters()
        takes = cache(lambda program: block.takes(program, call.leaves))
        by_program = dict[Program, list[int]]()
        for step in steps:
            if (program := next(filter(takes, block.by_step.get((step, branch), ())), None)) is not None:
                by_program.setdefault(program, []).append(step)
        found = dict[Position, Ready]()
        for program, its_steps in by_program.items():
            parts = self._parts(program, call)
            inputs = [call.inputs(step, program.places) for step in its_steps]
            of_run = parts.of_run.forward(*parameters, *inputs[0])
            of_steps = self.of_steps(parts, parameters, inputs, of_run)
            for step, values in zip(its_steps, of_steps, strict=True):
                found[step, branch] = Ready(program, parts.rest, [*of_run, *values])
        return found

    def of_steps(
        self, parts: Parts, parameters: list[Any], inputs: list[list[Any]], of_run: list[Any]
    ) -> list[list[Any]]:
        """Returns the values of each step, from the inputs of each."""
        each = parts.of_step

        def one_by_one() -> list[list[Any]]:
            return [each.forward(*parameters, *at_step, *of_run) for at_step in inputs]

        if len(inputs) == 1 or not each.graph.output_node().args[0]:
            return one_by_one()
        if each in self.at_once:
            whole = self.at_once[each]
            return one_by_one() if whole is None else self._batched(whole, parameters, inputs, of_run)
        values = one_by_one()
        self.at_once[each] = None
        cut, layout_counts = narrowed(each), not _only_scales(parts.rest)
        tries = [(with_affine(cut), layout_counts), (cut, layout_counts), (with_affine(each), True), (each, True)]
        equal = close if self.near else same
        for whole, strict in tries:
            try:
                tried = self._batched(whole, parameters, inputs, of_run)
            except RuntimeError:  # an operator without a rule for batches
                continue
            pairs = [(a, b) for xs, ys in zip(values, tried, strict=True) for a, b in zip(xs, ys, strict=True)]
            if all(equal(a, b) and (not strict or a.stride() == b.stride()) for a, b in pairs):
                self.at_once[each] = whole
                return tried if self.near else values  # the same values in every run
        return values

    def _parts(self, program: Program, call: BlockCall) -> Parts:
        late, changing, arguments = call.late, call.changing, len(call.leaves)
        key = program, frozenset(late), frozenset(changing)
        if key not in self.parts:
            count = program.parameters
            not_yet = {count + n for n, i in enumerate(program.places) if i in late or i >= arguments}
            on_step = {count + n for n, i in enumerate(program.places) if i in changing}
            self.parts[key] = parts_of(program.graph, count, not_yet, on_step)
        return self.parts[key]

    def _batched(
        self, each: fx.GraphModule, parameters: list[Any], inputs: list[list[Any]], of_run: list[Any]
    ) -> list[list[Any]]:
        """Returns the values of all steps, computed at once."""
        steps, columns = len(inputs), list(zip(*inputs, strict=True))
        used = [bool(node.users) for node in each.graph.nodes if node.op == "placeholder"]
        differs = [any(x is not column[0] for x in column) for column in columns]
        if not any(differ and use for differ, use in zip(differs, used[len(parameters) :], strict=False)):
            first = [column[0] for column in columns]
            return [list(each(*parameters, *first, *of_run)) for _ in range(steps)]
        # the weights are batched, too, with a stride of 0: all steps are then one product each, as in the step itself
        weights = parameters if self.near else [p.expand(steps, *p.shape) for p in parameters]
        rows = [torch.stack(column) if differ else column[0] for column, differ in zip(columns, differs, strict=True)]
        flat, batched = [*weights, *rows, *of_run], [*[not self.near] * len(weights), *differs, *[False] * len(of_run)]
        places = [i for i, use in enumerate(used) if use]
        tensors, dims = [flat[i] for i in places], tuple(0 if batched[i] else None for i in places)
        key = each, steps, dims, *map(signature_of, tensors)
        if key not in self.batches:

            def of_step(*tensors: torch.Tensor) -> list[Any]:
                return list(each(*with_tensors([None] * len(flat), places, tensors)))

            with TRACING:
                self.batches[key] = make_fx(torch.func.vmap(of_step, in_dims=dims))(*tensors)
        values = self.batches[key].forward(*tensors)
        return [list(of_one) for of_one in zip(*(v.unbind() for v in values), strict=True)]


def _parts_of_linear(node: fx.Node) -> tuple[Any, ...] | None:
    """Returns (bias, input, weight, number, size) if the node takes one of the equal parts of a linear layer, else None.

    Returns None, too, if all parts are used.
    """
    if node.op != "call_function" or node.target is not getitem or node.args[0].target is not SPLIT:  # type: ignore[union-attr]
        return None
    split: Any = node.args[0]
    linear, size, *dim = split.args
    whole = linear.target is ADDMM and linear.args[2].target is T and linear.args[2].args[0].op == "placeholder"
    if not whole or dim != [1] or linear.args[0].op != "placeholder" or list(linear.users) != [split] or linear.kwargs:
        return None
    if len(split.users) * size >= linear.meta["val"].shape[1]:
        return None
    return linear.args[0], linear.args[1], linear.args[2].args[0], node.args[1], size


def _only_scales(rest: fx.GraphModule) -> bool:
    """Returns whether the rest of a program only multiplies and adds the values: then their layout changes no bit."""
    values = [node for node in rest.graph.nodes if node.op == "placeholder" and node.name.endswith("_early")]
    return all(user.target in (ATEN.add.Tensor, ATEN.mul.Tensor) for value in values for user in value.users)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two tensors are equal except for a few roundings."""
    if not a.is_floating_point() or a.shape != b.shape or a.dtype != b.dtype:
        return same(a, b)
    # fp32 sums differ by the order of their terms, narrower ones by the rounding of the result
    allowed = max(NEAR_ROUNDINGS * torch.finfo(a.dtype).eps, NEAR_SHARE) * a.abs().max()
    return bool((a - b).abs().max() <= allowed)
