"""Where captured steps keep what sites create: one contiguous tensor for all module outputs of a shape, on a branch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..hooks.cells import Output
from ..hooks.sites import SiteRow


class Arenas:
    """Hands out slots of one tensor for each guidance branch and shape; everything else gets a tensor of its own."""

    def __init__(self, rows: list[SiteRow]) -> None:
        self.slots: Counter[int] = Counter()  # that sites of so many tokens need on a branch
        for row in rows:
            sources = {cell.slot for cell in row.cells} - {None}
            self.slots[row.profiled_tokens] += any(cell.keeps_cache for cell in row.cells) + len(sources)
        self.arenas: dict[Any, torch.Tensor] = {}
        self.taken: Counter[Any] = Counter()

    def place(self, row: SiteRow, name: tuple[int, Any], value: Output) -> Output:
        """Returns a place like the value; name: the branch, and "cache", the number of a slot, or another name."""
        branch, what = name
        if not torch.is_tensor(value) or not (what == "cache" or isinstance(what, int)):
            return tree_map(torch.empty_like, value)
        key = branch, row.profiled_tokens, value.shape, value.dtype, value.device
        if key not in self.arenas:
            shape = self.slots[row.profiled_tokens], *value.shape
            self.arenas[key] = torch.empty(shape, dtype=value.dtype, device=value.device)
        self.taken[key] += 1
        return self.arenas[key][self.taken[key] - 1]


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
