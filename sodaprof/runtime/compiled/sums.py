"""Collapse: blocks in a row that compute nothing become one weighted sum over what their sites kept.

Such a block, its conditioning computed ahead, is x + sum of gate * output: no norm is needed in between. That is read off
what is left of its program, not off model code. Ordered, the sum is taken as the blocks take it, bit for bit; fused, in
one accumulator without rounding in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import MismatchError
from ...pipelines.clock import Moment
from ..hooks.cells import CellInputs, CellResult
from . import kernels
from .streams import Stream, Term, streams_of
from .trace import BlockCall, LoweredBlock, leaves_of

EMPTY_RESULT, ONE = CellResult(None), torch.tensor(1.0, device="cpu")
Added = tuple[list[torch.Tensor], Term, torch.Tensor | None]  # kept outputs, how they are added, the gate


def kept_leaves(spec: TreeSpec) -> dict[int, tuple[int, int | None, int | None]]:
    """Returns {leaf of a block's call: (row, source, part)} for the outputs that its sites are given.

    source: its place among a forecast's, None for the cache; part: of outputs that are tuples.
    """
    given: list[CellInputs] = tree_unflatten(list(range(spec.num_leaves)), spec)[2]  # a number for each None, too
    found: dict[int, tuple[int, int | None, int | None]] = {}
    for row, one in enumerate(given):
        sources: Any = one.sources if isinstance(one.sources, tuple) else ()
        for source, output in ((None, one.cache), *enumerate(sources)):
            if isinstance(output, tuple):
                found |= {leaf: (row, source, part) for part, leaf in enumerate(output)}
            else:
                found[output] = row, source, None
    return found


class Scalars(dict[tuple[float, torch.dtype], torch.Tensor]):
    """(weight, dtype of what is weighed) -> the weight as a tensor without dimensions.

    It multiplies to the same bits as the number, of which torch makes such a tensor at every use: half of the time that a
    small network's product takes.
    """

    def __missing__(self, key: tuple[float, torch.dtype]) -> torch.Tensor:
        weight, dtype = key
        self[key] = torch.tensor(weight, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
        return self[key]


@lru_cache
def adds_products(dtype: torch.dtype) -> bool:
    """Returns whether one addcmul on a CPU gives the bits of a product by a weight and its addition, found by trying.

    It takes sum + (weight * tensor) * 1: an FMA of the last two changes no bit. Narrow types' products it does not round.
    """
    noise = torch.Generator().manual_seed(0)
    total, tensor = torch.randn(2, 4099, generator=noise, dtype=torch.float64, device="cpu").to(dtype)
    both = torch.equal(total.addcmul(tensor, ONE, value=1 / 3), total + tensor * (1 / 3))
    return both and dtype in (torch.float32, torch.float64)


@dataclass
class Member:
    """A block of a run at one step, and how it is called."""

    block: LoweredBlock
    streams: tuple[Stream | None, ...]
    out: TreeSpec
    factors: dict[int, torch.Tensor]
    kept: dict[int, tuple[int, int | None, int | None]]  # leaf -> number of the row, of the source, of the tuple's part


@dataclass
class Run:
    """Consecutive blocks at one step on one branch, each taking what the one before hands on."""

    members: list[Member]
    fused: bool
    plans: dict[Any, kernels.Plan]  # of sums on a GPU
    scalars: Scalars
    handed: list[torch.Tensor | None] = field(default_factory=list)  # what the next block must be given
    at: int = 0

    def call(self, moment: Moment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the block's output: of all blocks at the first, which the others hand on."""
        leaves, member = leaves_of((args, kwargs), []), self.members[self.at]
        if self.at == 0:
            self.handed = self._sums(moment, leaves)
        elif any(s is not None and leaves[s.origin] is not h for s, h in zip(member.streams, self.handed, strict=True)):
            raise MismatchError(
                f"{member.block.path} is not given what the block before it returned, as it was in the run before. Run "
                "the schedule without cached sums: apply(pipe, schedule, runtime=Compiled(sums=None))."
            )
        out = tree_unflatten(self.handed, member.out)
        self.at = (self.at + 1) % len(self.members)
        return out

    def place(self, block: LoweredBlock) -> int:
        """Which of the run's blocks this is."""
        return next(i for i, member in enumerate(self.members) if member.block is block)

    def factors_of(self, block: LoweredBlock) -> list[torch.Tensor]:
        """What the block's terms are multiplied by."""
        return list(self.members[self.place(block)].factors.values())

    def swap(self, block: LoweredBlock, other: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        """Puts other(factor) in place of each of the block's factors; returns what takes that back."""
        member = self.members[self.place(block)]
        own = member.factors
        member.factors = {number: other(factor) for number, factor in own.items()}

        def undo() -> None:
            member.factors = own

        return undo

    def _sums(self, moment: Moment, leaves: list[Any]) -> list[torch.Tensor | None]:
        moment.served["sums"] += 1
        added: list[list[Added]] = [[] for _ in self.members[0].streams]
        for member in self.members:
            given = [row.read(moment) for row in member.block.rows]
            for mine, stream in zip(added, member.streams, strict=True):
                for term in stream.terms if stream is not None else ():
                    outputs = [_viewed(given, member.kept[kept.leaf], kept.views) for kept in term.kept]
                    mine.append((outputs, term, None if term.factor is None else member.factors[term.factor]))
            for row in member.block.rows:
                row.write(moment, EMPTY_RESULT)
        first, last = self.members[0].streams, self.members[-1].streams
        return [
            None if begin is None or end is None else self._sum(moment, leaves[begin.origin], terms, end)
            for begin, terms, end in zip(first, added, last, strict=True)
        ]

    def _sum(self, moment: Moment, start: torch.Tensor, added: list[Added], stream: Stream) -> torch.Tensor:
        total, add = _Total(start, self.scalars), _fused if self.fused else _ordered
        if on_gpu(start) and self._by_kernel(total, added):
            moment.served["kernel sums"] += 1
        else:
            for outputs, term, factor in added:
                add(total, outputs, term, factor)
        return total.result(stream)

    def _by_kernel(self, total: _Total, added: list[Added]) -> bool:
        """Adds all terms in one launch; False where they do not lie in one arena, or are no plain gates."""
        arena = added[0][0][0]._base if added else None
        start, gates = total.value, [factor for _, _, factor in added]
        if arena is None or arena.shape[1:] != start.shape or not kernels.available():
            return False
        flat = [gate is None or (gate.dtype == start.dtype and gate.shape in _gates(start.shape)) for gate in gates]
        kept = [(output, part) for outputs, term, _ in added for output, part in zip(outputs, term.kept, strict=True)]
        if not all(flat) or any(output._base is not arena or part.views for output, part in kept):
            return False
        size = start.numel()
        terms = tuple(
            (tuple((o.storage_offset() // size, part.weight) for o, part in zip(outs, term.kept, strict=True)), g is not None)
            for (outs, term, _), g in zip(added, gates, strict=True)
        )  # fmt: skip
        if (plan := self.plans.get((terms, start.device))) is None:
            plan = self.plans[terms, start.device] = kernels.plan_of(terms, start.device)
        batch, _, width = start.shape
        one = start.new_empty((batch, 1, width)) if None in gates else None
        rows = [(one if gate is None else gate).expand(batch, 1, width)[:, 0] for gate in gates]  # type: ignore[union-attr]
        total.value = kernels.sum_kept(start, arena, plan, torch.stack(rows), not self.fused)
        return True


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the kernel can take it. Elsewhere it runs in Triton's interpreter alone, for tests."""
    return tensor.is_cuda


def _gates(shape: torch.Size) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of gates that hold for all tokens of a stream [B, N, D]."""
    batch, _, width = shape
    return (batch, 1, width), (1, 1, width), (1, width), (width,)


class _Total:
    """A sum under way: its first addition makes a tensor of its own, the others add to it in place."""

    def __init__(self, start: torch.Tensor, scalars: Scalars) -> None:
        self.value, self.dtype, self.shape, self.own = start.contiguous(), start.dtype, tuple(start.shape), False
        self.scalars, self.adds = scalars, start.device.type == "cpu" and adds_products(start.dtype)
        self.buffer: torch.Tensor | None = None  # for one term after the other

    def seen(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the sum so far as a block sees its stream: a view takes as long as a small network's addition."""
        if self.shape != shape:
            self.value, self.shape, self.buffer = self.value.view(shape), shape, None
        return self.value

    def result(self, stream: Stream) -> torch.Tensor:
        """Returns the sum laid out as the blocks' own would be: what comes after may depend on it in its last bits."""
        value = self.value.view(stream.shape)
        if value.stride() == stream.stride and value.dtype == self.dtype:
            return value
        return torch.empty_strided(stream.shape, stream.stride, dtype=self.dtype, device=value.device).copy_(value)


def _ordered(total: _Total, outputs: list[torch.Tensor], term: Term, factor: torch.Tensor | None) -> None:
    value, part = total.seen(term.shape), outputs[0]
    buffer = total.buffer = torch.empty_like(value) if total.buffer is None else total.buffer
    for i, (output, kept) in enumerate(zip(outputs, term.kept, strict=True)):
        if kept.weight is None:  # the only one
            break
        if i and total.adds and part is buffer and output.dtype is total.dtype:
            buffer.addcmul_(output, ONE, value=kept.weight)
        elif i:
            part.add_(output * total.scalars[kept.weight, output.dtype])
        else:
            fits = output.dtype is total.dtype and output.shape == term.shape
            part = torch.mul(output, total.scalars[kept.weight, output.dtype], out=buffer if fits else None)
    if factor is not None:
        part = torch.mul(factor, part, out=buffer)
    total.value = value.add_(part) if total.own else value + part
    total.own = True


def _fused(total: _Total, outputs: list[torch.Tensor], term: Term, factor: torch.Tensor | None) -> None:
    if not total.own:
        total.value = total.value.to(torch.promote_types(total.dtype, torch.float32), copy=True)
        total.own = True
    value = total.seen(term.shape)
    for output, kept in zip(outputs, term.kept, strict=True):
        weight = 1.0 if kept.weight is None else kept.weight
        if factor is None:
            value.add_(output, alpha=weight)
        else:
            value.addcmul_(factor, output, value=weight)


def _viewed(given: list[CellInputs], place: tuple[int, int | None, int | None], views: Any) -> torch.Tensor:
    row, source, part = place
    sources = given[row].sources
    found = given[row].cache if source is None or sources is None else sources[source]
    out: torch.Tensor = found if part is None else found[part]
    for view, arguments in views:
        out = view(out, *arguments)
    return out


class Collapse:
    """Finds the runs of a schedule's steps once the conditioning tables of a run are filled."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        self.plans: dict[Any, kernels.Plan] = {}
        self.scalars = Scalars()
        self.streams: dict[fx.GraphModule, tuple[Stream | None, ...] | None] = {}  # of what is left of each program

    def join(self, calls: list[BlockCall], steps: Sequence[int], branch: int) -> None:
        """Gives the blocks of each step that are sums alone their runs, neighbours that hand on what they return one."""
        for step in steps:
            run: Run | None = None
            before: BlockCall | None = None
            for call in calls:
                member = self._member(call, (step, branch))
                if member is None:
                    run = None
                elif run is not None and before is not None and _hands_on(before, call, member):
                    run.members.append(member)
                else:
                    run = Run([member], self.fused, self.plans, self.scalars)
                if run is not None:
                    call.block.runs[step, branch] = run
                before = call

    def _member(self, call: BlockCall, at: tuple[int, int]) -> Member | None:
        if at not in call.block.ready or not all(row.cells[at[0]].reuses for row in call.block.rows):
            return None
        program, rest, values = call.block.ready[at]
        outputs, spec = tree_flatten(call.out)
        if rest not in self.streams:
            self.streams[rest] = streams_of(
                rest, program.parameters, program.places, len(call.leaves), call.late, len(outputs)
            )
        streams = self.streams[rest]
        if streams is None:
            return None
        at_step = call.at(at[0])
        flat = [*call.block.parameters(), *(at_step[i] if i < len(at_step) else None for i in program.places), *values]
        terms = [term for stream in streams if stream is not None for term in stream.terms]
        factors = {term.factor: flat[term.factor] for term in terms if term.factor is not None}
        return Member(call.block, streams, spec, factors, kept_leaves(program.key[2]))


def _hands_on(before: BlockCall, call: BlockCall, member: Member) -> bool:
    """Whether a block takes of the latents just what the one before returned, in its order."""
    outputs = tree_flatten(before.out)[0]
    places = [(s.origin, out) for s, out in zip(member.streams, outputs, strict=False) if s is not None]
    return (
        before.handed
        and len(outputs) == len(member.streams)
        and {origin for origin, _ in places} >= call.late
        and all(torch.is_tensor(out) and call.leaves[origin] is out for origin, out in places)
    )
