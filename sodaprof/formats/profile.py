"""A profile on disk: a folder of JSON and Parquet files, and the arrays that compilers read from it.

`docs/formats.md` lists every column with its unit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, UnsupportedModelError
from .files import Record, cut, decode, digest, read_json, shown, write_json
from .manifest import read_manifest
from .sampler import OwnUpdate
from .sites import Model, Sampler, Transformer, model_from_json
from .tables import (
    CELL,
    COLUMNS,
    GRAM,
    MEAN,
    METRICS,
    PLACE,
    STACK_FORMS,
    Columns,
    encoded,
    profile_again,
    read_table,
    table_digest,
)  # fmt: skip

MAX_BRANCHES = 8  # of guidance
ROUNDING = 1e-4  # how far rounding may move an error below 0, or a product above its bound, relative to it
LARGEST = 1e30  # of an error; 1 − cosine ends at 2, the others have no bound
LARGEST_PRODUCT = 1e60
FORECAST_SOURCES = 4  # at most
MAKE = "Make the profile: sodaprof profile MODEL -o DIR"


class Refused(Record, frozen=True):
    """The content of solver.json if the sampler's steps are not linear."""

    FORMAT = OwnUpdate.FORMAT
    refused: str  # the reason


@dataclass(frozen=True)
class Inspection:
    """The part of a profile that needs no sampling: model.json, sampler.json, and the folder with these and cost.flops.json."""

    folder: Path
    model: Model
    sampler: Sampler

    def own_update(self) -> OwnUpdate:
        """Returns the sampler's own steps as coefficients, from solver.json.

        Raises UnsupportedModelError with the reason if they are not linear, FormatError if the file is missing (an older
        folder), broken, or of another number of steps.
        """
        path = self.folder / "solver.json"
        data = read_json(path, again := profile_again(self.folder))
        if isinstance(data, dict) and "refused" in data:
            raise UnsupportedModelError(decode(data, Refused, str(path), again).refused)
        update = decode(data, OwnUpdate, str(path), again)
        if update.steps != self.sampler.steps:
            raise FormatError(f"{path}: {update.steps} steps, sampler.json has {self.sampler.steps}. {again}")
        return update


