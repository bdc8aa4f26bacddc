"""Streaming statistics of a profile: sums in float64, whose size does not grow with the samples, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.files import replacing
from ..formats.sites import Model, Site
from ..formats.tables import MEAN, METRICS, RANKING, write_table
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
            values = np.concatenate([values, values.mean(0, keepdims=True)]).astype(
                np.float64
            )  # [branches + 1, B, A, …]
            total[0, step, site, :ages] += values.sum(1).swapaxes(0, 1)
            total[1, step, site, :ages] += np.square(values).sum(1).swapaxes(0, 1)
        if tokens is not None:
            self.tokens[site][step, :ages] += tokens.T

    def save(self, path: Path, progress: dict[str, int]) -> None:
        """Writes the sums and the progress of the run, atomically."""
        arrays: dict[str, Any] = {f"tokens_{i}": t for i, t in enumerate(self.tokens)}
        arrays |= self.gram.arrays() if self.gram else {}
        arrays |= {"whole": self.whole, "pruned": self.pruned, "samples": self.samples, **progress}
        with replacing(path, force=True) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def restore(self, path: Path) -> dict[str, int]:
        """Reads the file of `save` and returns the progress of the run."""
        with np.load(path, allow_pickle=False) as saved:
            self.whole, self.pruned, self.samples = saved["whole"], saved["pruned"], int(saved["samples"])
            self.tokens = [saved[f"tokens_{i}"] for i in range(len(self.tokens))]
            if self.gram:
                self.gram.restore(saved)
            return {key: int(saved[key]) for key in saved.files if key in ("group", "batch")}

    def write_tables(self, folder: Path, model: Model) -> None:
        """Writes sites.parquet, caching.parquet and pruning.parquet."""
        past = np.array([model.transformers[name].past(self.steps) for name, _ in self.sites])  # [S, T]
        known = np.arange(1, self.ages + 1) <= past.T[..., None]  # [T, S, A]: the turn has a step of this age
        step, site, age, branch = (
            i.ravel() for i in np.meshgrid(*(np.arange(n) for n in self.whole.shape[1:5]), indexing="ij")
        )
        rows = known[step, site, age]
        step, site, age, branch = step[rows], site[rows], age[rows], branch[rows]
        cell = self._places(site) | {
            "step": step.astype(np.int16),
            "age": (age + 1).astype(np.int8),
            "branch": np.where(branch == self.branches, MEAN, branch).astype(np.int8),
        }
        mean, std = self._moments(self.whole)
        caching: dict[str, Any] = dict(cell)
        for m, metric in enumerate(METRICS):
            caching[f"{metric}_mean"] = mean[step, site, age, branch, m].astype(np.float32)
            caching[f"{metric}_std"] = std[step, site, age, branch, m].astype(np.float32)
        caching["n"] = np.full(len(step), self.samples, dtype=np.int32)
        count = self.samples * self.branches
        caching["token_cos"] = [
            (self.tokens[s][t, a] / count).astype(np.float16) if b == self.branches and s not in self.varying else None
            for t, s, a, b in zip(step, site, age, branch, strict=True)
        ]
        write_table(folder, "caching", caching)

        mean, std = self._moments(self.pruned)
        repeat = len(self.rates)
        pruning = {name: np.repeat(values, repeat) for name, values in cell.items()}
        pruning |= {
            "ranking": np.full(len(step) * repeat, RANKING, dtype=object),
            "prune_rate": np.tile(self.rates, len(step)).astype(np.float32),
            "mean": mean[step, site, age, branch].ravel().astype(np.float32),
            "std": std[step, site, age, branch].ravel().astype(np.float32),
            "n": np.full(len(step) * repeat, self.samples, dtype=np.int32),
        }
        write_table(folder, "pruning", pruning)
        every = np.arange(len(self.sites))
        columns = {c: np.array([getattr(s, c) for _, s in self.sites]) for c in ("kind", "tokens", "width", "prunable")}
        grids: Any = {"token_grid": [list(grid.shape) for grid in self.grids]}
        write_table(folder, "sites", self._places(every) | columns | grids)

    def _moments(self, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation over the generations (of the sample, 0 for a single one)."""
        mean = total[0] / self.samples
        spread = np.maximum(total[1] / self.samples - mean**2, 0) * self.samples / max(self.samples - 1, 1)
        return mean, np.sqrt(spread)

    def _places(self, site: np.ndarray) -> dict[str, np.ndarray]:
        names = np.array([name for name, _ in self.sites], dtype=object)
        places = {"transformer": names[site]}
        for column in ("stack", "layer", "module", "call"):
            values = np.array([getattr(s, column) for _, s in self.sites], dtype=object)
            places[column] = values[site]
        return places
