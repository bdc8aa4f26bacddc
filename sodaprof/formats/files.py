"""JSON files: strict reading, checked decoding into records, atomic writing. Every file of sodaprof passes through here."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from ..errors import FormatError

MAX_BYTES = 64 << 20  # of a JSON file
MAX_DEPTH = 64  # objects and lists inside each other
REWRITE = "Write the file again with sodaprof."
UPGRADE = "Upgrade sodaprof: run `pip install -U .` in a newer checkout."
Number = int | float  # 1 stays 1 and 1.0 stays 1.0 when a file is written again
T = TypeVar("T")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the values that files hold: immutable, and an unknown key is an error. `msgspec.structs.replace` copies one."""

    FORMAT: ClassVar[tuple[str, int] | None] = None  # `format` and `version` of a file that begins with them

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file."""
        return ({"format": self.FORMAT[0], "version": self.FORMAT[1]} if self.FORMAT else {}) | encode(self)


def read_json(path: Path, missing: str = "Check the path.") -> Any:
    """Returns the JSON value in `path`; `missing` is what the message advises if there is no such file.

    Raises FormatError for a missing, broken, very large or deeply nested file, a key that occurs twice in an object, NaN,
    infinity, or a number that overflows a float.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        value = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_object,
        )
        _check_depth(value)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file. {missing}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error}). Write the file again, or fetch it anew.") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in an object")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [v for v in level if isinstance(v, dict | list)]
        level = [v for outer in containers for v in (outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise ValueError(f"objects and lists are nested more than {MAX_DEPTH} deep")


def decode(data: Any, kind: type[T], where: str, advice: str = REWRITE) -> T:
    """Returns the JSON value `data` as `kind`, a `Record` or a type made of such.

    Raises FormatError, which names the place inside the file, for another format or version, for a value of another type or
    out of range, and for a key that is unknown, or missing although it is written (msgspec itself fills in defaults).
    """
    if known := getattr(kind, "FORMAT", None):
        data = header(data, known, where)
    try:
        value = msgspec.convert(data, kind, strict=True)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise FormatError(f"{where}: {error}. {advice}") from None
    for place in sorted({*_keys(encode(value))} - {*_keys(data)}):
        raise FormatError(f"{where}: Object missing required field `{place}`. {advice}")
    return value


def encode(value: Any) -> Any:
    """Returns the JSON value of a `Record`: objects, lists, strings, numbers."""
    return msgspec.to_builtins(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """Returns a value of a subclass (numpy.float64, TorchVersion) as the JSON type that it is."""
    kinds: tuple[Any, ...] = (str, int, float, list, dict)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _keys(value: Any, place: str = "$") -> Iterator[str]:
    """Yields the place of every key in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{place}.{key}"
        yield from _keys(inner, f"{place}.{key}")
    for position, inner in enumerate(value) if isinstance(value, list | tuple) else ():
        yield from _keys(inner, f"{place}[{position}]")


def write_json(path: Path, data: Any, *, force: bool = False) -> None:
    """Writes `data` atomically, indented; see `replacing`."""
    write_text(path, layout(data) + "\n", force=force)


def layout(data: Any, indent: str = "") -> str:
    """Returns JSON with one entry a line and lists of plain values on one line, so that `git diff` shows what changed."""
    inner = indent + " "
    if isinstance(data, dict) and data:
        left, right, parts = "{", "}", [f"{json.dumps(str(k))}: {layout(v, inner)}" for k, v in data.items()]
    elif isinstance(data, list | tuple) and any(isinstance(v, dict) for v in data):
        left, right, parts = "[", "]", [layout(v, inner) for v in data]
    else:
        return json.dumps(data, allow_nan=False)
    return f"{left}\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}{right}"


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """Writes `text` atomically in UTF-8; see `replacing`."""
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
    """Raises FormatError if `path` exists and `force` is not set, or if no file (or folder) can be written there."""
    if path.exists() and not force:
        raise FormatError(f"{path}: exists already. Choose another name, or add --force to replace it.")
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        wanted = "folder" if folder else "file"
        raise FormatError(f"{path}: exists and is not a {wanted}; it is not replaced. Choose another name.")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise FormatError(f"{path}: {above} is a file; expected a folder to write into. Choose another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FormatError(f"{path}: the folder {above} may not be written. Choose another, or change its permissions.")


def digest(data: Any) -> str:
    """Returns the SHA-256 of the canonical JSON of `data` (sorted keys, no spaces), in hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def header(data: Any, known: tuple[str, int], where: str) -> dict[str, Any]:
    """Returns the content of a file: `data` without `format` and `version`; FormatError if these are others, or newer."""
    name, version = known
    if not isinstance(data, dict) or data.get("format") != name:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise FormatError(f"{where}: found format {found!r}, expected {name!r}. Check the path.")
    if type(data.get("version")) is not int or not 1 <= data["version"] <= version:
        raise FormatError(
            f"{where}: found version {data.get('version')!r} of {name}, this release reads up to {version}. {UPGRADE}"
        )
    return {key: value for key, value in data.items() if key not in ("format", "version")}


def checked(build: Callable[[], Any], where: str) -> Any:
    """Returns build(); a value of the wrong type or shape anywhere inside becomes one FormatError that names `where`."""
    try:
        return build()
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise FormatError(f"{where}: a value has the wrong type or shape ({error}). Write the file again.") from None
