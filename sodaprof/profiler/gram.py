"""Inner products between the steps of a generation: of states and guided outputs, of sites, of stacks. gram.parquet.

From them the error of any linear forecast or update, from any source steps, follows as a quadratic form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import MismatchError, UnsupportedModelError
from ..formats.sites import SiteKey
from ..formats.tables import PLACE, write_table
from ..pipelines.clock import Moment
from .budget import coordinates_of, slots_of

CHUNK = 8192  # coordinates converted to float64 at once
COLUMNS = ("kind", *PLACE, "row", "column", "product", "coordinates")


@dataclass(frozen=True)
class Track:
    """A tensor whose values at different steps are multiplied: a site's output, the stack's, or its drift."""

    kind: str  # site, output (of the last block), drift (its difference from the input of the first block)
    transformer: str
    site: str  # key; "" for output and drift
    size: int  # elements of a generation on one branch

    @property
    def name(self) -> str:
        """The seed of the choice of coordinates."""
        return f"{self.transformer}.{self.site or self.kind}"


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
        nowhere = ("", "", -1, "", 0)  # transformer, stack, layer, module, call
        row, column = np.tril_indices(len(self.states))
        parts: list[tuple[Any, ...]] = [("state", *nowhere, row, column, self.states[row, column], self.latent)]
        for track, sums in zip(self.tracks, self.products, strict=True):
            place = SiteKey.parse(track.site) if track.site else nowhere[1:]
            before = np.minimum(past[track.transformer], self.ages)  # −1 if it is not called
            step, age = np.nonzero(np.arange(self.ages + 1) <= before[:, None])
            values = (step, step - age, sums[step, age], coordinates_of(track.size))
            parts.append((track.kind, track.transformer, *place, *values))
        if response:
            steps = np.array(list(response))
            for kind, sums in zip(("away", "response"), np.array(list(response.values())).T, strict=True):
                parts.append((kind, *nowhere, steps, steps, sums, self.latent))
        filled = zip(*(np.broadcast_arrays(*part) for part in parts), strict=True)
        columns = {name: np.concatenate(values) for name, values in zip(COLUMNS, filled, strict=True)}
        columns["product"] /= samples
        columns["n"] = np.full(len(columns["row"]), samples, dtype=np.int32)
        write_table(folder, "gram", columns)


def inner_products(rows: Sequence[torch.Tensor], newest: int) -> torch.Tensor:
    """Returns the products [newest, rows] of the last `newest` of these flat tensors with all of them, float64."""
    total = torch.zeros(newest, len(rows), dtype=torch.float64, device=rows[0].device)
    for parts in zip(*(row.split(CHUNK) for row in rows), strict=True):
        values = torch.stack(parts).double()
        total.addmm_(values[len(rows) - newest :], values.T)
    return total


def chosen(name: str, size: int) -> torch.Tensor | None:
    """Returns a random sample of a flat tensor's coordinates, in order, the same for each name; None for all of them."""
    count = coordinates_of(size)
    if count == size:
        return None
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(size, count, replace=False)))


class History:
    """A tensor's latest values on one branch, and the products with those at up to `ages` earlier steps of the turn."""

    def __init__(self, ages: int, scale: float) -> None:
        """scale: from the products of the coordinates to those of the whole tensor."""
        self.ages, self.scale = ages, scale
        self.rows: list[torch.Tensor] = []
        self.last = -1  # step of the last row
        self.taken = 0  # rows whose products are computed
        self.products: list[tuple[int, torch.Tensor]] = []  # (step of the last row, products [new rows, rows])

    def push(self, step: int, values: torch.Tensor) -> None:
        """Keeps the values at a step, a flat tensor that nothing else writes to."""
        new_turn = bool(self.rows) and step != self.last + 1  # it reuses nothing from before
        if new_turn or len(self.rows) == slots_of(self.ages):
            self.take()
            self.rows = [] if new_turn else self.rows[-self.ages :]
            self.taken = len(self.rows)
        self.rows.append(values)
        self.last = step

    def take(self) -> None:
        """Multiplies the rows since the last time with all that are kept."""
        if len(self.rows) > self.taken:
            self.products.append((self.last, inner_products(self.rows, len(self.rows) - self.taken)))
            self.taken = len(self.rows)


