"""Strict JSON in, atomic files out: every file of sodaprof is read and written through here."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FormatError


def read_json(path: Path) -> Any:
    """Returns the JSON value in `path`; FormatError for a missing or broken file, NaN or infinity."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a number that a file may hold")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} overflows")
        return value

    def whole(text: str) -> int:
        number(text)
        return int(text)

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=refuse, parse_float=number, parse_int=whole)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file. Check the path.") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error}). Write the file again, or fetch it anew.") from None


def write_json(path: Path, data: Any, *, force: bool = False) -> None:
    """Writes `data` atomically, indented; see `replacing`."""
    write_text(path, layout(data) + "\n", force=force)


def layout(data: Any, indent: str = "") -> str:
    """Returns JSON with one entry a line and lists of plain values on one line, so that `git diff` shows what moved."""
    if isinstance(data, dict | list | tuple) and data:
        values = list(data.values()) if isinstance(data, dict) else list(data)
        if isinstance(data, dict) or any(isinstance(v, dict) for v in values):
            inner = indent + " "
            parts = [layout(v, inner) for v in values]
            if isinstance(data, dict):
                parts = [f"{json.dumps(str(k))}: {part}" for k, part in zip(data, parts, strict=True)]
            left, right = "{}" if isinstance(data, dict) else "[]"
            return f"{left}\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}{right}"
    return json.dumps(data, allow_nan=False)


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    with replacing(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder and renames it to `path` when the block succeeds.

    On any failure (a full disk, Ctrl-C) the temporary file goes and `path` is untouched. An existing `path` is only
    replaced with `force`.
    """
    refuse_existing(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: Path, force: bool, *, folder: bool = False) -> None:
    """Raises FormatError where `path` exists and `force` is not set, or no file can be written there; with `folder` no folder."""
    if path.exists() and not force:
        raise FormatError(f"{path}: exists already. Choose another name, or add --force to replace it.")
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        wanted = "folder" if folder else "file"
        raise FormatError(f"{path}: something else than a {wanted} is there, and is not replaced. Choose another name.")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise FormatError(f"{path}: {above} is a file; expected a folder to write into. Choose another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FormatError(f"{path}: the folder {above} may not be written. Choose another, or change its permissions.")


def digest(data: Any) -> str:
    """Returns the SHA-256 of the canonical JSON of `data` (sorted keys, no spaces), in hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def header(data: Any, name: str, version: int, where: str) -> dict[str, Any]:
    """Returns `data` after checking its `format` and `version`; FormatError where it is another or a newer one."""
    if not isinstance(data, dict) or data.get("format") != name:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise FormatError(f"{where}: found format {found!r}, expected {name!r}. Is this the right file?")
    if type(data.get("version")) is not int or not 1 <= data["version"] <= version:
        raise FormatError(
            f"{where}: found version {data.get('version')!r} of {name}, this release reads up to {version}. "
            "Upgrade sodaprof: pip install -U sodaprof"
        )
    return data


def exact_keys(data: Any, keys: set[str], where: str) -> dict[str, Any]:
    """Returns `data`, a JSON object with exactly these keys; anything else is a FormatError."""
    if not isinstance(data, dict):
        raise FormatError(f"{where}: found {type(data).__name__}, expected an object with {', '.join(sorted(keys))}.")
    if unknown := sorted(set(data) - keys):
        raise FormatError(
            f"{where}: unknown key {unknown[0]!r}; expected {', '.join(sorted(keys))}. "
            "Remove it, or read the file with the release of sodaprof that wrote it."
        )
    if missing := sorted(keys - set(data)):
        raise FormatError(f"{where}: key {missing[0]!r} is missing. Write the file again with sodaprof.")
    return data


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def of_type(value: Any, kind: Any, where: str) -> Any:
    """Returns `value` where it is of `kind` (a bool is no int); FormatError otherwise."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = getattr(kind, "__name__", str(kind))
        raise FormatError(f"{where}: found {type(value).__name__}, expected {expected}. Write the file again.")
    return value


def checked(build: Callable[[], Any], where: str) -> Any:
    """Returns build(); a value of the wrong type or shape anywhere inside becomes one FormatError that names `where`."""
    try:
        return build()
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise FormatError(f"{where}: a value has the wrong type or shape ({error}). Write the file again.") from None
