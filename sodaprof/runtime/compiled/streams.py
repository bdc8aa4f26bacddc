"""Reads the rest of a program as sums: each output of a block is an argument plus gates times kept outputs.

This holds for a block none of whose sites compute. It is read from the graph, not from the code of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
ADD, MUL, CAT = ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.cat.default
VIEW, TRANSPOSE, SLICE = ATEN.view.default, ATEN.transpose.int, ATEN.slice.Tensor
VIEWS = (VIEW, TRANSPOSE, SLICE)


class NotASumError(Exception):
    """An output of a block is not a sum that a `Stream` describes."""


class Kept(NamedTuple):
    """A kept output in a term."""

    leaf: int  # number among the leaves of the block's call
    views: tuple[tuple[Any, tuple[Any, ...]], ...] = ()  # operators and their other arguments, in order
    weight: float | None = None  # of a source of a forecast; None: not weighted


class Term(NamedTuple):
    """What a block adds to a stream: factor * (a kept output, or the weighted sum of kept outputs)."""

    kept: tuple[Kept, ...]
    factor: int | None = None  # number of an input of the program: the gate
    shape: tuple[int, ...] = ()  # of the stream where it is added


class Stream(NamedTuple):
    """One output of a block: one of its arguments and the terms that the block adds to it, in its order."""

    origin: int  # number of the argument
    terms: tuple[Term, ...]
    shape: tuple[int, ...]  # of the output
    stride: tuple[int, ...]


class Part(NamedTuple):
    """A range of a dimension."""

    dim: int
    start: int
    stop: int


@dataclass
class StreamReader:
    """Reads the outputs of one block.

    rest: the rest of its program. Its inputs are parameters, the leaves `places` of the block's call, and values from the
    conditioning tables. The first `arguments` leaves are arguments of the call, those in `late` depend on the latents, the
    other leaves are kept outputs.
    """

    rest: fx.GraphModule
    parameters: int
    places: Sequence[int]
    arguments: int
    late: set[int]

    def __post_init__(self) -> None:
        self.inputs = [node for node in self.rest.graph.nodes if node.op == "placeholder"]
        self.numbers = {node: i for i, node in enumerate(self.inputs)}
        self.leaves = dict(zip(self.inputs[self.parameters :], self.places, strict=False))

    def read(self) -> tuple[Stream | None, ...] | None:
        """Returns the block's outputs as streams, None for an output that is None; None if an output is not such a sum."""
        returned: Any = self.rest.graph.output_node().args[0]
        try:
            return tuple([None if node is None else self._stream(node) for node in tree_leaves(returned[0])])
        except NotASumError:
            return None

    def _stream(self, node: Any) -> Stream:
        """Returns an output as a stream: follows its additions back to an argument."""
        output, terms = node.meta.get("val") if isinstance(node, fx.Node) else None, list[Term]()
        part: Part | None = None  # the part of a larger tensor, two streams in one, that the output is
        if not torch.is_tensor(output):
            raise NotASumError
        while not 0 <= self.leaves.get(node, -1) < self.arguments:
            shape = _shape_within(node, part, output)
            if node.target is ADD:
                node, term = self._addition(node, output.dtype)
                cut = term if part is None else self._cut(term, part)
                terms.append(cut._replace(shape=shape))
            else:
                node, part = _before_view(node, part)
        if part is not None:
            raise NotASumError
        return Stream(self.leaves[node], tuple(reversed(terms)), tuple(output.shape), output.stride())

    def _addition(self, node: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, Term]:
        """Returns the summand of an addition that leads on to the argument, and the other one as a term."""
        for stream, other in (node.args, node.args[::-1]):
            term = self._term(other)
            if term is not None and isinstance(stream, fx.Node) and _dtype(other, dtype) == dtype:
                return stream, term
        raise NotASumError

    def _cut(self, term: Term, part: Part) -> Term:
        """Returns this part of a term; its gate must be the same along the dimension of the part."""
        if term.factor is not None:
            gate = self.inputs[term.factor].meta.get("val")
            if gate is None or gate.shape[part.dim] != 1:
                raise NotASumError
        view = (SLICE, tuple(part))
        return term._replace(kept=tuple(kept._replace(views=(*kept.views, view)) for kept in term.kept))

    def _term(self, node: Any) -> Term | None:
        """Returns what is added to a stream as a term, None if it is something else."""
        if not isinstance(node, fx.Node) or node.kwargs:
            return None
        if self.leaves.get(node, -1) >= self.arguments:
            return Term((Kept(self.leaves[node]),))
        if node.target in VIEWS:
            inner = self._term(node.args[0])
            if inner is None or not _is_one_output(inner):
                return None
            kept = inner.kept[0]
            return Term((kept._replace(views=(*kept.views, (node.target, tuple(node.args[1:])))),))
        if node.target is ADD:
            return self._weighted_sum(node)
        return self._product(node) if node.target is MUL else None

    def _weighted_sum(self, node: fx.Node) -> Term | None:
        """Returns a weighted sum of kept outputs as a term, if it was added up from the left."""
        first, second = self._term(node.args[0]), self._term(node.args[1])
        if first is None or second is None or first.factor is not None or second.factor is not None:
            return None
        kept = first.kept + second.kept
        return Term(kept) if len(second.kept) == 1 and all(one.weight is not None for one in kept) else None

    def _product(self, node: fx.Node) -> Term | None:
        """Returns a kept output times its weight, or a term times its gate."""
        for some, other in (node.args, node.args[::-1]):
            inner = self._term(some)
            if inner is None or inner.factor is not None:
                continue
            if isinstance(other, float) and _is_one_output(inner):
                return Term((inner.kept[0]._replace(weight=other),))
            if isinstance(other, fx.Node) and other in self.numbers and self._is_early(other):
                return inner._replace(factor=self.numbers[other])
        return None

    def _is_early(self, node: fx.Node) -> bool:
        """Returns whether an input is known ahead of the loop: no kept output, and independent of the latents."""
        leaf = self.leaves.get(node, -1)
        return leaf < self.arguments and leaf not in self.late


