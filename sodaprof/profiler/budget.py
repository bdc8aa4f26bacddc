"""What a profile takes, from the shapes of its sites alone: rings on the device, sums on the host, tables on disk.

docs/concepts.md explains the arithmetic, with the figures of PixArt-XL at 1024 and Open-Sora at 480p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import SodaprofError
from ..formats.sites import Site
from ..formats.tables import METRICS

MOST_COORDINATES = 16384  # of a generation on one branch in a site's products; of larger tensors a sample of so many
MOST_TOKENS = 1024  # of a site's vector of errors a token; longer ones are pooled
BOOKS = 12  # bytes a token in the ring in addition to its features: norm and rank


class Grid(NamedTuple):
    """A raster of tokens whose errors are averaged over side x side blocks of each frame, smaller at the edges."""

    frames: int
    rows: int
    columns: int
    side: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the averages."""
        return self.frames, -(-self.rows // self.side), -(-self.columns // self.side)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model and a request that decide how much a profile takes."""

    sites: Sequence[Site]
    rows: Sequence[int]  # tokens of a generation's step at each site: both branches, folded samples included
    grids: Sequence[Grid]  # of each site's errors a token
    steps: int
    branches: int
    halves: bool  # both branches in one call
    ages: int
    item: int  # bytes of a feature's element
    rates: int
    latent: int = 0  # elements of a generation's latents; 0 if no products are measured
    history: int = 0  # oldest age of the products of outputs; 0 if none are measured
    stacks: Sequence[int] = ()  # elements of each stack's output, a generation and branch

    def ring(self, site: int, batch: int) -> int:
        """Bytes of a site's features of all ages with norms and ranks, and of the steps kept for its products."""
        features = self.ages * self.rows[site] * batch * (self.sites[site].width * self.item + BOOKS)
        return features + self._kept(self.elements(site), batch) * self.item

    def scratch(self, batch: int) -> int:
        """Bytes for any group: differences of the widest site in fp32 (of both branches if they share a batch), and what the
        products of states, outputs and stacks need."""
        widest = max((n * site.width for n, site in zip(self.rows, self.sites, strict=True)), default=0) * batch
        differences = self.ages * (widest if self.halves else widest // self.branches) * 4
        stacks = sum(self._kept(size, batch) * (self.item + 4) for size in self.stacks)  # the drift in fp32
        return differences + stacks + (2 * self.steps + 1) * self.latent * batch * 4

    def taken(self, groups: list[list[int]], batch: int) -> int:
        """Returns the bytes that the largest of the groups of sites takes."""
        return self.scratch(batch) + max(sum(self.ring(i, batch) for i in group) for group in groups)

    def elements(self, site: int) -> int:
        """Elements of a generation's output on one branch."""
        return self.rows[site] * self.sites[site].width // self.branches

    def _kept(self, size: int, batch: int) -> int:
        """Elements kept for the products of a tensor of this size on a generation's branch."""
        slots = min(self.steps, slots_of(self.history)) if self.history else 0
        return slots * self.branches * batch * coordinates_of(size)

    @property
    def cells(self) -> int:
        return self.steps * len(self.sites) * self.ages

    @property
    def products(self) -> int:
        """Rows of gram.parquet, at most."""
        size = 2 * self.steps + 1 if self.latent else 0
        band = (self.history + 1) * (2 * self.steps - self.history) // 2 if self.history else 0
        return size * (size + 1) // 2 + band * (len(self.sites) + 2 * len(self.stacks))

    @property
    def vectors(self) -> int:
        """Numbers in all errors a token."""
        return self.steps * self.ages * sum(grid.size for grid in self.grids)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the tables, before compression."""
        return self.cells * (self.branches + 1) * (24 + 8 * self.rates) + 2 * self.vectors + 24 * self.products

    @property
    def host_bytes(self) -> int:
        """Bytes of the sums, in float64."""
        errors = 2 * self.cells * (self.branches + 1) * (len(METRICS) + self.rates) + self.vectors
        return 8 * (errors + 2 * self.products)


def passes(shapes: Shapes, batch: int, free: float) -> tuple[int, list[list[int]]]:
    """Returns the batch and the groups of sites, each a pass over all trajectories: few passes first, then a large batch.

    batch: the largest allowed; free: bytes on the device. SodaprofError if a single site is not within memory.
    """
    found: list[tuple[int, list[list[int]]]] = []
    while batch:
        left = free - shapes.scratch(batch)
        rings = [shapes.ring(i, batch) for i in range(len(shapes.sites))]
        if max(rings, default=0) <= left:
            found.append((batch, grouped(rings, left)))
        batch //= 2
    if not found:
        need = shapes.taken([[i] for i in range(len(shapes.sites))] or [[]], 1)
        raise SodaprofError(
            f"One generation's features of one site take {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB may be used. Lower "
            "--max-interval, or free memory on the device."
        )
    return min(found, key=lambda plan: len(plan[1]))  # the first of equals, which has the largest batch


def grouped(sizes: Sequence[int], free: float) -> list[list[int]]:
    """Returns the numbers of consecutive sizes in as few groups as possible, each of at most `free` in all."""
    groups: list[list[int]] = [[]]
    for i, size in enumerate(sizes):
        if sum(sizes[j] for j in groups[-1]) + size > free:
            groups.append([])
        groups[-1].append(i)
    return groups


def coordinates_of(size: int) -> int:
    """Returns how many elements of a tensor are in its products: all, or a sample."""
    return min(size, MOST_COORDINATES)


def slots_of(history: int) -> int:
    """Returns how many steps are kept for products up to this age: twice as many, for large matrix products."""
    return 2 * (history + 1)


def grid_of(tokens: int, raster: tuple[int, int, int] | None, full: bool) -> Grid:
    """Returns the grid of a site's errors a token: the finest of at most MOST_TOKENS numbers, or one number a token.

    raster: frames, rows and columns of the tokens, None if they form no raster (text among them): then runs of tokens.
    """
    grid = Grid(*(raster or (1, 1, tokens)), 1)
    while not full and grid.size > MOST_TOKENS and grid.shape[1:] != (1, 1):
        grid = grid._replace(side=grid.side + 1)
    return grid
