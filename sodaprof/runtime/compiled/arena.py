"""Where captured steps keep what sites make: one contiguous tensor for all module outputs of a shape, on a branch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..hooks.sites import Output, SiteRow


class Arenas:
    """Hands out slots of one tensor for each guidance branch and shape; all else gets a tensor of its own."""

    def __init__(self, rows: list[SiteRow]) -> None:
        self.slots: Counter[int] = Counter()  # that sites of so many tokens need on a branch
        for row in rows:
            self.slots[row.planned] += any(row.keeps) + len(set(row.source_places.values()))
        self.arenas: dict[Any, torch.Tensor] = {}
        self.taken: Counter[Any] = Counter()

    def make(self, row: SiteRow, what: tuple[int, Any], value: Output) -> Output:
        """Returns a buffer like the value; what: the branch, and "cache", the number of a source, or another name."""
        branch, name = what
        if not torch.is_tensor(value) or not (name == "cache" or isinstance(name, int)):
            return tree_map(torch.empty_like, value)
        key = branch, row.planned, value.shape, value.dtype, value.device
        if key not in self.arenas:
            shape = self.slots[row.planned], *value.shape
            self.arenas[key] = torch.empty(shape, dtype=value.dtype, device=value.device)
        self.taken[key] += 1
        return self.arenas[key][self.taken[key] - 1]
