"""Changes of a file's bytes: each says whether the reader must refuse the file, or may also load it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.strategies import at, broken, places

DEPTHS = (65, 900, 100_000)
LITERALS = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 5000)
RANGES: tuple[int | float, ...] = (1e308, -1e308, 2**64, 2**31, 1e300, -1, 0, 1.5, 5e-324)
# keys of numbers that may be as large as 2**64: FLOPs and what is computed from them
AMOUNTS = {"C", "R", "F", "P", "map", "fixed", "all_cached", "stack", "scheduler", "update", "guidance", "text_encoder"}
AMOUNTS |= {"vae", "cost", "speedup", "error"}
HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07",
    "[/]",
    "[bold",
    "x" * 100_000,
    "\ud800",
    "\u202eabc",
    "\x00",
    "../..",
    "",
    "%s{0}",
)
JUNK: tuple[Any, ...] = (None, True, -1, 5, 2**70, 1e308, "", [], {}, [{}], [[]], {"a": []}, [None], "1")
MARK = "@replaced@"


@dataclass(frozen=True)
class Mutation:
    """The new bytes of a file; `refused`: they must be refused; `kind` and `detail` are for the report."""

    content: bytes
    refused: bool
    kind: str
    detail: str = ""


def everywhere(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value inside `data`."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from everywhere(value, (*path, key))


def some_place(draw: st.DrawFn, paths: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Draws the path's keys first and its positions in lists second, so that long lists do not hide the other values."""
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for path in paths:
        groups.setdefault(tuple("*" if isinstance(key, int) else key for key in path), []).append(path)
    return draw(st.sampled_from(draw(st.sampled_from(list(groups.values())))))


@st.composite
def of_json(draw: st.DrawFn, content: bytes, vague: tuple[str, ...] = ()) -> Mutation:
    """Changes of a JSON file. vague: keys on the top level whose values may have several types."""
    data = json.loads(content)
    paths = list(everywhere(data))
    typed = [path for path in places(data) if path[0] not in vague]
    numbers = [path for path in typed if type(at(data, path)) in (int, float)]
    kinds = ["broken", "literal", "duplicate", "depth", "text", "key", "junk", *["range"] * (2 * bool(numbers))]
    kind = draw(st.sampled_from(kinds))
    if kind == "broken":
        new = draw(broken(data).filter(lambda new: all(new.get(key, data[key]) == data[key] for key in vague)))
        return Mutation(_bytes(new), True, kind, _difference(data, new))
    path = some_place(draw, numbers if kind == "range" else paths)
    data = copy.deepcopy(data)
    parent, key = at(data, path[:-1]), path[-1]
    value: Any = MARK
    refused, written = True, MARK
    if kind == "range":
        value = draw(st.sampled_from([value for value in RANGES if value != parent[key]]))
        names = {key for key in path if isinstance(key, str)}
        refused = abs(value) >= 1e308 or (value == 2**64 and not names & AMOUNTS)
    elif kind == "literal":
        written = draw(st.sampled_from(LITERALS))
    elif kind == "depth":
        depth = draw(st.sampled_from(DEPTHS))
        written = "[" * depth + "]" * depth
    elif kind == "text":
        value, refused = draw(st.sampled_from(HOSTILE)), False
    elif kind == "junk":
        value, refused = copy.deepcopy(draw(st.sampled_from(JUNK))), False
    if kind in ("key", "duplicate"):
        objects = [p for p in [(), *paths] if isinstance(at(data, p), dict) and at(data, p)]
        parent = at(data, path := some_place(draw, objects))
        key = draw(st.sampled_from(list(parent)))
        new_key = draw(st.sampled_from(HOSTILE)) if kind == "key" else MARK
        items = list(parent.items()) if kind == "duplicate" else [(k, v) for k, v in parent.items() if k != key]
        parent.clear()
        parent.update([*items, (new_key, dict(items).get(key))])
        refused, detail = kind == "duplicate", f"{path}: {new_key!r:.60} for {key!r}"
        return Mutation(_bytes(data).replace(MARK.encode(), key.encode()), refused, kind, detail)
    parent[key] = value
    text = _bytes(data).replace(f'"{MARK}"'.encode(), written.encode())
    return Mutation(text, refused, kind, f"{path} = {written if value == MARK else repr(value):.60}")


@st.composite
def of_bytes(draw: st.DrawFn, content: bytes, sealed: bool, whole: bool) -> Mutation:
    """Truncated bytes, flipped bits, other bytes. sealed: a digest covers all bytes; whole: a beginning is no legal file."""
    kind = draw(st.sampled_from(["truncated", "flipped", "inserted", "BOM", "not UTF-8", "empty"]))
    last = len(content.rstrip()) if whole else len(content)
    position = draw(st.integers(0, max(last - 1, 0)))
    if kind == "truncated":
        return Mutation(content[:position], sealed or whole, kind, f"to {position} of {len(content)} bytes")
    if kind == "flipped" and content:
        bit = draw(st.integers(0, 7))
        flipped = bytes([content[position] ^ 1 << bit])
        return Mutation(
            content[:position] + flipped + content[position + 1 :], sealed, kind, f"bit {bit} of {position}"
        )
    if kind == "inserted":
        extra = draw(st.sampled_from([b"\x00", b"\n", b"{}", b"\x1b[2J", b"9" * 5000]))
        return Mutation(content[:position] + extra + content[position:], sealed, kind, f"{extra!r:.40} at {position}")
    if kind == "BOM":
        return Mutation(b"\xef\xbb\xbf" + content, sealed, kind)
    if kind == "not UTF-8":
        return Mutation(content[:position] + b"\xff\xfe" + content[position:], True, kind, f"at {position}")
    return Mutation(b"", True, "empty")


def _bytes(data: Any) -> bytes:
    return json.dumps(data).encode()


def _difference(old: Any, new: Any, place: str = "$") -> str:
    """Returns the first place at which two JSON values differ, and the new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if key not in new or key not in old or json.dumps(old[key]) != json.dumps(new[key]):
                known = key in old and key in new
                return (
                    _difference(old[key], new[key], f"{place}.{key}") if known else f"{place}: {key} added or missing"
                )
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if json.dumps(a) != json.dumps(b):
                return _difference(a, b, f"{place}[{i}]")
    return f"{place} = {json.dumps(new):.60}"
