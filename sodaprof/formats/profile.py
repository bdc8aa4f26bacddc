"""A profile on disk: a folder of JSON and Parquet files, and the arrays that compilers read from it.

`docs/formats.md` lists every column with its unit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from ..errors import FormatError, UnsupportedModelError
from .files import UPGRADE, Number, Record, decode, digest, read_json, write_json
from .sampler import OwnUpdate
from .sites import Model, Sampler, SiteKey, Transformer, model_from_json
from .tables import CELL, COLUMNS, GRAM, MEAN, STACK_FORMS, TABLES, VERSIONS, Columns, profile_again, read_table

FORECAST_SOURCES = 4  # at most
MAKE = "Make the profile: sodaprof profile MODEL -o DIR"


class Manifest(Record, frozen=True):
    """The content of manifest.json: what was asked for, where it ran, and how long it took."""

    FORMAT = "sodaprof.profile", 1
    tables: dict[str, int]  # name -> version
    model: str
    sampler: str
    prompts: Annotated[tuple[int | str, ...], Meta(min_length=1)]
    seed: Annotated[int, Meta(ge=0)]
    samples: Annotated[int, Meta(ge=1)]
    max_interval: Annotated[int, Meta(ge=2)]
    batch_size: int
    guidance_scale: Number | None
    dtype: str
    device: str
    versions: dict[str, Any]
    measured: dict[str, Any]


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
        """Returns the SHA-256 of the request, the tables and the sampler's own update; duration and device do not enter."""
        kept = {k: v for k, v in self.manifest.items() if k not in ("measured", "versions", "device")}
        names = {t: f"{t}.parquet" for t in self.manifest["tables"] if t in COLUMNS}
        if (self.folder / "solver.json").exists():
            names["solver"] = "solver.json"
        files = {name: hashlib.sha256((self.folder / file).read_bytes()).hexdigest() for name, file in names.items()}
        return digest({"manifest": kept, "tables": files})

    def reference(self) -> dict[str, Any]:
        """Returns what a schedule records of its profile: the digest, and the seeds that are not held out."""
        return {"digest": self.digest(), "seed": self.manifest["seed"], "samples": self.manifest["samples"]}

    def caching_error(self, metric: str = "cos", branch: int = MEAN) -> dict[str, np.ndarray]:
        """Returns per transformer the error of reuse [T, S, ages + 1], branch mean or of a branch; NaN before the turn."""
        table = self._read("caching", [*CELL, f"{metric}_mean"])
        errors = self._stale_errors(table, f"{metric}_mean", np.zeros(len(table["step"]), dtype=int), branch)
        return {name: array[..., 0] for name, array in errors.items()}

    def pruning_error(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns per transformer E_p [T, S, ages + 1, rates] (1 − cosine, branch mean), and the prune rates [rates]."""
        table = self._read("pruning", [*CELL, "prune_rate", "mean"])
        rates, rate = np.unique(table["prune_rate"], return_inverse=True)
        return self._stale_errors(table, "mean", rate, MEAN), rates

    def _stale_errors(self, table: Columns, value: str, rate: np.ndarray, branch: int) -> dict[str, np.ndarray]:
        """Returns per transformer a column as [T, S, ages + 1, rates]; rate: the index of each row's prune rate."""
        dense = {}
        for name, transformer in self.model.transformers.items():
            rows = np.flatnonzero((table["branch"] == branch) & (table["transformer"] == name))
            shape = (self.sampler.steps, len(transformer.sites), self.max_age + 1, rate.max(initial=0) + 1)
            index = table["step"][rows], self._site_numbers(table, rows, transformer), table["age"][rows], rate[rows]
            if any(((i < 0) | (i >= n)).any() for i, n in zip(index, shape, strict=True)):
                raise self._broken("a table has steps or ages outside the profile")
            array = np.full(shape, np.nan)
            array[index] = table[value][rows]
            past = np.array(transformer.past(self.sampler.steps))
            for age in range(1, self.max_age + 1):
                if np.isnan(array[past >= age, :, age]).any():
                    raise self._broken(f"rows are missing at age {age}")
            dense[name] = array
        return dense

    def state_products(self) -> np.ndarray:
        """Returns the inner products [2T + 1, 2T + 1] of the latents x_0 … x_T, then of the guided outputs v_0 … v_(T−1).

        Summed over the elements of a generation's latents, mean over the generations; as the scheduler's step receives them.
        """
        table = self._read("gram", list(GRAM))
        return self._square(table, table["kind"] == "state", np.arange(2 * self.sampler.steps + 1))

    def response(self) -> np.ndarray | None:
        """Returns how far the guided output moves along an error of the latents of an accelerated run, relative to it, [T].

        Interpolated between the steps at which it was measured, constant before the first and after the last. None if the
        profile has not measured it: fewer than 16 samples, or a pipeline that cannot be replayed.
        """
        table, steps = self._read("gram", list(GRAM)), self.sampler.steps
        rows = {kind: np.flatnonzero(table["kind"] == kind) for kind in ("away", "response")}
        if not all(map(len, rows.values())):
            return None
        away, moved = (
            dict(zip(table["row"][r].tolist(), table["product"][r].tolist(), strict=True)) for r in rows.values()
        )
        if away.keys() != moved.keys() or not away.keys() <= set(range(steps)):
            raise self._broken("rows of kind away or response are missing")
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
        for name, transformer in self.model.transformers.items():
            rows = np.flatnonzero((table["kind"] == "site") & (table["transformer"] == name))
            site, past = self._site_numbers(table, rows, transformer), self._past(transformer)
            found[name] = np.stack([self._square(table, rows[site == i], past) for i in range(len(transformer.sites))])
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

    def _products_of_outputs(self) -> Columns:
        table = self._read("gram", list(GRAM))
        if "caching" not in self.manifest["tables"]:
            raise FormatError(
                f"{self.folder}/gram.parquet: holds products of states alone: made with --states-only. Profile again without "
                f"it: sodaprof profile MODEL -o {self.folder} --force"
            )
        return table

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
            raise self._broken("has products of steps that are not in the profile")
        array = np.full((size, size), np.nan)
        array[row, column] = array[column, row] = table["product"][rows]
        if len(row) != wanted.sum() or np.isnan(array[wanted]).any():
            raise self._broken("products are missing, or occur twice")
        return array

    def _site_numbers(self, table: Columns, rows: np.ndarray, transformer: Transformer) -> np.ndarray:
        """Returns the index of the site, among those of the transformer, of each of these rows."""
        order: dict[tuple[Any, ...], int] = {site.place: i for i, site in enumerate(transformer.sites)}
        places = zip(*(table[column][rows] for column in SiteKey._fields), strict=True)
        try:
            return np.array([order[place] for place in places], dtype=int)
        except KeyError as error:
            raise self._broken(f"a table names the site {error}, model.json does not") from None

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
        return read_table(self.folder, table, columns)


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
    data = read_json(path, MAKE)
    again = profile_again(folder)
    tables = decode(data, Manifest, str(path), again).tables
    gram = {"gram"} & set(tables)
    for table in [*gram] if gram and not set(tables) & set(TABLES) else [*TABLES, *gram]:
        if not (inspection.folder / f"{table}.parquet").is_file():
            raise FormatError(f"{folder}/{table}.parquet: no such file, which manifest.json names. {again}")
        version, newest = tables.get(table), VERSIONS[table]
        if version is None or not 1 <= version <= newest:
            advice = again if version is None or version < 1 else UPGRADE
            raise FormatError(
                f"{path}: table {table} has version {version}, this release reads 1 to {newest}. {advice}"
            )
    return Profile(inspection.folder, inspection.model, inspection.sampler, data)


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
