"""One batch's inner products between steps, in float64 on the device: states and guided outputs, sites, stacks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import MismatchError, UnsupportedModelError
from ..pipelines.clock import Moment
from .budget import coordinates_of, slots_of
from .gram import GramSums

CHUNK = 8192  # coordinates converted to float64 at once


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
        if self.rows and step != self.last + 1:  # a new turn: it reuses nothing from before
            self.take()
            self.rows, self.taken = [], 0
        if len(self.rows) == slots_of(self.ages):
            self.take()
            self.rows = self.rows[-self.ages :]
            self.taken = len(self.rows)
        self.rows.append(values)
        self.last = step

    def take(self) -> None:
        """Multiplies the rows since the last time with all that are kept."""
        if len(self.rows) > self.taken:
            self.products.append((self.last, inner_products(self.rows, len(self.rows) - self.taken)))
            self.taken = len(self.rows)


class Products:
    """Keeps one batch's values and products; there is no host sync before `flush`."""

    def __init__(self, gram: GramSums, rows: int, count: int, first: bool, device: torch.device) -> None:
        """rows: of a network call's batch; count: generations; first: states and stacks are measured too, not only sites."""
        self.gram, self.rows, self.count, self.first, self.device = gram, rows, count, first, device
        self.tracks = {(t.transformer, t.site.key if t.site else t.kind): i for i, t in enumerate(gram.tracks)}
        self.histories: dict[tuple[int, int], History] = {}  # (track, branch)
        self.entries: dict[str, torch.Tensor] = {}  # transformer -> input of its first block in the call under way
        self.states: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.coordinates: dict[tuple[int, int], torch.Tensor | None] = {}  # (track, size) -> of a generation's branch
        for track, known in enumerate(gram.tracks):
            self._choose(track, known.size)  # ahead of the loop

    def state(self, output: torch.Tensor, sample: torch.Tensor) -> None:
        """Keeps a step's guided output and the latents that it is applied to."""
        if output.shape != sample.shape and output.ndim == sample.ndim:
            output = output[:, : sample.shape[1]]  # without the learned variance (DDPM)
        if output.shape != sample.shape:
            raise UnsupportedModelError(
                f"The scheduler receives outputs {list(output.shape)} for latents {list(sample.shape)}; their products need "
                "one shape. Profile with --no-gram."
            )
        self.states.append(self._flat(sample))
        self.outputs.append(self._flat(output))

    def end(self, sample: torch.Tensor) -> None:
        """Keeps the latents after the last step."""
        self.states.append(self._flat(sample))

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a flat copy; of the first half if a pipeline passes both guidance halves to its scheduler."""
        if len(x) == self.rows == 2 * self.count:
            x = x[: self.count]
        return x.detach().flatten().to(torch.float32, copy=True)

    def site(self, transformer: str, key: str, moment: Moment, out: torch.Tensor) -> None:
        """Keeps a site's output."""
        self._keep(self.tracks[transformer, key], moment, out)

    def enter(self, transformer: str, x: torch.Tensor) -> None:
        """Keeps the input of the first block until `leave`."""
        values, _ = self._values(self.tracks[transformer, "drift"], x)
        self.entries[transformer] = values.float()

    def leave(self, transformer: str, moment: Moment, out: torch.Tensor) -> None:
        """Keeps the output of the last block."""
        self._keep(self.tracks[transformer, "output"], moment, out)
        self._keep(self.tracks[transformer, "drift"], moment, out, self.entries.pop(transformer))

    def _keep(self, track: int, moment: Moment, x: torch.Tensor, subtracted: torch.Tensor | None = None) -> None:
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
