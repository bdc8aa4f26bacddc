"""JSON files: strict reading, checked decoding into records, atomic writing. Every file passes through here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from ..errors import FormatError
from .disk import is_open, lock, opened, read_bytes

MAX_BYTES = 32 << 20  # of a JSON file
MAX_CONTAINERS = 400_000  # objects and lists in a JSON file
MAX_DEPTH = 64  # objects and lists inside each other
MAX_NUMBER = 1e60  # of any number in a JSON file; fields have narrower ranges
SHOWN = 80  # characters of a value that a message shows
REWRITE = "Write the file again with sodaprof."
UPGRADE = "Upgrade sodaprof: run `pip install -U .` in a newer checkout."
WHOLE = 2**63 - 1  # the largest whole number of a field
# a coefficient, weight, timestep or scale; 1 stays 1 and 1.0 stays 1.0 when a file is written again
Number = Annotated[int, Meta(ge=-(10**9), le=10**9)] | Annotated[float, Meta(ge=-1e9, le=1e9)]
MOST = 1e30  # the largest FLOPs, or milliseconds, of a loop
# what is computed from costs and errors
Figure = Annotated[int, Meta(ge=-WHOLE, le=WHOLE)] | Annotated[float, Meta(ge=-MOST, le=MOST)]
PositiveInt = Annotated[int, Meta(gt=0, le=2**31 - 1)]
T = TypeVar("T")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the values that files hold: immutable, and an unknown key is an error. `msgspec.structs.replace` copies one."""

    FORMAT: ClassVar[tuple[str, int] | None] = None  # `format` and `version` of a file that begins with them

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file."""
        return ({"format": self.FORMAT[0], "version": self.FORMAT[1]} if self.FORMAT else {}) | encode(self)


def read_json(path: Path, missing: str = "Check the path.") -> Any:
    """Returns the JSON value in `path`; `missing` is what the message advises if there is no such file.

    Raises FormatError for a missing, broken, very large or deeply nested file, one that is no regular file, a key that
    occurs twice in an object, NaN, infinity, or a number beyond MAX_NUMBER.
    """
    try:
        return json_of(read_bytes(path, MAX_BYTES))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file. {missing}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error}). Write the file again, or fetch it anew.") from None


def json_of(content: bytes) -> Any:
    """Returns the JSON value in the bytes of a file; ValueError (or RecursionError) for what `read_json` refuses."""
    if content.count(b"{") + content.count(b"[") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS:,} objects and lists")
    value = json.loads(
        content.decode("utf-8"),
        parse_constant=_finite,
        parse_float=_finite,
        parse_int=_whole,
        object_pairs_hook=_object,
    )
    _check_depth(value)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) <= MAX_NUMBER:  # NaN too
        raise ValueError(f"{text:.{SHOWN}} is not a finite number of at most {MAX_NUMBER:g} in size")
    return value


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice in an object")
    return found


def shown(value: Any) -> str:
    """Returns a value of a file for a message: as Python writes it, cut to SHOWN characters."""
    text = repr(value[:SHOWN] if isinstance(value, str | list) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


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
        raise FormatError(f"{where}: {cut(str(error))}. {advice}") from None
    for place in sorted({*_keys(encode(value))} - {*_keys(data)}):
        raise FormatError(f"{where}: Object missing required field `{cut(place)}`. {advice}")
    return value


def cut(text: str) -> str:
    """Returns a text without the middle of what is longer than 4 · SHOWN characters: names in files have any length."""
    return text if len(text) <= 4 * SHOWN else f"{text[: 2 * SHOWN]} … {text[-2 * SHOWN :]}"


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
    replaced with `force`, and keeps its mode; without it, a file that appears meanwhile is kept, too. Temporary files are
    locked by their run, so that those of killed runs are known, and removed here. FormatError as `refuse_existing`.
    """
    refuse_existing(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f".{os.fsencode(path.name)[:100].decode(errors='ignore')}."
    _remove_abandoned(path.parent, start)
    while True:
        # the suffix decides the format of pictures; no reader takes a file with a dot in front
        temporary = path.with_name(f"{start}{secrets.token_hex(4)}.tmp{'' if path.suffix == '.json' else path.suffix}")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        if lock(handle) and is_open(temporary, handle):
            break  # else another run has taken it for abandoned before it was locked
        os.close(handle)
    try:
        yield temporary
        if force:
            with suppress(FileNotFoundError):
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            os.replace(temporary, path)
        else:
            _rename_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _remove_abandoned(folder: Path, start: str) -> None:
    """Removes the temporary files in a folder whose names begin so and which no running process has locked."""
    pattern = re.compile(re.escape(start) + r"[0-9a-f]{8}\.tmp(\.\w+)?")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_file():
            with suppress(FileNotFoundError), opened(path, WHOLE) as file:  # another run may remove it first
                if lock(file.fileno()):
                    path.unlink()


def _rename_new(temporary: Path, path: Path) -> None:
    """Renames a file to a path at which there is none; FormatError if one has appeared."""
    try:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # a file system without hard links
            os.replace(temporary, path)
    except FileExistsError:
        raise FormatError(
            f"{path}: appeared while it was written, and is left as it is. Choose another name, or add --force to replace it."
        ) from None


def refuse_existing(path: Path, force: bool, *, folder: bool = False) -> None:
    """Raises FormatError if `path` exists and `force` is not set, or if no file (or folder) can be written there.

    A link that leads nowhere exists; with `force` it is replaced itself.
    """
    if os.path.lexists(path) and not force:
        raise FormatError(f"{path}: exists already. Choose another name, or add --force to replace it.")
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        wanted = "folder" if folder else "file"
        raise FormatError(f"{path}: exists and is not a {wanted}; it is not replaced. Choose another name.")
    if folder and path.is_symlink():
        raise FormatError(
            f"{path}: is a link; it is not replaced. Choose another name, or the folder that it leads to."
        )
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        found = "a file" if above.is_file() else "no folder"
        raise FormatError(f"{path}: {above} is {found}; expected a folder to write into. Choose another place.")
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
        raise FormatError(f"{where}: found format {shown(found)}, expected {name!r}. Check the path.")
    if type(data.get("version")) is not int or not 1 <= data["version"] <= version:
        raise FormatError(
            f"{where}: found version {shown(data.get('version'))} of {name}, this release reads up to {version}. {UPGRADE}"
        )
    return {key: value for key, value in data.items() if key not in ("format", "version")}


def checked(build: Callable[[], Any], where: str) -> Any:
    """Returns build(); a value of the wrong type or shape anywhere inside becomes one FormatError that names `where`."""
    try:
        return build()
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise FormatError(
            f"{where}: a value has the wrong type or shape ({cut(str(error))}). Write the file again."
        ) from None
