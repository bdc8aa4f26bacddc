"""The profile on disk: a folder of JSON and Parquet, and the dense arrays that compilers read from it.

`docs/formats.md` lists every column with its unit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FormatError
from .files import checked, digest, exact_keys, header, read_json, write_json
from .sites import Model, Sampler, model_from_json, sampler_from_json

FORMAT, VERSION = "sodaprof.profile", 1
METRICS = ("cos", "l1", "l2")  # 1 − cosine, relative L1, relative L2
MEAN = -1  # the value of `branch` on rows that average over the branches
RANKING = "feature_mean"
PLACE = {"transformer": "string", "stack": "string", "layer": "int16", "module": "string", "call": "int8"}
CELL = PLACE | {"step": "int16", "age": "int8", "branch": "int8"}
TABLES: dict[str, dict[str, str]] = {  # table -> column -> Arrow type
    "sites": PLACE | {"kind": "string", "tokens": "int32", "width": "int32", "prunable": "bool", "token_grid": "list<int32>"},
    "caching": CELL | {f"{m}_{s}": "float" for m in METRICS for s in ("mean", "std")}
    | {"n": "int32", "token_cos": "list<float16>"},
    "pruning": CELL | {"ranking": "string", "prune_rate": "float", "mean": "float", "std": "float", "n": "int32"},
}  # fmt: skip
TABLE_VERSIONS = {"sites": 2, "caching": 1, "pruning": 1}
ADDED = {"sites": ["token_grid"]}  # columns that version 1 of a table has not
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


@dataclass(frozen=True)
class Profile(Inspection):
    manifest: dict[str, Any]

    @property
    def max_age(self) -> int:
        return self.manifest["max_interval"] - 1

    def digest(self) -> str:
        """SHA-256 over the request and the tables: not over how long they took or on what they were measured."""
        kept = {k: v for k, v in self.manifest.items() if k not in ("measured", "versions", "device")}
        files = {t: hashlib.sha256((self.folder / f"{t}.parquet").read_bytes()).hexdigest() for t in TABLES}
        return digest({"manifest": kept, "tables": files})

    def reference(self) -> dict[str, Any]:
        """What a schedule remembers of its profile: the digest, and the seeds that evaluation must keep away from."""
        return {"digest": self.digest(), "seed": self.manifest["seed"], "samples": self.manifest["samples"]}

    def caching_error(self, metric: str = "cos") -> dict[str, np.ndarray]:
        """Returns per transformer the error of reuse, [T, S, ages + 1], branch mean; NaN where there is no such past."""
        table = read_table(self.folder, "caching", [*CELL, f"{metric}_mean"])
        return self._dense(table, f"{metric}_mean", ())

    def pruning_error(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns per transformer E_p [T, S, ages + 1, rates] (1 − cosine, branch mean), and the prune rates [rates]."""
        table = read_table(self.folder, "pruning", [*CELL, "prune_rate", "mean"])
        rates = np.unique(table["prune_rate"])
        return self._dense(table, "mean", (rates,)), rates

    def _dense(self, table: dict[str, np.ndarray], value: str, rates: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        dense = {}
        for name, transformer in self.model.transformers.items():
            keep = (table["branch"] == MEAN) & (table["transformer"] == name)
            order = {(s.stack, s.layer, s.module, s.call): i for i, s in enumerate(transformer.sites)}
            places = zip(*(table[c][keep] for c in ("stack", "layer", "module", "call")), strict=True)
            try:
                site = np.array([order[place] for place in places], dtype=int)
            except KeyError as error:
                raise FormatError(f"{self.folder}: a table names the site {error}, model.json does not.") from None
            step, age = table["step"][keep].astype(int), table["age"][keep].astype(int)
            shape = (self.sampler.steps, len(order), self.max_age + 1, *(len(r) for r in rates))
            index: tuple[np.ndarray, ...] = (step, site, age)
            if rates:
                index += (np.searchsorted(rates[0], table["prune_rate"][keep]),)
            if len(step) and not all(((i >= 0) & (i < n)).all() for i, n in zip(index, shape, strict=True)):
                raise FormatError(f"{self.folder}: a table has steps or ages outside the profile. Profile again.")
            array = np.full(shape, np.nan)
            array[index] = table[value][keep]
            past = np.array(transformer.past(self.sampler.steps))
            for a in range(1, self.max_age + 1):
                if np.isnan(array[past >= a, :, a]).any():
                    raise FormatError(f"{self.folder}: rows are missing at age {a}. Profile again with --force.")
            dense[name] = array
        return dense


def load_inspection(folder: str | Path) -> Inspection:
    """Returns what `sodaprof inspect -o` (or `profile`) wrote to `folder`; FormatError where it is broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder. Make it: sodaprof profile MODEL -o {folder}")
    model_path, sampler_path = folder / "model.json", folder / "sampler.json"
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
    for table in TABLES:
        if not (inspection.folder / f"{table}.parquet").is_file():
            raise FormatError(f"{folder}/{table}.parquet: no such file. Profile again with --force.")
        version = manifest["tables"].get(table) if isinstance(manifest["tables"], dict) else None
        newest = TABLE_VERSIONS[table]
        if type(version) is not int or not 1 <= version <= newest:
            raise FormatError(
                f"{path}: table {table} has version {version!r}, this release reads up to {newest}. Upgrade sodaprof."
            )
    for key, least in (("seed", 0), ("samples", 1), ("max_interval", 2)):
        if type(manifest[key]) is not int or manifest[key] < least:
            raise FormatError(f"{path}: {key} is {manifest[key]!r}; expected a whole number of at least {least}.")
    return Profile(inspection.folder, inspection.model, inspection.sampler, manifest)


def schema(table: str) -> Any:
    """Returns the Arrow schema of a table."""
    import pyarrow as pa

    types = {name: pa.type_for_alias(name) for name in ("string", "int8", "int16", "int32", "float", "bool")}
    types |= {"list<float16>": pa.list_(pa.float16()), "list<int32>": pa.list_(pa.int32())}
    return pa.schema([(column, types[t]) for column, t in TABLES[table].items()])


def read_table(folder: Path, table: str, columns: list[str]) -> dict[str, np.ndarray]:
    """Returns columns of `folder`/`table`.parquet as arrays; FormatError for a broken file, other columns, NaN."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{table}.parquet"
    try:
        found = pq.read_schema(path)
        before = [column for column in TABLES[table] if column not in ADDED.get(table, ())]
        if found.names not in (list(TABLES[table]), before):
            odd = sorted(set(found.names) ^ set(TABLES[table])) or ["their order"]
            raise FormatError(f"{path}: columns differ from this release's: {', '.join(odd)}. Profile again.")
        types = schema(table)
        if odd := [c for c in columns if found.field(c).type != types.field(c).type]:
            raise FormatError(f"{path}: column {odd[0]} is of another type than this release's. Profile again.")
        data = pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file. Profile again: sodaprof profile MODEL -o {folder} --force") from None
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path}: not readable as Parquet ({error}). Profile again with --force.") from None
    arrays = {c: data[c].to_numpy() for c in columns}
    for column, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise FormatError(f"{path}: column {column} holds NaN or infinity. Profile again with --force.")
        if data[column].null_count:
            raise FormatError(f"{path}: column {column} has empty cells. Profile again with --force.")
    return arrays


def write_inspection(folder: Path, model: Model, sampler: Sampler) -> None:
    """Writes the parts of a profile folder that tell the sites and the sampler."""
    write_json(folder / "model.json", model.to_json(), force=True)
    write_json(folder / "sampler.json", sampler.to_json(), force=True)
