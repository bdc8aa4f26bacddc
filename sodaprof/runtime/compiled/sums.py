"""Cached sums: consecutive blocks that compute nothing become one weighted sum of what their sites kept.

Such a block is x + sum of gate * output, with its gates from the conditioning tables, so no norm between the blocks is needed.
This is read from the rest of its program, not from the code of a model. In order, the sum gives the bits of the blocks; fused,
it is taken in one accumulator without rounding in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import TreeSpec, tree_leaves, tree_structure, tree_unflatten

from ...errors import MismatchError
from ...pipelines.clock import Moment
from ..hooks.cells import CellResult
from . import kernels
from .buffers import TableValue
from .dependence import BlockCall
from .identity import leaves_of
from .streams import Kept, Stream, StreamReader, Term
from .trace import Position, Ready, TracedBlock

EMPTY_RESULT, ONE = CellResult(None), torch.tensor(1.0, device="cpu")
Added = tuple[list[torch.Tensor], Term, torch.Tensor | None]  # kept outputs, how they are added, the gate


class Scalars(dict[tuple[float, torch.dtype], torch.Tensor]):
    """(weight, dtype of what is weighted) -> the weight as a tensor without dimensions.

    A product with it has the bits of a product with the number. For a number, torch makes such a tensor at every use, which
    takes half of the time of a small network's product.
    """

    def __missing__(self, key: tuple[float, torch.dtype]) -> torch.Tensor:
        weight, dtype = key
        self[key] = torch.tensor(weight, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
        return self[key]


@lru_cache
def adds_products(dtype: torch.dtype) -> bool:
    """Returns whether one addcmul on a CPU gives the bits of a product with a weight and its addition, found by trying.

    It computes sum + (weight * tensor) * 1, in which an FMA of the last two changes no bit. It does not round the products of
    narrow types.
    """
    noise = torch.Generator().manual_seed(0)
    total, tensor = torch.randn(2, 4099, generator=noise, dtype=torch.float64, device="cpu").to(dtype)
    both = torch.equal(total.addcmul(tensor, ONE, value=1 / 3), total + tensor * (1 / 3))
    return both and dtype in (torch.float32, torch.float64)


@dataclass
class Member:
    """A block of a cached sum at one step."""

    block: TracedBlock
    streams: tuple[Stream | None, ...]
    out: TreeSpec
    factors: dict[int, torch.Tensor | TableValue]  # number of a program's input -> gate
    arguments: int  # leaves of the block's call before the kept outputs
    sum: CachedSum

    def call(self, moment: Moment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the output of the block: the sum over all blocks, taken at the call of the first."""
        leaves = leaves_of((args, kwargs), [])
        if self is self.sum.members[0]:
            self.sum.take(moment, leaves)
        elif any(
            s is not None and leaves[s.origin] is not x for s, x in zip(self.streams, self.sum.outputs, strict=True)
        ):
            raise MismatchError(
                f"{self.block.path} is not given the output of the block before it, as it was in the run before. Run the "
                "schedule without cached sums: apply(pipe, schedule, runtime=Compiled(sums=None))."
            )
        return tree_unflatten(self.sum.outputs, self.out)

    def place(self) -> tuple[int, int]:
        """Returns the number of blocks in the sum, and the number of this one."""
        return len(self.sum.members), next(i for i, member in enumerate(self.sum.members) if member is self)

    def terms(self, moment: Moment) -> list[list[Added]]:
        """Returns what the block adds to each of its streams; writes the memory of its sites, which keep nothing."""
        kept_outputs = leaves_of([row.read(moment) for row in self.block.rows], [])
        table_row = self.block.table_rows.get((moment.step, moment.branch))
        added: list[list[Added]] = []
        for stream in self.streams:
            added.append([])
            for term in stream.terms if stream is not None else ():
                outputs = [_viewed(kept_outputs[kept.leaf - self.arguments], kept) for kept in term.kept]
                gate = None if term.factor is None else self.factors[term.factor]
                if isinstance(gate, TableValue):
                    assert table_row is not None
                    gate = gate.read(table_row)
                added[-1].append((outputs, term, gate))
        for row in self.block.rows:
            row.write(moment, EMPTY_RESULT)
        return added