class Products:
    """One batch's values and products, in float64 on the device; there is no host sync before `flush`."""

    def __init__(self, gram: GramSums, rows: int, count: int, first: bool, device: torch.device) -> None:
        """rows: of a network call's batch; count: generations; first: states and stacks are measured too, not only sites."""
        self.gram, self.rows, self.count, self.first, self.device = gram, rows, count, first, device
        self.tracks = {track.name: i for i, track in enumerate(gram.tracks)}
        self.histories: dict[tuple[int, int], History] = {}  # (track, branch)
        self.entries: dict[str, torch.Tensor] = {}  # transformer -> input of its first block in the call under way
        self.states: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.coordinates: dict[tuple[int, int], torch.Tensor | None] = {}  # (track, size) -> of a generation's branch
        for number, track in enumerate(gram.tracks):
            self._choose(number, track.size)  # ahead of the loop

    def state(self, output: torch.Tensor, sample: torch.Tensor) -> None:
        """Keeps a step's guided output and the latents that it is applied to."""
        if output.shape != sample.shape and output.ndim == sample.ndim:
            output = output[:, : sample.shape[1]]  # without the learned variance (DDPM)
        if output.shape != sample.shape:
            raise UnsupportedModelError(
                f"The scheduler receives outputs {list(output.shape)} for latents {list(sample.shape)}; their products need "
                "one shape. Profile with --no-gram."
            )
        self.end(sample)
        self.outputs.append(self._flat(output))

    def end(self, sample: torch.Tensor) -> None:
        """Keeps the latents after the last step."""
        self.states.append(self._flat(sample))

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a flat copy; of the first half if a pipeline passes both guidance halves to its scheduler."""
        if len(x) == self.rows == 2 * self.count:
            x = x[: self.count]
        return x.detach().flatten().to(torch.float32, copy=True)

    def enter(self, transformer: str, x: torch.Tensor) -> None:
        """Keeps the input of the first block until `leave`."""
        self.entries[transformer] = self._values(self.tracks[f"{transformer}.drift"], x)[0].float()

    def leave(self, transformer: str, moment: Moment, out: torch.Tensor) -> None:
        """Keeps the output of the last block, and the drift."""
        self.keep(f"{transformer}.output", moment, out)
        self.keep(f"{transformer}.drift", moment, out, self.entries.pop(transformer))

    def keep(self, name: str, moment: Moment, x: torch.Tensor, subtracted: torch.Tensor | None = None) -> None:
        """Keeps the value of a track at this moment; `subtracted`: of the same coordinates."""
        track = self.tracks[name]
        values, scale = self._values(track, x)
        if subtracted is not None:
            values = values.float() - subtracted
        history = self.histories.setdefault((track, moment.branch), History(self.gram.ages, scale))
        history.push(moment.step, values)

    def _values(self, track: int, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Returns a flat copy of the track's coordinates of all rows, and the factor of their products for the whole."""
        x = x.detach().reshape(self.rows, -1)
        size = x.shape[1]
        coordinates = self._choose(track, size)
        if coordinates is None:
            return x.flatten().clone(), 1.0
        return x.index_select(1, coordinates).flatten(), size / len(coordinates)

    def _choose(self, track: int, size: int) -> torch.Tensor | None:
        if (track, size) not in self.coordinates:
            found = chosen(self.gram.tracks[track].name, size)
            self.coordinates[track, size] = None if found is None else found.to(self.device)
        return self.coordinates[track, size]

    def flush(self) -> None:
        """Adds the batch's products to the sums, and releases its values."""
        if self.first:
            rows = [*self.states, *self.outputs]
            if len(rows) != len(self.gram.states):
                raise MismatchError(
                    f"The pipeline took {len(self.outputs)} steps of {self.gram.steps}. Profile without options that stop or "
                    "skip steps, or with --no-gram."
                )
            self.gram.states += inner_products(rows, len(rows)).cpu().numpy()
        for (track, _), history in self.histories.items():
            history.take()
            for last, products in history.products:
                self.gram.add(track, last, products.cpu().numpy() * history.scale)
        self.histories.clear()
        self.states, self.outputs = [], []
