"""The Parquet tables of a profile: their columns, and how they are read and written. docs/formats.md gives every unit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from .disk import opened
from .files import replacing
from .sites import SiteKey

Columns = dict[str, np.ndarray]
STACK_FORMS = ("output", "drift")  # what the last block returns; that minus what enters the first block
METRICS = ("cos", "l1", "l2")  # 1 − cosine, relative L1, relative L2
MEAN = -1  # the value of `branch` on rows that average over the branches
RANKING = "feature_mean"
MAX_TABLE = 4 << 30  # bytes of a table
MAX_ROWS = 1 << 26  # of a table
PLACE = {"transformer": "string", **dict(zip(SiteKey._fields, ("string", "int16", "string", "int8"), strict=True))}
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

    lists = {"list<float16>": pa.list_(pa.float16()), "list<int32>": pa.list_(pa.int32())}
    return pa.schema([(column, lists.get(kind) or pa.type_for_alias(kind)) for column, kind in COLUMNS[table].items()])


def read_table(folder: Path, table: str, columns: list[str]) -> Columns:
    """Returns columns of `folder`/`table`.parquet as arrays; FormatError for a broken file, other columns, NaN."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def broken(what: str) -> FormatError:
        return FormatError(f"{path}: {what}. {profile_again(folder)}")

    path = folder / f"{table}.parquet"
    try:
        with opened(path, MAX_TABLE) as file:
            metadata = pq.read_metadata(file)
            if metadata.num_rows > MAX_ROWS:
                raise broken(f"{metadata.num_rows:,} rows, more than the limit of {MAX_ROWS:,}")
            found, types = metadata.schema.to_arrow_schema(), schema(table)
            before = [column for column in COLUMNS[table] if column not in ADDED.get(table, ())]
            if found.names not in (list(COLUMNS[table]), before):
                odd = sorted(set(found.names) ^ set(COLUMNS[table])) or ["their order"]
                raise broken(f"columns differ from those of this release: {', '.join(odd)}")
            if odd := [c for c in columns if found.field(c).type != types.field(c).type]:
                raise broken(f"column {odd[0]} has another type than in this release")
            file.seek(0)
            data = pq.read_table(file, columns=columns)
    except FileNotFoundError:
        raise broken("no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise broken(f"not readable as Parquet ({error})") from None
    arrays = {c: data[c].to_numpy() for c in columns}
    for column, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise broken(f"column {column} holds NaN or infinity")
        if data[column].null_count:
            raise broken(f"column {column} has empty cells")
    return arrays


def encoded(values: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """Returns the distinct values of a column, and the index of each row's value among them."""
    import pyarrow as pa

    column = pa.array(values).dictionary_encode()
    return column.dictionary.to_pylist(), column.indices.to_numpy()


def table_digest(folder: Path, table: str) -> str:
    """Returns the SHA-256 of the file of a table, in hex; FormatError if it is no regular file of at most MAX_TABLE bytes."""
    path = folder / f"{table}.parquet"
    try:
        with opened(path, MAX_TABLE) as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: not readable ({error}). {profile_again(folder)}") from None


def write_table(folder: Path, table: str, columns: dict[str, Any]) -> None:
    """Writes `folder`/`table`.parquet atomically; an older file is replaced."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = schema(table)
    arrays = [pa.array(columns[field.name], type=field.type) for field in types]
    with replacing(folder / f"{table}.parquet", force=True) as temporary:
        pq.write_table(pa.Table.from_arrays(arrays, schema=types), temporary, compression="zstd")
