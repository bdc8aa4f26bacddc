"""What a run's conditioning tables hold: each program split by what it depends on, its early parts computed ahead.

A part that depends on the step is computed for all its steps in one go where that gives the same bits, which is tried
at the first fill: matrix products of all steps are one batch of the step's own products, not one larger product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .lower import BlockCall, Program


def split(graph: fx.GraphModule, parameters: int, late: set[int]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Returns (early, rest): early maps the inputs to values, rest takes the inputs and these values.

    late: numbers of the inputs that are not there yet when `early` runs. The first inputs are parameters: what depends
    on them alone stays where it is used. What draws random numbers is late.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    plain, not_yet = set(inputs[:parameters]), {inputs[i] for i in late}
    early: set[fx.Node] = set()
    work = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    for node in work:
        above = node.all_input_nodes
        if any(n in not_yet for n in above) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            not_yet.add(node)
        else:
            (plain if all(n in plain for n in above) else early).add(node)
    handed = [node for node in work if node in early and any(u in not_yet or u.op == "output" for u in node.users)]

    first, rest = fx.Graph(), fx.Graph()
    for new, values, mine in ((first, [], early), (rest, handed, not_yet)):
        copies = {node: new.placeholder(node.name) for node in inputs}
        copies |= {node: new.placeholder(f"{node.name}_early") for node in values}
        for node, copy in copies.items():
            copy.meta = dict(node.meta)
        for node in work:
            if node in plain or node in mine:
                copies[node] = new.node_copy(node, copies.__getitem__)
        out = next(node for node in graph.graph.nodes if node.op == "output")
        new.output([copies[node] for node in handed] if new is first else fx.map_arg(out.args[0], copies.__getitem__))
        new.eliminate_dead_code()
    return fx.GraphModule(graph, first), fx.GraphModule(graph, rest)


class Filler:
    """Fills the tables of blocks, one after the other, so that a block's weights stay near."""

    def __init__(self) -> None:
        self.parts: dict[Any, tuple[fx.GraphModule, ...]] = {}  # of programs, by what is late and what moves
        self.at_once: dict[fx.GraphModule, bool] = {}  # parts of a step: whether all steps at once give the same bits

    def fill(self, call: BlockCall, steps: int, branch: int) -> None:
        """Computes the block's values of all steps to come."""
        block, by_program = call.block, dict[Program, list[int]]()
        for step in range(1, steps):
            if program := block.by_step.get((step, branch)):
                by_program.setdefault(program, []).append(step)
        parameters = block.parameters()
        for program, its_steps in by_program.items():
            if not block.fits(program, call.leaves):
                continue
            run, each, rest = self._parts(program, call)
            leaves = [[call.changed[s].get(i, leaf) for i, leaf in enumerate(call.leaves)] for s in its_steps]
            inputs = [[at_step[i] if i < len(at_step) else None for i in program.places] for at_step in leaves]
            of_run = run(*parameters, *inputs[0])
            for step, values in zip(its_steps, self._of_steps(each, parameters, inputs, of_run), strict=True):
                block.ready[step, branch] = program, rest, [*of_run, *values]

    def _of_steps(
        self, each: fx.GraphModule, parameters: list[Any], inputs: list[list[Any]], of_run: list[Any]
    ) -> list[list[Any]]:
        def one(at_step: list[Any]) -> list[Any]:
            return each(*parameters, *at_step, *of_run)

        if len(inputs) == 1 or self.at_once.get(each) is False:
            return [one(at_step) for at_step in inputs]
        batched = _batched(each, len(inputs), parameters, inputs, of_run)
        if each in self.at_once:
            return batched()
        values = [one(at_step) for at_step in inputs]
        try:
            tried = batched()
        except RuntimeError:  # an operator that knows no batches
            self.at_once[each] = False
            return values
        pairs = [(a, b) for xs, ys in zip(values, tried, strict=True) for a, b in zip(xs, ys, strict=True)]
        self.at_once[each] = all(same(a, b) and a.stride() == b.stride() for a, b in pairs)
        return values

    def _parts(self, program: Program, call: BlockCall) -> tuple[fx.GraphModule, ...]:
        late, moving, arguments = call.late, call.moving, len(call.leaves)
        mark = program, frozenset(late), frozenset(moving)
        if mark not in self.parts:
            count = program.parameters
            not_yet = {count + n for n, i in enumerate(program.places) if i in late or i >= arguments}
            moved = {count + n for n, i in enumerate(program.places) if i in moving}
            run, rest = split(program.graph, count, not_yet | moved)
            self.parts[mark] = run, *split(rest, count, not_yet)
        return self.parts[mark]


def _batched(
    each: fx.GraphModule, steps: int, parameters: list[Any], inputs: list[list[Any]], of_run: list[Any]
) -> Callable[[], list[list[Any]]]:
    """Returns a function of nothing that gives the values of all steps at once."""
    columns = list(zip(*inputs, strict=True))
    moves = [any(x is not column[0] for x in column) for column in columns]
    used = [bool(node.users) for node in each.graph.nodes if node.op == "placeholder"]

    def run() -> list[list[Any]]:
        # weights batched, too, by a stride of 0: so a product of all steps is one product a step, as in the step itself
        fixed = [p.expand(steps, *p.shape) for p in parameters]
        rows = [torch.stack(column) if move else column[0] for column, move in zip(columns, moves, strict=True)]
        flat = [x if use else None for x, use in zip([*fixed, *rows, *of_run], used, strict=True)]
        places = [*(0 for _ in fixed), *(0 if move else None for move in moves), *(None for _ in of_run)]
        dims = tuple(place if use else None for place, use in zip(places, used, strict=True))
        values = torch.func.vmap(each, in_dims=dims)(*flat)
        return [[value[i] for value in values] for i in range(steps)]

    return run


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, tensors in all their elements."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    return a is b or (not torch.is_tensor(a) and not torch.is_tensor(b) and bool(a == b))
