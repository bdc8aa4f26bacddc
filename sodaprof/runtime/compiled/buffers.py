"""What a run's tables hold, in places that last: a graph writes them at the start of each run, the graphs of steps read them.

Values of single steps lie in one tensor, a row a step, so that a graph finds those of its step by a counter on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

WORD, LINE = (
    8,
    64,
)  # bytes of a table's element; elements that a value starts at a multiple of: as fresh memory is aligned


class Place(NamedTuple):
    """Where a value lies in its step's row, and how it looks."""

    offset: int
    words: int
    dtype: torch.dtype
    shape: torch.Size  # of what lies in memory
    stride: tuple[int, ...]
    expanded: torch.Size

    def within(self, row: torch.Tensor) -> torch.Tensor:
        """Returns what lies there of the value in a row of the table."""
        there = row[self.offset : self.offset + self.words].view(self.dtype)
        return there.as_strided(self.shape, self.stride)

    def of(self, row: torch.Tensor) -> torch.Tensor:
        """Returns the value in a row of the table."""
        return self.within(row).expand(self.expanded)


@dataclass(frozen=True, eq=False)
class Packed:
    """Tensors in lasting places, in the structure in which they were found."""

    result: Any
    table: torch.Tensor  # int64 [T, words]
    places: dict[int, Place]  # of tensors in the result that are views of it, by id
    numbers: list[int]  # of the leaves that are to be written
    written: list[torch.Tensor]  # where to

    def write(self, found: Any) -> None:
        """Copies in what was found anew."""
        leaves = tree_leaves(found)
        copy_all(self.written, [once(leaves[i]) for i in self.numbers])


def pack(found: Any, steps_of: Any, steps: int) -> Packed:
    """Returns copies of all tensors in `found`, one for each; steps_of: alike, the step of each leaf, None for all steps."""
    leaves, spec = tree_flatten(found)
    fixed, places = dict[int, torch.Tensor](), dict[tuple[int, int], Place]()
    used, numbers, of = [0] * steps, list[int](), tree_leaves(steps_of)
    device = next(leaf.device for leaf in leaves if torch.is_tensor(leaf))
    for i, (leaf, step) in enumerate(zip(leaves, of, strict=True)):
        if not torch.is_tensor(leaf) or (step is None and id(leaf) in fixed) or (step, id(leaf)) in places:
            continue
        numbers.append(i)
        if step is None:
            fixed[id(leaf)] = expanded_copy(leaf)
            continue
        part = once(leaf)
        span = 1 + sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True))
        words = -(-span * leaf.element_size() // WORD)
        places[step, id(leaf)] = Place(used[step], words, leaf.dtype, part.shape, part.stride(), leaf.shape)
        used[step] += -(-words // LINE) * LINE
    table = torch.zeros(steps, max(used), dtype=torch.int64, device=device)
    views = {key: place.of(table[key[0]]) for key, place in places.items()}
    written = [fixed[id(leaves[i])] if of[i] is None else views[of[i], id(leaves[i])] for i in numbers]
    lasting = [
        leaf if not torch.is_tensor(leaf) else fixed[id(leaf)] if step is None else views[step, id(leaf)]
        for leaf, step in zip(leaves, of, strict=True)
    ]
    by_id = {id(views[key]): place for key, place in places.items()}
    packed = Packed(tree_unflatten(lasting, spec), table, by_id, numbers, [once(place) for place in written])
    packed.write(found)
    return packed


def copy_all(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copies each value to its place: a launch for all that are alike, where one of mixed dtypes would be one for each."""
    by_dtype: dict[Any, list[int]] = {}
    for i, (place, value) in enumerate(zip(places, values, strict=True)):
        by_dtype.setdefault((place.dtype, value.dtype, place.device), []).append(i)
    for numbers in by_dtype.values():
        torch._foreach_copy_([places[i] for i in numbers], [values[i] for i in numbers])


def expanded_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy that is expanded as the tensor is: programs are bound to strides."""
    return once(tensor).clone().expand(tensor.shape)


def once(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the part of an expanded tensor that lies in memory once."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