def _is_one_output(term: Term) -> bool:
    return len(term.kept) == 1 and term.factor is None and term.kept[0].weight is None


def _shape_within(node: fx.Node, part: Part | None, output: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of a part of a node's value, of which the output must be a view."""
    value = node.meta.get("val")
    if node.kwargs or not torch.is_tensor(value) or value.dtype != output.dtype:
        raise NotASumError
    shape = list(value.shape)
    if part is not None:
        shape[part.dim] = part.stop - part.start
    if torch.Size(shape).numel() != output.numel() and node.target is not SLICE:
        raise NotASumError
    return tuple(shape)


def _before_view(node: fx.Node, part: Part | None) -> tuple[fx.Node, Part | None]:
    """Returns (node, part) that a view, a slice or a concatenation takes."""
    args: Any = node.args
    if node.target is VIEW and part is None:
        return args[0], None
    if node.target is SLICE and part is None and len(args) == 4:
        source, dim, *ends = args
        return source, Part(dim, *slice(*ends).indices(source.meta["val"].shape[dim])[:2])
    if node.target is CAT and part is not None and (args[1:] or (0,))[0] == part.dim:
        ends = list(accumulate((source.meta["val"].shape[part.dim] for source in args[0]), initial=0))
        if (part.start, part.stop) in pairwise(ends):
            return args[0][ends.index(part.start)], None
    raise NotASumError


def _dtype(node: Any, default: torch.dtype) -> torch.dtype:
    """Returns the dtype of a term; a kept output itself may have a dtype of its own, which changes nothing."""
    dtype: torch.dtype = node.meta["val"].dtype if node.op == "call_function" else default
    return dtype
