"""The Parquet tables of a profile: their columns, reading and writing, and dense arrays from their rows.

A missing, surplus or misplaced row is a FormatError. Tables are columns by name, as `read_table` returns them; `where` is the
folder that a message names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from .files import replacing
from .sites import Model, Transformer

Columns = dict[str, np.ndarray]
STACK_FORMS = ("output", "drift")  # what the last block returns; that minus what enters the first block
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
GRAM = {  # columns of a table that a profile may lack, or that may be its only one
    **PLACE, "kind": "string", "row": "int16", "column": "int16", "product": "double", "coordinates": "int32", "n": "int32",
}  # fmt: skip
COLUMNS = TABLES | {"gram": GRAM}
VERSIONS = TABLE_VERSIONS | {"gram": 1}
ADDED = {"sites": ["token_grid"]}  # columns that version 1 of a table lacks


def profile_again(folder: str | Path) -> str:
    """Returns the advice to make the profile folder again."""
    return f"Profile again: sodaprof profile MODEL -o {folder} --force"


def schema(table: str) -> Any:
    """Returns the Arrow schema of a table."""
    import pyarrow as pa

    types = {name: pa.type_for_alias(name) for name in ("string", "int8", "int16", "int32", "float", "double", "bool")}
    types |= {"list<float16>": pa.list_(pa.float16()), "list<int32>": pa.list_(pa.int32())}
    return pa.schema([(column, types[t]) for column, t in COLUMNS[table].items()])


def read_table(folder: Path, table: str, columns: list[str]) -> dict[str, np.ndarray]:
    """Returns columns of `folder`/`table`.parquet as arrays; FormatError for a broken file, other columns, NaN."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{table}.parquet"
    try:
        found = pq.read_schema(path)
        before = [column for column in COLUMNS[table] if column not in ADDED.get(table, ())]
        if found.names not in (list(COLUMNS[table]), before):
            odd = sorted(set(found.names) ^ set(COLUMNS[table])) or ["their order"]
            raise FormatError(
                f"{path}: columns differ from those of this release: {', '.join(odd)}. {profile_again(folder)}"
            )
        types = schema(table)
        if odd := [c for c in columns if found.field(c).type != types.field(c).type]:
            raise FormatError(f"{path}: column {odd[0]} has another type than in this release. {profile_again(folder)}")
        data = pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file. {profile_again(folder)}") from None
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path}: not readable as Parquet ({error}). {profile_again(folder)}") from None
    arrays = {c: data[c].to_numpy() for c in columns}
    for column, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise FormatError(f"{path}: column {column} holds NaN or infinity. {profile_again(folder)}")
        if data[column].null_count:
            raise FormatError(f"{path}: column {column} has empty cells. {profile_again(folder)}")
    return arrays