@dataclass(frozen=True)
class Profile(Inspection):
    """A profile folder. Each table is read when a method needs it."""

    manifest: dict[str, Any]  # the whole of manifest.json; see `Manifest`

    @property
    def max_age(self) -> int:
        return self.manifest["max_interval"] - 1

    @property
    def history(self) -> int:
        """The oldest age, in steps, of an output whose product with the current one is recorded."""
        return history_of(self.sampler.steps, self.manifest["max_interval"])

    def digest(self) -> str:
        """Returns the SHA-256 of the request, the tables and the sampler's own update; duration and device do not enter.

        The version of the manifest does not enter either: a profile has the same digest in both.
        """
        left_out = ("measured", "versions", "device", "digests")
        kept = {k: v for k, v in self.manifest.items() if k not in left_out} | {"version": 1}
        files = {table: table_digest(self.folder, table) for table in self.manifest["tables"] if table in COLUMNS}
        if (path := self.folder / "solver.json").exists():
            files["solver"] = hashlib.sha256(path.read_bytes()).hexdigest()
        return digest({"manifest": kept, "tables": files})

    def reference(self) -> dict[str, Any]:
        """Returns what a schedule records of its profile: the digest, and the seeds that are not held out."""
        return {"digest": self.digest(), "seed": self.manifest["seed"], "samples": self.manifest["samples"]}

    def caching_error(self, metric: str = "cos", branch: int = MEAN) -> dict[str, np.ndarray]:
        """Returns per transformer the error of reuse [T, S, ages + 1], branch mean or of a branch; NaN before the turn."""
        errors = self._stale_errors("caching", f"{metric}_mean", branch)[0]
        return {name: array[..., 0] for name, array in errors.items()}

    def pruning_error(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns per transformer E_p [T, S, ages + 1, rates] (1 − cosine, branch mean), and the prune rates [rates]."""
        return self._stale_errors("pruning", "mean", MEAN)

    def _stale_errors(self, table: str, value: str, branch: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns per transformer a column of a table of cells as [T, S, ages + 1, rates], and the rates; caching has one, 0."""
        values = [f"{metric}_mean" for metric in METRICS] if table == "caching" else ["mean", "prune_rate"]
        rows = self._read(table, [*CELL, *values, "n"])
        kept = values if table == "caching" else ["mean"]
        if any((rows[v] < -ROUNDING).any() for v in kept) or any((rows[v] > LARGEST).any() for v in kept):
            raise self._broken(f"{table}.parquet has an error below 0 or above {LARGEST:g}")
        rates, rate = np.unique(rows.get("prune_rate", np.zeros(len(rows["n"]))), return_inverse=True)
        if table == "pruning" and not ((rates > 0) & (rates < 1)).all():
            raise self._broken("pruning.parquet has a prune rate outside 0 … 1")
        branches = int(rows["branch"].max(initial=0)) + 1
        expected = {"none": [1], "halves": [2], "passes": range(1, MAX_BRANCHES + 1)}[self.sampler.guidance.form]
        if branches not in expected:
            raise self._broken(
                f"{table}.parquet has {branches} branches for guidance of form {self.sampler.guidance_form}"
            )
        dense, site = {}, self._site_numbers(rows)
        for number, (name, transformer) in enumerate(self.model.transformers.items()):
            past = np.array(transformer.past(self.sampler.steps))
            ages = np.arange(self.max_age + 1)
            wanted = np.zeros((branches + 1, len(past), len(transformer.sites), len(ages), len(rates)), dtype=bool)
            wanted |= ((ages > 0) & (ages <= past[:, None]))[None, :, None, :, None]
            of_it = np.flatnonzero(site[0] == number)
            index = rows["branch"][of_it] + 1, rows["step"][of_it], site[1][of_it], rows["age"][of_it], rate[of_it]
            if any(((i < 0) | (i >= n)).any() for i, n in zip(index, wanted.shape, strict=True)):
                raise self._broken(f"{table}.parquet has branches, steps or ages outside the profile")
            found = np.bincount(np.ravel_multi_index(index, wanted.shape), minlength=wanted.size)
            if not np.array_equal(found.reshape(wanted.shape), wanted):
                raise self._broken(f"{table}.parquet lacks rows of {name}, or has some twice")
            array = np.full(wanted.shape, np.nan)
            array[index] = rows[value][of_it]
            dense[name] = array[branch + 1]
        return dense, rates

    def state_products(self) -> np.ndarray:
        """Returns the inner products [2T + 1, 2T + 1] of the latents x_0 … x_T, then of the guided outputs v_0 … v_(T−1).

        Summed over the elements of a generation's latents, mean over the generations; as the scheduler's step receives them.
        """
        table = self._products()
        return self._square(table, table["kind"] == "state", np.arange(2 * self.sampler.steps + 1))

    def response(self) -> np.ndarray | None:
        """Returns how far the guided output moves along an error of the latents of an accelerated run, relative to it, [T].

        Interpolated between the steps at which it was measured, constant before the first and after the last. None if the
        profile has not measured it: fewer than 16 samples, or a pipeline that cannot be replayed.
        """
        table, steps = self._products(), self.sampler.steps
        rows = {kind: np.flatnonzero(table["kind"] == kind) for kind in ("away", "response")}
        if not all(map(len, rows.values())):
            return None
        away, moved = (
            dict(zip(table["row"][r].tolist(), table["product"][r].tolist(), strict=True)) for r in rows.values()
        )
        if (
            away.keys() != moved.keys()
            or not away.keys() <= set(range(steps))
            or sum(map(len, rows.values())) != 2 * len(away)
        ):
            raise self._broken("gram.parquet lacks rows of kind away or response, or has some twice")
        known = sorted(step for step, energy in away.items() if energy > 0)  # at step 0 there is no error yet
        if not known:
            return np.zeros(steps)
        return np.interp(np.arange(steps), known, [moved[step] / away[step] for step in known])

    def site_products(self) -> dict[str, np.ndarray]:
        """Returns per transformer the inner products [S, T, T] of each site's outputs at two steps, symmetric.

        Summed over the elements of a generation's output on both branches, mean over the generations. NaN for steps that are more
        than `history` apart or not of one turn.
        """
        table, found = self._products_of_outputs(), {}
        rows = np.flatnonzero(table["kind"] == "site")
        of, site = self._site_numbers({column: values[rows] for column, values in table.items()})
        for number, (name, transformer) in enumerate(self.model.transformers.items()):
            past, sites = self._past(transformer), range(len(transformer.sites))
            found[name] = np.stack([self._square(table, rows[(of == number) & (site == i)], past) for i in sites])
        return found

    def stack_products(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns per transformer the inner products [T, T] of what its last block returns: `output` and `drift`.

        NaN as in `site_products`. drift: the output minus what enters the first block. A transformer whose blocks do not pass
        on one tensor has no entry.
        """
        table, found = self._products_of_outputs(), {}
        for name, transformer in self.model.transformers.items():
            rows = {form: (table["kind"] == form) & (table["transformer"] == name) for form in STACK_FORMS}
            if any(kept.any() for kept in rows.values()):
                past = self._past(transformer)
                found[name] = {form: self._square(table, kept, past) for form, kept in rows.items()}
        return found

    def _products(self) -> Columns:
        """Returns gram.parquet; FormatError for a row of an unknown kind or transformer, or a square below 0."""
        table = self._read("gram", list(GRAM))
        if others := {*table["kind"]} - {"state", "site", "away", "response", *STACK_FORMS}:
            raise self._broken(f"gram.parquet has rows of the unknown kind {shown(min(others))}")
        if others := {*table["transformer"]} - {"", *self.model.transformers}:
            raise self._broken(f"gram.parquet names the transformer {shown(min(others))}, model.json does not")
        squares = (table["row"] == table["column"]) & (table["kind"] != "response")
        if (table["product"][squares] < 0).any() or (np.abs(table["product"]) > LARGEST_PRODUCT).any():
            raise self._broken(f"gram.parquet has a square below 0, or a product above {LARGEST_PRODUCT:g}")
        if (table["coordinates"] < 1).any():
            raise self._broken("gram.parquet has products of no coordinates")
        return table

    def _products_of_outputs(self) -> Columns:
        if "caching" not in self.manifest["tables"]:
            raise FormatError(
                f"{self.folder}/gram.parquet: holds products of states alone: made with --states-only. Profile again without "
                f"it: sodaprof profile MODEL -o {self.folder} --force"
            )
        return self._products()

    def _past(self, transformer: Transformer) -> np.ndarray:
        """Returns how many earlier steps have a product with each step, −1 if the transformer is not called."""
        return np.minimum(transformer.past(self.sampler.steps), self.history)

    def _square(self, table: Columns, rows: np.ndarray, past: np.ndarray) -> np.ndarray:
        """Returns the symmetric matrix of these rows. past: how many columns before its diagonal each row has, −1 for none."""
        row, column = (table[c][rows].astype(int) for c in ("row", "column"))
        size = len(past)
        age = np.arange(size)[:, None] - np.arange(size)  # of (row, column)
        wanted = (age >= 0) & (age <= past[:, None])
        if not (((row >= 0) & (row < size) & (column >= 0) & (column < size)).all() and wanted[row, column].all()):
            raise self._broken("gram.parquet has products of steps that are not in the profile")
        array = np.full((size, size), np.nan)
        array[row, column] = array[column, row] = table["product"][rows]
        if len(row) != wanted.sum() or np.isnan(array[wanted]).any():
            raise self._broken("gram.parquet lacks products, or has some twice")
        length = np.sqrt(array.diagonal())
        if (np.abs(array) > (1 + ROUNDING) * np.outer(length, length) + np.finfo(np.float32).tiny).any():
            raise self._broken("gram.parquet has a product larger than those of either tensor with itself")
        return array

    def _site_numbers(self, rows: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Returns the number of each row's transformer, and of the site among those of the transformer."""
        code = np.zeros(len(rows["layer"]), dtype=np.int64)
        for column in PLACE:
            values, index = encoded(rows[column])
            code = code * len(values) + index
        _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
        order = {
            (name, *site.place): (number, i)
            for number, (name, transformer) in enumerate(self.model.transformers.items())
            for i, site in enumerate(transformer.sites)
        }
        places = zip(*(rows[column][first].tolist() for column in PLACE), strict=True)
        try:
            found = np.array([order[place] for place in places], dtype=int).reshape(-1, 2)
        except KeyError as error:
            raise self._broken(f"a table names the site {cut(str(error))}, model.json does not") from None
        return found[inverse, 0], found[inverse, 1]

    def _broken(self, what: str) -> FormatError:
        return FormatError(f"{self.folder}: {what}. {profile_again(self.folder)}")

    def _read(self, table: str, columns: list[str]) -> Columns:
        """Returns columns of a table; FormatError if the profile was made without it, or by a release that did not write it."""
        if table not in self.manifest["tables"]:
            left_out = "--no-gram" if table == "gram" else "--states-only"
            has = ", ".join(t for t in self.manifest["tables"] if t in COLUMNS)
            raise FormatError(
                f"{self.folder}: holds no {table}.parquet, only {has}: made with {left_out}, or by an older release. Profile "
                f"again without {left_out}: sodaprof profile MODEL -o {self.folder} --force"
            )
        rows = read_table(self.folder, table, columns)
        if (rows["n"] != self.manifest["samples"]).any():
            raise self._broken(f"{table}.parquet has rows of another number of generations than manifest.json")
        return rows

    def check_sites(self) -> None:
        """Raises FormatError unless sites.parquet says of each site what model.json does."""
        columns = ("kind", "tokens", "width", "prunable")
        rows = read_table(self.folder, "sites", [*PLACE, *columns])
        number, site = self._site_numbers(rows)
        sites = [list(transformer.sites) for transformer in self.model.transformers.values()]
        wanted = [[getattr(one, c) for c in columns] for of_one in sites for one in of_one]
        found = np.lexsort((site, number))
        same = [list(row) for row in zip(*(rows[c][found].tolist() for c in columns), strict=True)] == wanted
        if not same or len({*zip(number.tolist(), site.tolist(), strict=True)}) != len(wanted):
            raise self._broken("sites.parquet and model.json differ")


def load_inspection(folder: str | Path) -> Inspection:
    """Returns what `sodaprof inspect -o` (or `profile`) wrote to `folder`; FormatError if it is broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder. {MAKE}")
    model_path, sampler_path = folder / "model.json", folder / "sampler.json"
    model = model_from_json(read_json(model_path, MAKE), str(model_path))
    sampler = decode(read_json(sampler_path, MAKE), Sampler, str(sampler_path))
    return Inspection(folder, model, sampler)


def load_profile(folder: str | Path) -> Profile:
    """Returns the profile in `folder`. Raises FormatError if a part is missing, broken, or newer than this release."""
    inspection = load_inspection(folder)
    path = inspection.folder / "manifest.json"
    manifest, data = read_manifest(inspection.folder, MAKE)
    if manifest.max_interval > inspection.sampler.steps:
        raise FormatError(
            f"{path}: max_interval {manifest.max_interval} is above the number of steps. {profile_again(folder)}"
        )
    profile = Profile(inspection.folder, inspection.model, inspection.sampler, data)
    if "sites" in manifest.tables:
        profile.check_sites()
    return profile


def history_of(steps: int, max_interval: int) -> int:
    """Returns the oldest age of which products are recorded: four forecast sources, each the longest interval apart."""
    return min(steps - 1, FORECAST_SOURCES * (max_interval - 1))


def write_inspection(folder: Path, model: Model, sampler: Sampler) -> None:
    """Writes model.json and sampler.json."""
    write_json(folder / "model.json", model.to_json(), force=True)
    write_json(folder / "sampler.json", sampler.to_json(), force=True)


def write_solver(folder: Path, update: OwnUpdate | UnsupportedModelError) -> None:
    """Writes solver.json: the sampler's own update, or the reason why there is none."""
    record = update if isinstance(update, OwnUpdate) else Refused(str(update))
    write_json(folder / "solver.json", record.to_json(), force=True)
