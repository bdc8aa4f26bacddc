"""Fixed places that graphs read and write: the values of the conditioning tables, and what sites keep.

A graph fills the tables at the start of each run, and the graphs of steps read them. The values of single steps lie in one
tensor with a row for each step, so a graph finds those of its step by a counter on the device. What sites keep lies in one
contiguous tensor for all module outputs of one shape on one branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..hooks.cells import Output
from ..hooks.sites import SiteRow

ELEMENT_BYTES = 8  # of a table's element
ALIGNMENT = 64  # elements: each value starts at a multiple of it, as new memory is aligned


@dataclass(frozen=True)
class TableValue:
    """The place of a value in the row of its step, and the layout of the value."""

    offset: int
    length: int  # elements of the row
    dtype: torch.dtype
    shape: torch.Size  # of the part that lies in memory
    stride: tuple[int, ...]
    expanded: torch.Size

    def read(self, row: torch.Tensor) -> torch.Tensor:
        """Returns the value that lies here in a row of a table."""
        part = row[self.offset : self.offset + self.length].view(self.dtype)
        return part.as_strided(self.shape, self.stride).expand(self.expanded)


@dataclass(frozen=True, eq=False)
class Packed:
    """Tensors in fixed places, in the structure in which they were found."""

    result: Any  # values of single steps as TableValue
    table: torch.Tensor  # int64 [T, length of a row]
    numbers: list[int]  # of the leaves that `write` copies
    written: list[torch.Tensor]  # where it copies them

    def write(self, found: Any) -> None:
        """Copies in new values, found in the same structure."""
        leaves = tree_leaves(found)
        copy_all(self.written, [compact(leaves[i]) for i in self.numbers])


def pack(of_run: Any, of_steps: Sequence[Any]) -> Packed:
    """Returns copies of all tensors in (of_run, of_steps), one copy of each.

    of_steps: the values of each step; a tensor that is in `of_run`, or among those of several steps, holds for the run.
    """
    leaves, spec = tree_flatten((of_run, of_steps))
    steps: list[int | None] = [None] * len(tree_leaves(of_run))
    for number, values in enumerate(of_steps):
        steps += [number] * len(tree_leaves(values))
    step_of, numbers = dict[int, int | None](), dict[int, int]()  # by id of the tensor
    for i, (leaf, step) in enumerate(zip(leaves, steps, strict=True)):
        if torch.is_tensor(leaf):
            step_of[id(leaf)] = step if step_of.get(id(leaf), step) == step else None
            numbers.setdefault(id(leaf), i)
    copies, used = dict[int, Any](), [0] * len(of_steps)
    for key, i in numbers.items():
        step, leaf, part = step_of[key], leaves[i], compact(leaves[i])
        if step is None:
            copies[key] = expanded_copy(leaf)
            continue
        span = 1 + sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True))
        length = -(-span * leaf.element_size() // ELEMENT_BYTES)
        copies[key] = TableValue(used[step], length, leaf.dtype, part.shape, part.stride(), leaf.shape)
        used[step] += -(-length // ALIGNMENT) * ALIGNMENT
    table = torch.zeros(len(of_steps), max(used), dtype=torch.int64, device=leaves[next(iter(numbers.values()))].device)
    written = [
        compact(copy.read(table[step_of[key]]) if isinstance(copy, TableValue) else copy)
        for key, copy in copies.items()
    ]
    result = tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], spec)
    packed = Packed(result, table, list(numbers.values()), written)
    packed.write((of_run, of_steps))
    return packed


def copy_all(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copies each value to its place, all values of one dtype in one launch; mixed dtypes would take a launch each."""
    by_dtype: dict[Any, list[int]] = {}
    for i, (place, value) in enumerate(zip(places, values, strict=True)):
        by_dtype.setdefault((place.dtype, value.dtype, place.device), []).append(i)
    for numbers in by_dtype.values():
        torch._foreach_copy_([places[i] for i in numbers], [values[i] for i in numbers])


def expanded_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy that is expanded as the tensor is: programs are bound to strides."""
    return compact(tensor).clone().expand(tensor.shape)


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Returns an expanded tensor without the repetition: the part that lies in memory."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


class Arenas:
    """Hands out places in one tensor for each guidance branch and shape; other values get a tensor of their own."""

    def __init__(self, rows: list[SiteRow]) -> None:
        self.needed: Counter[int] = Counter()  # number of tokens -> places that their sites need on a branch
        for row in rows:
            sources = {cell.slot for cell in row.cells} - {None}
            self.needed[row.profiled_tokens] += any(cell.keeps_cache for cell in row.cells) + len(sources)
        self.arenas: dict[Any, torch.Tensor] = {}
        self.used: Counter[Any] = Counter()

    def place(self, row: SiteRow, name: tuple[int, Any], value: Output) -> Output:
        """Returns a place for such a value; name: the branch, and "cache", the number of a slot, or another name."""
        branch, what = name
        if not torch.is_tensor(value) or not (what == "cache" or isinstance(what, int)):
            return tree_map(torch.empty_like, value)
        key = branch, row.profiled_tokens, value.shape, value.dtype, value.device
        if key not in self.arenas:
            shape = self.needed[row.profiled_tokens], *value.shape
            self.arenas[key] = torch.empty(shape, dtype=value.dtype, device=value.device)
        self.used[key] += 1
        return self.arenas[key][self.used[key] - 1]


class RowBuffers:
    """The places of one site's row, made at their first use (the `Buffers` of a `SiteRow`)."""

    def __init__(self, arenas: Arenas, row: SiteRow) -> None:
        self.arenas, self.row = arenas, row
        self.places: dict[tuple[int, Any], Output] = {}

    def put(self, name: tuple[int, Any], value: Output) -> Output:
        """Returns the place of this name with the value copied into it."""
        if name not in self.places:
            self.places[name] = self.arenas.place(self.row, name, value)
        place = self.places[name]
        if place is not value:
            tree_map(lambda kept, new: kept.copy_(new), place, value)
        return place

    def get(self, name: tuple[int, Any]) -> Output:
        """Returns the place of this name; None if there is none."""
        return self.places.get(name)