def write_table(folder: Path, table: str, columns: dict[str, Any]) -> None:
    """Writes `folder`/`table`.parquet atomically; an older file is replaced."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = schema(table)
    arrays = [pa.array(columns[field.name], type=field.type) for field in types]
    with replacing(folder / f"{table}.parquet", force=True) as temporary:
        pq.write_table(pa.Table.from_arrays(arrays, schema=types), temporary, compression="zstd")


def stale_errors(
    table: Columns,
    value: str,
    keep: np.ndarray,
    model: Model,
    steps: int,
    ages: int,
    rates: np.ndarray | None,
    where: Path,
) -> dict[str, np.ndarray]:
    """Returns per transformer a column of the kept rows as [T, S, ages + 1] or [T, S, ages + 1, rates].

    NaN if the age reaches before the turn. Raises FormatError if a row is missing, or outside the profile.
    """
    dense = {}
    for name, transformer in model.transformers.items():
        own = keep & (table["transformer"] == name)
        site = site_numbers(table, own, transformer, where)
        step, age = table["step"][own].astype(int), table["age"][own].astype(int)
        shape: tuple[int, ...] = (steps, len(transformer.sites), ages + 1)
        index: tuple[np.ndarray, ...] = (step, site, age)
        if rates is not None:
            shape += (len(rates),)
            index += (np.searchsorted(rates, table["prune_rate"][own]),)
        if len(step) and not all(((i >= 0) & (i < n)).all() for i, n in zip(index, shape, strict=True)):
            raise FormatError(f"{where}: a table has steps or ages outside the profile. Profile again.")
        array = np.full(shape, np.nan)
        array[index] = table[value][own]
        past = np.array(transformer.past(steps))
        for a in range(1, ages + 1):
            if np.isnan(array[past >= a, :, a]).any():
                raise FormatError(f"{where}: rows are missing at age {a}. Profile again with --force.")
        dense[name] = array
    return dense


def state_products(table: Columns, steps: int, where: Path) -> np.ndarray:
    """Returns the rows of kind `state` as [2T + 1, 2T + 1]."""
    return _square(table, table["kind"] == "state", np.arange(2 * steps + 1), where)


def response(table: Columns, steps: int, where: Path) -> np.ndarray | None:
    """Returns the quotients of the rows of kind `response` and of kind `away`, [T]; None if there are none.

    Interpolated between the steps at which they were measured, constant before the first and after the last.
    """
    found = []
    for kind in ("away", "response"):
        rows = np.flatnonzero(table["kind"] == kind)
        if not len(rows):
            return None
        found.append(dict(zip(table["row"][rows].tolist(), table["product"][rows].tolist(), strict=True)))
    away, moved = found
    if away.keys() != moved.keys() or not away.keys() <= set(range(steps)):
        raise FormatError(f"{where}: rows of kind away or response are missing. Profile again with --force.")
    known = sorted(step for step, energy in away.items() if energy > 0)  # at step 0 there is no error yet
    if not known:
        return np.zeros(steps)
    return np.interp(np.arange(steps), known, [moved[step] / away[step] for step in known])


def site_products(table: Columns, model: Model, steps: int, history: int, where: Path) -> dict[str, np.ndarray]:
    """Returns per transformer the rows of kind `site` as [S, T, T], NaN between two turns or beyond `history`."""
    found = {}
    for name, transformer in model.transformers.items():
        rows = np.flatnonzero((table["kind"] == "site") & (table["transformer"] == name))
        site, past = site_numbers(table, rows, transformer, where), np.minimum(transformer.past(steps), history)
        found[name] = np.stack([_square(table, rows[site == i], past, where) for i in range(len(transformer.sites))])
    return found


def stack_products(
    table: Columns, model: Model, steps: int, history: int, where: Path
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the rows of kind `output` and `drift`, each as [T, T] like a site's, of each transformer that has such rows."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, transformer in model.transformers.items():
        past = np.minimum(transformer.past(steps), history)
        kept = {form: (table["kind"] == form) & (table["transformer"] == name) for form in STACK_FORMS}
        if any(keep.any() for keep in kept.values()):
            found[name] = {form: _square(table, keep, past, where) for form, keep in kept.items()}
    return found


def site_numbers(table: Columns, rows: np.ndarray, transformer: Transformer, where: Path) -> np.ndarray:
    """Returns the index of the site, among those of the transformer, of each of these rows (a mask, or numbers)."""
    order = {(s.stack, s.layer, s.module, s.call): i for i, s in enumerate(transformer.sites)}
    places = zip(*(table[c][rows] for c in ("stack", "layer", "module", "call")), strict=True)
    try:
        return np.array([order[place] for place in places], dtype=int)
    except KeyError as error:
        raise FormatError(
            f"{where}: a table names the site {error}, model.json does not. Profile again with --force."
        ) from None


def _square(table: Columns, rows: np.ndarray, past: np.ndarray, where: Path) -> np.ndarray:
    """Returns the symmetric matrix of these rows. past: how many columns before its diagonal each row has, −1 for none."""
    row, column = (table[c][rows].astype(int) for c in ("row", "column"))
    size = len(past)
    age = np.arange(size)[:, None] - np.arange(size)  # of (row, column)
    wanted = (age >= 0) & (age <= past[:, None])
    if not (((row >= 0) & (row < size) & (column >= 0) & (column < size)).all() and wanted[row, column].all()):
        raise FormatError(f"{where}: has products of steps that are not in the profile. Profile again with --force.")
    array = np.full((size, size), np.nan)
    array[row, column] = array[column, row] = table["product"][rows]
    if len(row) != wanted.sum() or np.isnan(array[wanted]).any():
        raise FormatError(f"{where}: products are missing, or occur twice. Profile again with --force.")
    return array
