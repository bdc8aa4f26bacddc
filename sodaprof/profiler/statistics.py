"""Streaming statistics of a profile: sums in float64, whose size does not grow with the samples, and their tables."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.disk import read_bytes
from ..formats.files import replacing
from ..formats.sites import Model, Site
from ..formats.tables import MEAN, METRICS, PLACE, RANKING, write_table
from .budget import Grid
from .gram import GramSums


class Statistics:
    """Sums and sums of squares over generations, for each step, site, age and branch (the last is the branch mean)."""

    def __init__(
        self,
        sites: list[tuple[str, Site]],
        steps: int,
        ages: int,
        branches: int,
        rates: np.ndarray,
        grids: Sequence[Grid],  # of each site's errors a token
        varying: frozenset[int] = frozenset(),  # numbers of the sites with one token for each token of the prompt
        gram: GramSums | None = None,
    ) -> None:
        self.sites, self.steps, self.ages, self.branches, self.rates = sites, steps, ages, branches, rates
        self.varying, self.grids, self.gram = varying, grids, gram
        cells = (steps, len(sites), ages)
        self.whole = np.zeros((2, *cells, branches + 1, len(METRICS)))
        self.pruned = np.zeros((2, *cells, branches + 1, len(rates)))
        self.tokens = [np.zeros((steps, ages, grid.size)) for grid in grids]
        self.samples = 0

    def add(self, step: int, site: int, whole: np.ndarray, pruned: np.ndarray, tokens: np.ndarray | None) -> None:
        """Adds one batch at one step: whole [branches, B, A, 3], pruned [branches, B, A, rates], tokens [M, A].

        tokens: summed over the generations, on the site's grid.
        """
        ages = whole.shape[2]
        for total, values in ((self.whole, whole), (self.pruned, pruned)):
            values = np.concatenate([values, values.mean(0, keepdims=True)])  # [branches + 1, B, A, …]
            values = values.astype(np.float64)
            total[0, step, site, :ages] += values.sum(1).swapaxes(0, 1)
            total[1, step, site, :ages] += np.square(values).sum(1).swapaxes(0, 1)
        if tokens is not None:
            self.tokens[site][step, :ages] += tokens.T

    def _arrays(self) -> dict[str, Any]:
        arrays = {"whole": self.whole, "pruned": self.pruned} | {f"tokens_{i}": t for i, t in enumerate(self.tokens)}
        return arrays | ({"states": self.gram.states, "products": self.gram.products} if self.gram else {})

    @property
    def finite(self) -> bool:
        """Whether no sum holds NaN or infinity."""
        return all(np.isfinite(array).all() for array in self._arrays().values())

    def save(self, path: Path, batches: int) -> None:
        """Writes the sums, how many batches they are of, all passes counted, and a digest of all, atomically."""
        arrays: dict[str, Any] = {
            n: np.asarray(a) for n, a in {**self._arrays(), "samples": self.samples, "batches": batches}.items()
        }
        with replacing(path, force=True) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays, digest=_digest(arrays))

    def restore(self, path: Path) -> int:
        """Reads the file of `save` and returns the number of batches; ValueError for any other file."""
        arrays = self._arrays()
        content = read_bytes(path, sum(array.nbytes + 1024 for array in arrays.values()) + 65536)
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as saved:
                found = {name: saved[name] for name in saved.files}
        except MemoryError:
            raise
        except Exception as error:  # of bytes in memory: zipfile, decompressors and numpy raise many kinds
            raise ValueError(str(error) or "it ends early") from None
        if not np.array_equal(found.pop("digest", None), _digest(found)):
            raise ValueError("its content is not that of its digest")
        if any(found[name].shape != array.shape for name, array in arrays.items()):
            raise ValueError("the sums are of another profile")
        for name, array in arrays.items():
            array[...] = found[name]
        self.samples = int(found["samples"])
        return int(found["batches"])

    def write_tables(self, folder: Path, model: Model) -> None:
        """Writes sites.parquet, caching.parquet and pruning.parquet."""
        past = np.array([model.transformers[name].past(self.steps) for name, _ in self.sites])  # [S, T]
        known = np.arange(1, self.ages + 1) <= past.T[..., None]  # [T, S, A]: the turn has a step of this age
        rows = np.nonzero(np.repeat(known[..., None], self.branches + 1, axis=-1))
        step, site, age, branch = rows
        cell = self._places(site) | {
            "step": step,
            "age": age + 1,
            "branch": np.where(branch == self.branches, MEAN, branch),
        }
        count = self.samples * self.branches
        caching: dict[str, Any] = cell | {"n": np.full(len(step), self.samples)}
        for kind, values in self._moments(self.whole).items():
            caching |= {f"{metric}_{kind}": values[(*rows, i)].astype(np.float32) for i, metric in enumerate(METRICS)}
        caching["token_cos"] = [
            (self.tokens[s][t, a] / count).astype(np.float16) if b == self.branches and s not in self.varying else None
            for t, s, a, b in zip(*rows, strict=True)
        ]
        write_table(folder, "caching", caching)

        pruning = {name: np.repeat(values, len(self.rates)) for name, values in cell.items()}
        pruning |= {
            kind: values[rows].ravel().astype(np.float32) for kind, values in self._moments(self.pruned).items()
        }
        pruning["prune_rate"] = np.tile(self.rates, len(step)).astype(np.float32)
        pruning["ranking"] = np.full(len(pruning["step"]), RANKING)
        pruning["n"] = np.full(len(pruning["step"]), self.samples)
        write_table(folder, "pruning", pruning)

        columns = {c: np.array([getattr(s, c) for _, s in self.sites]) for c in ("kind", "tokens", "width", "prunable")}
        grids: dict[str, Any] = {"token_grid": [list(grid.shape) for grid in self.grids]}
        write_table(folder, "sites", self._places(np.arange(len(self.sites))) | columns | grids)

    def _moments(self, total: np.ndarray) -> dict[str, np.ndarray]:
        """Returns mean and standard deviation over the generations (of the sample, 0 for a single one)."""
        mean = total[0] / self.samples
        spread = np.maximum(total[1] / self.samples - mean**2, 0) * self.samples / max(self.samples - 1, 1)
        return {"mean": mean, "std": np.sqrt(spread)}

    def _places(self, site: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the columns that name the sites of these numbers."""
        places = np.array([(name, *s.place) for name, s in self.sites], dtype=object)
        return dict(zip(PLACE, places[site].T, strict=True))


def _digest(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the SHA-256 of arrays with their names, types and shapes, as 32 bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return np.frombuffer(total.digest(), dtype=np.uint8)
