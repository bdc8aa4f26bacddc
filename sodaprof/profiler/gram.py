"""Sums over the generations of inner products between steps, and their table.

From them the error of any linear forecast or update, from any source steps, follows as a quadratic form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.sites import Site
from ..formats.tables import write_table
from .budget import coordinates_of


@dataclass(frozen=True)
class Track:
    """A tensor whose values at different steps are multiplied: a site's output, the stack's, or its drift."""

    kind: str  # site, output (of the last block), drift (its difference from the input of the first block)
    transformer: str
    site: Site | None  # None for output and drift
    size: int  # elements of a generation on one branch

    @property
    def name(self) -> str:
        """The seed of the choice of coordinates."""
        return f"{self.transformer}.{self.site.key if self.site else self.kind}"

    @property
    def coordinates(self) -> int:
        """Elements of a generation on one branch that are multiplied: all, or MOST_COORDINATES."""
        return coordinates_of(self.size)


class GramSums:
    """Sums of the products over generations, on the host, and their table."""

    def __init__(self, tracks: Sequence[Track], steps: int, ages: int, latent: int) -> None:
        """ages: oldest age of the tracks' products; latent: elements of a generation's latents."""
        self.tracks, self.steps, self.ages, self.latent = tracks, steps, ages, latent
        self.states = np.zeros((2 * steps + 1, 2 * steps + 1))
        self.products = np.zeros((len(tracks), steps, ages + 1))

    def add(self, track: int, last: int, products: np.ndarray) -> None:
        """Adds products [new, rows] of the outputs at the last `new` steps up to `last` with those at the last `rows` steps."""
        new, rows = products.shape
        for i in range(new):
            row = rows - new + i
            back = min(row, self.ages)
            self.products[track, last - new + 1 + i, : back + 1] += products[i, row - back : row + 1][::-1]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the sums by name, for `restore`."""
        return {"gram_states": self.states, "gram_products": self.products}

    def restore(self, saved: Any) -> None:
        self.states, self.products = saved["gram_states"], saved["gram_products"]

    def write(
        self,
        folder: Path,
        past: dict[str, list[int]],
        samples: int,
        response: dict[int, tuple[float, float]] | None = None,
    ) -> None:
        """Writes gram.parquet. past: steps of its turn before each step, by transformer; samples: generations in the sums.

        response: of `measure_response`.
        """
        row, column = np.tril_indices(len(self.states))
        parts = [_rows("state", "", None, row, column, self.states[row, column], self.latent)]
        for track, sums in zip(self.tracks, self.products, strict=True):
            before = np.minimum(past[track.transformer], self.ages)  # −1 if it is not called
            step, age = np.nonzero(np.arange(self.ages + 1) <= before[:, None])
            place = (track.kind, track.transformer, track.site)
            parts.append(_rows(*place, step, step - age, sums[step, age], track.coordinates))
        if response:
            steps = np.array(list(response))
            for kind, sums in zip(("away", "response"), np.array(list(response.values())).T, strict=True):
                parts.append(_rows(kind, "", None, steps, steps, sums, self.latent))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        columns["product"] = columns["product"] / samples
        columns["n"] = np.full(len(columns["row"]), samples, dtype=np.int32)
        write_table(folder, "gram", columns)


def _rows(
    kind: str,
    transformer: str,
    site: Site | None,
    row: np.ndarray,
    column: np.ndarray,
    product: np.ndarray,
    coordinates: int,
) -> dict[str, np.ndarray]:
    place: tuple[Any, ...] = ("", -1, "", 0) if site is None else (site.stack, site.layer, site.module, site.call)
    same = dict(zip(("stack", "layer", "module", "call"), place, strict=True))
    same |= {"transformer": transformer, "kind": kind, "coordinates": coordinates}
    filled = {name: np.full(len(row), v, dtype=object if isinstance(v, str) else int) for name, v in same.items()}
    return filled | {"row": row, "column": column, "product": product}