@dataclass
class CachedSum:
    """A cached sum of consecutive blocks at one step on one branch; each takes what the block before returns."""

    sums: Sums
    members: list[Member] = field(default_factory=list)
    outputs: list[torch.Tensor | None] = field(default_factory=list)  # what every block returns and the next is given

    def take(self, moment: Moment, leaves: list[Any]) -> None:
        """Takes the sum, from the arguments of the first block."""
        moment.served["sums"] += 1
        of_members = [member.terms(moment) for member in self.members]
        added = [[term for terms in streams for term in terms] for streams in zip(*of_members, strict=True)]
        first, last = self.members[0].streams, self.members[-1].streams
        self.outputs = [
            None if begin is None or end is None else self._sum(moment, leaves[begin.origin], terms, end)
            for begin, terms, end in zip(first, added, last, strict=True)
        ]

    def _sum(self, moment: Moment, start: torch.Tensor, added: list[Added], stream: Stream) -> torch.Tensor:
        total, add = _Total(start, self.sums.scalars), _fused if self.sums.fused else _ordered
        if on_gpu(start) and self._by_kernel(total, added):
            moment.served["kernel sums"] += 1
        else:
            for outputs, term, factor in added:
                add(total, outputs, term, factor)
        return total.result(stream)

    def _by_kernel(self, total: _Total, added: list[Added]) -> bool:
        """Adds all terms in one launch; returns False if they do not lie in one arena or a gate differs between tokens."""
        arena = added[0][0][0]._base if added else None
        start, gates = total.value, [factor for _, _, factor in added]
        if arena is None or arena.shape[1:] != start.shape or not kernels.available():
            return False
        gate_shape = (start.shape[0], 1, start.shape[2])  # of a gate that is the same for all tokens
        flat = [
            g is None or (g.dtype == start.dtype and torch.broadcast_shapes(g.shape, gate_shape) == gate_shape)
            for g in gates
        ]
        kept = [(output, part) for outputs, term, _ in added for output, part in zip(outputs, term.kept, strict=True)]
        if not all(flat) or any(output._base is not arena or part.views for output, part in kept):
            return False
        size = start.numel()
        terms = tuple(
            (tuple((o.storage_offset() // size, part.weight) for o, part in zip(outs, term.kept, strict=True)), g is not None)
            for (outs, term, _), g in zip(added, gates, strict=True)
        )  # fmt: skip
        plans = self.sums.plans
        if (plan := plans.get((terms, start.device))) is None:
            plan = plans[terms, start.device] = kernels.plan_of(terms, start.device)
        unread = start.new_empty(gate_shape)
        rows = [(unread if gate is None else gate).expand(gate_shape)[:, 0] for gate in gates]
        total.value = kernels.sum_kept(start, arena, plan, torch.stack(rows), not self.sums.fused)
        return True


def on_gpu(tensor: torch.Tensor) -> bool:
    """Returns whether the kernel can take the tensor. On a CPU it runs in Triton's interpreter only, for tests."""
    return tensor.is_cuda


class _Total:
    """A partial sum: its first addition makes a new tensor, the others add to that in place."""

    def __init__(self, start: torch.Tensor, scalars: Scalars) -> None:
        self.value, self.dtype, self.shape, self.own = start.contiguous(), start.dtype, tuple(start.shape), False
        self.scalars, self.adds = scalars, start.device.type == "cpu" and adds_products(start.dtype)
        self.buffer: torch.Tensor | None = None  # for one term after the other

    def viewed(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the partial sum in the shape of a block's stream; a view is made only if the shape changes."""
        if self.shape != shape:
            self.value, self.shape, self.buffer = self.value.view(shape), shape, None
        return self.value

    def result(self, stream: Stream) -> torch.Tensor:
        """Returns the sum with the layout of the blocks' own output, on which the last bits of later operators may depend."""
        value = self.value.view(stream.shape)
        if value.stride() == stream.stride and value.dtype == self.dtype:
            return value
        return torch.empty_strided(stream.shape, stream.stride, dtype=self.dtype, device=value.device).copy_(value)


def _ordered(total: _Total, outputs: list[torch.Tensor], term: Term, factor: torch.Tensor | None) -> None:
    """Adds a term with the roundings of the block's own operators."""
    value, part = total.viewed(term.shape), outputs[0]
    buffer = total.buffer = torch.empty_like(value) if total.buffer is None else total.buffer
    for i, (output, kept) in enumerate(zip(outputs, term.kept, strict=True)):
        if kept.weight is None:  # the only one
            break
        if i and total.adds and part is buffer and output.dtype is total.dtype:
            buffer.addcmul_(output, ONE, value=kept.weight)
        elif i:
            part.add_(output * total.scalars[kept.weight, output.dtype])
        else:
            in_buffer = output.dtype is total.dtype and output.shape == term.shape
            part = torch.mul(output, total.scalars[kept.weight, output.dtype], out=buffer if in_buffer else None)
    if factor is not None:
        part = torch.mul(factor, part, out=buffer)
    total.value = value.add_(part) if total.own else value + part
    total.own = True


def _fused(total: _Total, outputs: list[torch.Tensor], term: Term, factor: torch.Tensor | None) -> None:
    """Adds a term in fp32 (or wider) without rounding to the stream's dtype."""
    if not total.own:
        total.value = total.value.to(torch.promote_types(total.dtype, torch.float32), copy=True)
        total.own = True
    value = total.viewed(term.shape)
    for output, kept in zip(outputs, term.kept, strict=True):
        weight = 1.0 if kept.weight is None else kept.weight
        if factor is None:
            value.add_(output, alpha=weight)
        else:
            value.addcmul_(factor, output, value=weight)


def _viewed(output: torch.Tensor, kept: Kept) -> torch.Tensor:
    for view, arguments in kept.views:
        output = view(output, *arguments)
    return output


class Sums:
    """Finds the cached sums of a schedule's steps, once the conditioning tables of a run are filled."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        self.plans: dict[Any, kernels.Plan] = {}
        self.scalars = Scalars()
        self.streams: dict[fx.GraphModule, tuple[Stream | None, ...] | None] = {}  # by rest of a program

    def members(self, calls: list[BlockCall], ready: list[dict[Position, Ready]]) -> list[dict[Position, Member]]:
        """Returns the members of each block that is only a sum; consecutive blocks share a sum if each feeds the next.

        ready: of each block, its programs and their values.
        """
        found: list[dict[Position, Member]] = [{} for _ in calls]
        for position in {position for of_block in ready for position in of_block}:
            before: tuple[BlockCall, Member] | None = None
            for call, of_block, members in zip(calls, ready, found, strict=True):
                member = self._member(call, of_block[position], position[0]) if position in of_block else None
                if member is None:
                    before = None
                    continue
                if before is not None and _feeds(before[0], call, member):
                    member.sum = before[1].sum
                member.sum.members.append(member)
                members[position] = member
                before = call, member
        return found

    def _member(self, call: BlockCall, ready: Ready, step: int) -> Member | None:
        """Returns the block as a member of a sum of its own; None if it computes something at this step."""
        block, (program, rest, values) = call.block, ready
        if not all(row.cells[step].reuses for row in block.rows):
            return None
        if rest not in self.streams:
            reader = StreamReader(rest, program.parameters, program.places, len(call.leaves), call.late)
            self.streams[rest] = reader.read()
        streams = self.streams[rest]
        if streams is None:
            return None
        inputs = [*block.parameters(), *call.inputs(step, program.places), *values]
        terms = [term for stream in streams if stream is not None for term in stream.terms]
        factors = {term.factor: inputs[term.factor] for term in terms if term.factor is not None}
        new = CachedSum(self)
        return Member(block, streams, tree_structure(call.out), factors, len(call.leaves), new)


def _feeds(before: BlockCall, call: BlockCall, member: Member) -> bool:
    """Returns whether what the block takes of the latents is just the output of the block before, in its order."""
    outputs = tree_leaves(before.out)
    taken = [(s.origin, out) for s, out in zip(member.streams, outputs, strict=False) if s is not None]
    return (
        before.feeds_next
        and len(outputs) == len(member.streams)
        and {origin for origin, _ in taken} >= call.late
        and all(torch.is_tensor(out) and call.leaves[origin] is out for origin, out in taken)
    )
