"""Changes of a file's bytes: each says whether the reader must refuse the file, or may also load it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.strategies import at, broken, places

LITERALS = ("NaN", "-Infinity", "1e400", "1" + "0" * 5000, *("[" * depth + "]" * depth for depth in (65, 900, 100_000)))
RANGES: tuple[int | float, ...] = (1e308, -1e308, 2**64, 2**31, 1e300, -1, 0, 1.5, 5e-324)
# keys of numbers that may be as large as 2**64: FLOPs, and what is computed from them
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
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from everywhere(value, (*path, key))


def some_place(draw: st.DrawFn, paths: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Draws the path's keys first and its positions in lists second, so that long lists do not hide the other values."""
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for path in paths:
        groups.setdefault(tuple("*" if isinstance(key, int) else key for key in path), []).append(path)
    return draw(st.sampled_from(draw(st.sampled_from(list(groups.values())))))


@st.composite
def of_json(draw: st.DrawFn, content: bytes, mixed: tuple[str, ...]) -> Mutation:
    """Changes of a JSON file. mixed: keys on the top level whose values may have several types."""
    data = json.loads(content)
    numbers = [p for p in places(data) if p[0] not in mixed and type(at(data, p)) in (int, float)]
    kind = draw(
        st.sampled_from(["type or key", "literal", "duplicate", "text", "name", "junk", *["range"] * bool(numbers) * 2])
    )
    if kind == "type or key":
        new = draw(broken(data).filter(lambda new: all(new.get(key) == data.get(key) for key in mixed)))
        before, after = ({f"{p} = {at(d, p)!r:.80}" for p in everywhere(d)} for d in (data, new))
        return Mutation(
            json.dumps(new).encode(),
            True,
            kind,
            f"not {min(before - after, default='')}, {min(after - before, default='')}",
        )
    if kind in ("name", "duplicate"):
        objects = [p for p in [(), *everywhere(data)] if isinstance(at(data, p), dict) and at(data, p)]
        changed = at(data, path := some_place(draw, objects))
        key = draw(st.sampled_from(list(changed)))
        name = MARK if kind == "duplicate" else draw(st.sampled_from(HOSTILE))
        items = [*changed.items(), (name, changed[key])]
        changed.clear()
        changed.update(item for item in items if kind == "duplicate" or item[0] != key)
        new = json.dumps(data).replace(f'"{MARK}"', json.dumps(key))
        return Mutation(
            new.encode(), kind == "duplicate", kind, f"{path}: {key!r} {'twice' if name == MARK else repr(name):.60}"
        )
    path = some_place(draw, numbers if kind == "range" else list(everywhere(data)))
    values = {"literal": LITERALS, "text": HOSTILE, "junk": JUNK, "range": [v for v in RANGES if v != at(data, path)]}
    value = draw(st.sampled_from(values[kind]))
    too_large = kind == "range" and (abs(value) >= 1e308 or (value == 2**64 and AMOUNTS.isdisjoint(path)))
    at(data, path[:-1])[path[-1]] = MARK if kind == "literal" else copy.deepcopy(value)
    new = json.dumps(data).replace(f'"{MARK}"', str(value))
    return Mutation(new.encode(), too_large or kind == "literal", kind, f"{path} = {value!r:.60}")


@st.composite
def of_bytes(draw: st.DrawFn, content: bytes, sealed: bool, whole: bool) -> Mutation:
    """Truncated bytes, flipped bits, other bytes. sealed: a digest covers all bytes; whole: a beginning is no legal file."""
    position = draw(st.integers(0, len(content.rstrip() if whole else content) - 1))
    before, after = content[:position], content[position:]
    kind = draw(st.sampled_from(["truncated", "flipped", "inserted", "byte order mark", "not UTF-8", "empty"]))
    bit, extra = draw(st.integers(0, 7)), draw(st.sampled_from([b"\x00", b"\n", b"{}", b"\x1b[2J", b"9" * 5000]))
    new, refused, detail = {
        "truncated": (before, sealed or whole, f"{position} of {len(content)} bytes"),
        "flipped": (before + bytes([after[0] ^ 1 << bit]) + after[1:], sealed, f"bit {bit} of byte {position}"),
        "inserted": (before + extra + after, sealed, f"{extra!r:.20} at {position}"),
        "byte order mark": (b"\xef\xbb\xbf" + content, sealed, ""),
        "not UTF-8": (before + b"\xff\xfe" + after, sealed or not content.startswith(b"PK"), f"at {position}"),
        "empty": (b"", True, ""),
    }[kind]
    return Mutation(new, refused, kind, detail)
