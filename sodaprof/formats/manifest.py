"""manifest.json of a profile: what was asked for, which tables there are, and the digest of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ..errors import FormatError
from .files import UPGRADE, Number, PositiveInt, Record, decode, read_json
from .sites import check_seed
from .tables import COLUMNS, TABLES, VERSIONS, profile_again, table_digest

MAX_SAMPLES = 1_000_000
MAX_INTERVAL = 100


class ManifestOne(Record, frozen=True):
    """The content of manifest.json, version 1: what was asked for, where it ran, and how long it took."""

    FORMAT = "sodaprof.profile", 1
    tables: dict[str, PositiveInt]  # name -> version
    model: str
    sampler: str
    prompts: Annotated[tuple[int | str, ...], Meta(min_length=1)]
    seed: Annotated[int, Meta(ge=0)]
    samples: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)]
    max_interval: Annotated[int, Meta(ge=2, le=MAX_INTERVAL)]
    batch_size: PositiveInt
    guidance_scale: Number | None
    dtype: str
    device: str
    versions: dict[str, Any]
    measured: dict[str, Any]

    def __post_init__(self) -> None:
        check_seed(self.seed)


class Manifest(ManifestOne, frozen=True):
    """The content of manifest.json."""

    FORMAT = "sodaprof.profile", 2
    digests: dict[str, str]  # table -> SHA-256 of its file, in hex


def read_manifest(folder: Path, missing: str) -> tuple[ManifestOne, dict[str, Any]]:
    """Returns the manifest of a profile folder, as a record and as the file holds it; the tables that it names are there.

    Raises FormatError if it is broken, newer than this release, or if a table is missing, or not the one of its digest.
    """
    path, again = folder / "manifest.json", profile_again(folder)
    data = read_json(path, missing)
    first = isinstance(data, dict) and data.get("version") == 1
    manifest = decode(data, ManifestOne if first else Manifest, str(path), again)
    tables = manifest.tables
    gram = {"gram"} & set(tables)
    for table in [*gram] if gram and not set(tables) & set(TABLES) else [*TABLES, *gram]:
        if not (folder / f"{table}.parquet").is_file():
            raise FormatError(f"{folder}/{table}.parquet: no such file, which manifest.json names. {again}")
        version, newest = tables.get(table), VERSIONS[table]
        if version is None or not 1 <= version <= newest:
            advice = again if version is None or version < 1 else UPGRADE
            raise FormatError(
                f"{path}: table {table} has version {version}, this release reads 1 to {newest}. {advice}"
            )
    if isinstance(manifest, Manifest):
        _check_digests(folder, manifest)
    return manifest, data


def _check_digests(folder: Path, manifest: Manifest) -> None:
    """Raises FormatError unless each table of the manifest has a digest, which is that of its file."""
    known = {table for table in manifest.tables if table in COLUMNS}
    for table in known | {*manifest.digests}:
        if table not in known or manifest.digests.get(table) != table_digest(folder, table):
            raise FormatError(
                f"{folder}/{table}.parquet: not the table that manifest.json has the digest of: one of the two has changed. "
                f"Fetch them anew, or profile again: sodaprof profile MODEL -o {folder} --force"
            )
