"""The profile on disk: a folder of JSON and Parquet, and the dense arrays that compilers read from it.

`docs/formats.md` lists every column with its unit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, UnsupportedModelError
from .files import checked, digest, exact_keys, header, of_type, read_json, write_json
from .sampler import FORMAT as SOLVER
from .sampler import VERSION as SOLVER_VERSION
from .sampler import OwnUpdate, own_update_from_json
from .sites import Model, Sampler, model_from_json, sampler_from_json
from .tables import (
    CELL,
    COLUMNS,
    GRAM,
    MEAN,
    TABLES,
    VERSIONS,
    _again,
    read_table,
    response,
    site_products,
    stack_products,
    stale_errors,
    state_products,
)

FORMAT, VERSION = "sodaprof.profile", 1
FORECAST_SOURCES = 4  # at most
MANIFEST = {
    "format", "version", "tables", "model", "sampler", "prompts", "seed", "samples", "max_interval", "batch_size",
    "guidance_scale", "dtype", "device", "versions", "measured",
}  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What needs no sampling: `model.json`, `sampler.json`, and the folder that holds them and `cost.flops.json`."""

    folder: Path
    model: Model
    sampler: Sampler

    def own_update(self) -> OwnUpdate:
        """Returns the sampler's own steps as coefficients, from solver.json.

        Raises UnsupportedModelError with the reason where they are not linear, FormatError where the file is missing (an older
        folder), broken, or for another number of steps.
        """
        path = self.folder / "solver.json"
        if not path.exists():
            raise FormatError(
                f"{path}: no such file; the folder was written before sodaprof recorded the sampler's own update. Profile "
                f"again: sodaprof profile MODEL -o {self.folder} --force"
            )
        data = read_json(path)
        if isinstance(data, dict) and "refused" in data:
            exact_keys(header(data, SOLVER, SOLVER_VERSION, str(path)), {"format", "version", "refused"}, str(path))
            raise UnsupportedModelError(of_type(data["refused"], str, f"{path}: refused"))
        update = checked(lambda: own_update_from_json(data, str(path)), str(path))
        if update.steps != self.sampler.steps:
            raise FormatError(
                f"{path}: {update.steps} steps, sampler.json has {self.sampler.steps}. {_again(self.folder)}"
            )
        return update


