"""What is left of a block that computes nothing, read as sums: each output an argument plus gates times kept outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import fx

ATEN = torch.ops.aten
ADD, MUL, VIEW, SLICE, CAT = (
    ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.view.default, ATEN.slice.Tensor, ATEN.cat.default
)  # fmt: skip
VIEWS = (VIEW, ATEN.transpose.int, SLICE)


class Kept(NamedTuple):
    """A kept output as a term takes it."""

    leaf: int  # of the block's call
    views: tuple[tuple[Any, tuple[Any, ...]], ...] = ()  # operators and their other arguments, in turn
    weight: float | None = None  # of a forecast's source; None: as it is


class Term(NamedTuple):
    """factor * (kept output, or the weighted sum of kept outputs), as a block adds it to a stream."""

    kept: tuple[Kept, ...]
    factor: int | None = None  # an input of the program: a gate
    shape: tuple[int, ...] = ()  # of the stream where it is added


class Stream(NamedTuple):
    """One output of a block: an argument of it and the terms added to that, in the block's order."""

    origin: int  # leaf of the block's call
    terms: tuple[Term, ...]
    shape: tuple[int, ...]  # of the output
    stride: tuple[int, ...]


def streams_of(
    rest: fx.GraphModule, parameters: int, places: Sequence[int], arguments: int, late: set[int], outputs: int
) -> tuple[Stream | None, ...] | None:
    """Returns a block's outputs as streams (None: returns None there), or None where they are anything but sums.

    rest: what is left of its program. Its inputs are parameters, the leaves `places` of the call, and values from the
    tables; the first `arguments` leaves are arguments, those in `late` depend on the latents, the other leaves are kept.
    """
    inputs = [node for node in rest.graph.nodes if node.op == "placeholder"]
    leaf = {node: places[i - parameters] for i, node in enumerate(inputs) if 0 <= i - parameters < len(places)}
    number = {node: i for i, node in enumerate(inputs)}

    def term_of(node: Any) -> Term | None:
        if not isinstance(node, fx.Node) or node.kwargs:
            return None
        if leaf.get(node, -1) >= arguments:
            return Term((Kept(leaf[node]),))
        if node.target in VIEWS:
            inner = term_of(node.args[0])
            if inner is None or len(inner.kept) != 1 or inner.factor is not None or inner.kept[0].weight is not None:
                return None
            kept = inner.kept[0]
            return Term((kept._replace(views=(*kept.views, (node.target, tuple(node.args[1:])))),))
        if node.target is ADD:
            first, second = term_of(node.args[0]), term_of(node.args[1])
            if first is None or second is None or first.factor is not None or second.factor is not None:
                return None
            kepts = first.kept + second.kept
            return Term(kepts) if len(second.kept) == 1 and all(k.weight is not None for k in kepts) else None
        if node.target is MUL:
            for some, other in (node.args, node.args[::-1]):
                inner = term_of(some)
                if inner is None or inner.factor is not None:
                    continue
                if isinstance(other, float) and len(inner.kept) == 1 and inner.kept[0].weight is None:
                    return Term((inner.kept[0]._replace(weight=other),))
                place = leaf.get(other, -1) if isinstance(other, fx.Node) else arguments
                if other in number and place < arguments and place not in late:
                    return inner._replace(factor=number[other])
        return None

    def stream_of(node: Any) -> Stream | None:
        looks, terms = node.meta.get("val"), list[Term]()
        part: tuple[int, int, int] | None = None  # dim, start and stop of what is looked at, within two streams in one
        while not 0 <= leaf.get(node, -1) < arguments:
            value = node.meta.get("val")
            if node.kwargs or not torch.is_tensor(value) or not torch.is_tensor(looks) or value.dtype != looks.dtype:
                return None
            shape = list(value.shape)
            if part is not None:
                shape[part[0]] = part[2] - part[1]
            if torch.Size(shape).numel() != looks.numel() and node.target is not SLICE:
                return None
            if node.target is VIEW and part is None:
                node = node.args[0]
            elif node.target is SLICE and part is None and len(node.args) == 4:
                node, dim, *ends = node.args
                part = dim, *slice(*ends).indices(node.meta["val"].shape[dim])[:2]
            elif node.target is CAT and part is not None and (node.args[1:] or (0,))[0] == part[0]:
                ends = list(accumulate((n.meta["val"].shape[part[0]] for n in node.args[0]), initial=0))
                if part[1:] not in pairwise(ends):
                    return None
                node, part = node.args[0][ends.index(part[1])], None
            elif node.target is ADD:
                for some, other in (node.args, node.args[::-1]):
                    term = term_of(other)
                    if term is not None and isinstance(some, fx.Node) and _dtype(other, looks) == looks.dtype:
                        break
                else:
                    return None
                term = term if part is None else cut(term, *part)
                if term is None:
                    return None
                terms.append(term._replace(shape=tuple(shape)))
                node = some
            else:
                return None
        if not torch.is_tensor(looks) or part is not None:
            return None
        return Stream(leaf[node], tuple(reversed(terms)), tuple(looks.shape), looks.stride())

    def cut(term: Term, dim: int, start: int, stop: int) -> Term | None:
        if term.factor is not None:
            gate = inputs[term.factor].meta.get("val")
            if gate is None or gate.shape[dim] != 1:
                return None
        one = (SLICE, (dim, start, stop))
        return term._replace(kept=tuple(k._replace(views=(*k.views, one)) for k in term.kept))

    found = next(node for node in rest.graph.nodes if node.op == "output").args[0][:outputs]
    streams = [stream_of(node) if isinstance(node, fx.Node) else None for node in found]
    return None if any(s is None and f is not None for s, f in zip(streams, found, strict=True)) else tuple(streams)


def _dtype(node: Any, looks: torch.Tensor) -> torch.dtype:
    """Returns the dtype of a term; what is kept as it is may have its own."""
    dtype: torch.dtype = node.meta["val"].dtype if node.op == "call_function" else looks.dtype
    return dtype