@dataclass(frozen=True)
class Profile(Inspection):
    """A profile folder: its tables are read when they are asked for."""

    manifest: dict[str, Any]

    @property
    def max_age(self) -> int:
        return self.manifest["max_interval"] - 1

    @property
    def history(self) -> int:
        """The oldest age, in steps, whose products with the present outputs are recorded."""
        return history_of(self.sampler.steps, self.manifest["max_interval"])

    def digest(self) -> str:
        """SHA-256 over the request, the tables and the sampler's own update: not over how long they took or on what device."""
        kept = {k: v for k, v in self.manifest.items() if k not in ("measured", "versions", "device")}
        names = {t: f"{t}.parquet" for t in self.manifest["tables"] if t in COLUMNS}
        if (self.folder / "solver.json").exists():
            names["solver"] = "solver.json"
        files = {name: hashlib.sha256((self.folder / file).read_bytes()).hexdigest() for name, file in names.items()}
        return digest({"manifest": kept, "tables": files})

    def reference(self) -> dict[str, Any]:
        """What a schedule remembers of its profile: the digest, and the seeds that evaluation must keep away from."""
        return {"digest": self.digest(), "seed": self.manifest["seed"], "samples": self.manifest["samples"]}

    def caching_error(self, metric: str = "cos") -> dict[str, np.ndarray]:
        """Returns per transformer the error of reuse, [T, S, ages + 1], branch mean; NaN where there is no such past."""
        table = self._read("caching", [*CELL, f"{metric}_mean"])
        return self._stale_errors(table, f"{metric}_mean", None)

    def pruning_error(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns per transformer E_p [T, S, ages + 1, rates] (1 − cosine, branch mean), and the prune rates [rates]."""
        table = self._read("pruning", [*CELL, "prune_rate", "mean"])
        rates = np.unique(table["prune_rate"])
        return self._stale_errors(table, "mean", rates), rates

    def _stale_errors(
        self, table: dict[str, np.ndarray], value: str, rates: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        keep = table["branch"] == MEAN
        return stale_errors(table, value, keep, self.model, self.sampler.steps, self.max_age, rates, self.folder)

    def state_products(self) -> np.ndarray:
        """Returns the inner products [2T + 1, 2T + 1] of the latents x_0 … x_T, then of the guided outputs v_0 … v_(T−1).

        Summed over the elements of a generation's latents, mean over the generations; as they pass through the scheduler's step.
        """
        return state_products(self._read("gram", list(GRAM)), self.sampler.steps, self.folder)

    def response(self) -> np.ndarray | None:
        """Returns what the guided output moves by with the latents, along the errors of an accelerated run, [T].

        None where the profile measured none: of less than 16 samples, or of a pipeline that cannot be replayed.
        """
        return response(self._read("gram", list(GRAM)), self.sampler.steps, self.folder)

    def site_products(self) -> dict[str, np.ndarray]:
        """Returns per transformer the inner products [S, T, T] of each site's outputs at two steps, symmetric.

        Summed over the elements of a generation's output on both branches, mean over the generations. NaN for steps that are more
        than `history` apart or not of one turn.
        """
        table = self._products_of_outputs()
        return site_products(table, self.model, self.sampler.steps, self.history, self.folder)

    def stack_products(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns per transformer the products [T, T] of what its last block hands on: `output`, and `drift`, as of a site.

        drift: less what the first block is given. Transformers whose blocks do not hand on one tensor are left out.
        """
        table = self._products_of_outputs()
        return stack_products(table, self.model, self.sampler.steps, self.history, self.folder)

    def _products_of_outputs(self) -> dict[str, np.ndarray]:
        table = self._read("gram", list(GRAM))
        if "caching" not in self.manifest["tables"]:
            raise FormatError(
                f"{self.folder}/gram.parquet: holds products of states alone: made with --states-only. Profile again without "
                f"it: sodaprof profile MODEL -o {self.folder} --force"
            )
        return table

    def _read(self, table: str, columns: list[str]) -> dict[str, np.ndarray]:
        """Returns columns of a table; FormatError where the profile was made without it, or before there was such a table."""
        if table not in self.manifest["tables"]:
            left_out = "--no-gram" if table == "gram" else "--states-only"
            has = ", ".join(t for t in self.manifest["tables"] if t in COLUMNS)
            raise FormatError(
                f"{self.folder}: holds no {table}.parquet, only {has}: made with {left_out}, or by an older release. Profile "
                f"again without {left_out}: sodaprof profile MODEL -o {self.folder} --force"
            )
        return read_table(self.folder, table, columns)


def load_inspection(folder: str | Path) -> Inspection:
    """Returns what `sodaprof inspect -o` (or `profile`) wrote to `folder`; FormatError where it is broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder. Make it: sodaprof profile MODEL -o {folder}")
    model_path, sampler_path = folder / "model.json", folder / "sampler.json"
    if missing := [path for path in (model_path, sampler_path) if not path.exists()]:
        raise FormatError(
            f"{missing[0]}: no such file; expected a folder that profile or inspect wrote. Make it: sodaprof profile MODEL -o DIR"
        )
    model = checked(lambda: model_from_json(read_json(model_path), str(model_path)), str(model_path))
    sampler = checked(lambda: sampler_from_json(read_json(sampler_path), str(sampler_path)), str(sampler_path))
    return Inspection(folder, model, sampler)


def load_profile(folder: str | Path) -> Profile:
    """Returns the profile in `folder`. Raises FormatError where a part is missing, broken, or newer than this release."""
    inspection = load_inspection(folder)
    path = inspection.folder / "manifest.json"
    if not path.exists():
        raise FormatError(
            f"{path}: no such file; the folder holds no sensitivity tables. Measure them: sodaprof profile MODEL -o DIR"
        )
    manifest = exact_keys(header(read_json(path), FORMAT, VERSION, str(path)), MANIFEST, str(path))
    for table in _named(manifest["tables"]):
        if not (inspection.folder / f"{table}.parquet").is_file():
            raise FormatError(f"{folder}/{table}.parquet: no such file, which manifest.json names. {_again(folder)}")
        version = manifest["tables"].get(table) if isinstance(manifest["tables"], dict) else None
        newest = VERSIONS[table]
        if type(version) is not int or not 1 <= version <= newest:
            raise FormatError(
                f"{path}: table {table} has version {version!r}, this release reads 1 to {newest}. Upgrade sodaprof (pip install "
                f"-U sodaprof) where it is newer, else profile again: sodaprof profile MODEL -o {folder} --force"
            )
    for key, least in (("seed", 0), ("samples", 1), ("max_interval", 2)):
        if type(manifest[key]) is not int or manifest[key] < least:
            raise FormatError(
                f"{path}: {key} is {manifest[key]!r}; expected a whole number of at least {least}. {_again(folder)}"
            )
    entries = manifest["prompts"]
    if not isinstance(entries, list) or not entries or not {type(e) for e in entries} <= {int, str}:
        raise FormatError(f"{path}: prompts must be a list of at least one prompt or label. {_again(folder)}")
    return Profile(inspection.folder, inspection.model, inspection.sampler, manifest)


def _named(tables: Any) -> list[str]:
    """Returns the tables that a profile must have: gram where its manifest names it, the others unless it names gram alone."""
    gram = ["gram"] if isinstance(tables, dict) and "gram" in tables else []
    return gram if gram and not set(tables) & set(TABLES) else [*TABLES, *gram]


def history_of(steps: int, max_interval: int) -> int:
    """Returns the oldest age whose products are recorded: of four forecast sources, each a longest interval before the next."""
    return min(steps - 1, FORECAST_SOURCES * (max_interval - 1))


def write_inspection(folder: Path, model: Model, sampler: Sampler) -> None:
    """Writes the parts of a profile folder that tell the sites and the sampler."""
    write_json(folder / "model.json", model.to_json(), force=True)
    write_json(folder / "sampler.json", sampler.to_json(), force=True)


def write_solver(folder: Path, update: OwnUpdate | UnsupportedModelError) -> None:
    """Writes solver.json: the sampler's own update, or why there is none."""
    refused = {"format": SOLVER, "version": SOLVER_VERSION, "refused": str(update)}
    data = update.to_json() if isinstance(update, OwnUpdate) else refused
    write_json(folder / "solver.json", data, force=True)
