"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from sodaprof.errors import FormatError
from sodaprof.formats import files
from sodaprof.formats.files import encode, layout, read_json, replacing, write_json, write_text


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.json"
    path.write_text("old")
    return path


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_inside_leaves_the_old_file_and_nothing_else(old, error):
    def fail() -> None:
        with replacing(old, force=True) as temporary:
            temporary.write_text("half of the n")
            assert temporary.parent == old.parent  # or the rename could not be atomic
            raise error

    with pytest.raises(type(error)):
        fail()
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["write", "chmod", "rename"])
def test_a_failure_of_the_file_system(old, monkeypatch, error, at):
    """The disk fills up (or Ctrl-C comes) after some bytes, or at the very end."""

    def write(self: Path, text: str, **options: object) -> int:
        with self.open("w") as file:
            file.write(text[:3])
        raise error

    def fail(*args: object, **options: object) -> None:
        raise error

    if at == "write":
        monkeypatch.setattr(Path, "write_text", write)
    elif at == "chmod":
        monkeypatch.setattr(Path, "chmod", fail)
        monkeypatch.setattr(os, "link", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(os, "link", fail)
    with pytest.raises(type(error)):
        write_json(old, {"a": 1}, force=True)
    with pytest.raises(type(error)):
        write_json(old.parent / "new.json", {"a": 1})
    assert old.read_bytes() == b"old"
    assert list(old.parent.iterdir()) == [old]


def test_success_replaces_the_file_and_leaves_nothing_else(old):
    write_text(old, "new", force=True)
    assert old.read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


def test_without_force_nothing_is_replaced(old):
    with pytest.raises(FormatError, match="--force"), replacing(old):
        raise AssertionError("not reached")
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", [1, 2])
    assert read_json(tmp_path / "a" / "b" / "c.json") == [1, 2]


def test_nan_is_not_written(old):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(old, {"a": float("nan")}, force=True)
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *(
            (text, "is not a finite number")
            for text in ("NaN", "[Infinity]", '{"a": -Infinity}', "1e400", "[1, -2e308]")
        ),
        ("1" * 400, "is not a finite number"),
        *((text, "") for text in ("{", "", "1 2", "'a'")),
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "the key 'c' occurs twice"),
        ("[" * 66 + "]" * 66, "nested more than 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_broken_json_is_refused(tmp_path, text, found):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FormatError, match=rf"a\.json: not readable as JSON.*{found}"):
        read_json(tmp_path / "a.json")


def test_depth_and_size_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[" * 64 + "1" + "]" * 64)
    assert json.dumps(read_json(tmp_path / "a.json")) == "[" * 64 + "1" + "]" * 64
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    with pytest.raises(FormatError, match="larger than"):
        read_json(tmp_path / "a.json")


def test_numbers_keep_their_kind(tmp_path):
    (tmp_path / "a.json").write_text("[1, 1.0, -0.0, 18446744073709551616, 1e3]")
    assert repr(read_json(tmp_path / "a.json")) == "[1, 1.0, -0.0, 18446744073709551616, 1000.0]"


def test_the_layout_is_json_with_one_entry_a_line():
    data = {
        "rows": {"a": "CRR", "b": "CCR"},
        "list": [1, [2, 3]],
        "records": [{"x": 1}, {"y": []}],
        "none": {},
        "s": "é",
    }
    text = layout(data)
    assert json.loads(text) == data
    lines = [line.strip() for line in text.splitlines()]
    assert '"a": "CRR",' in lines
    assert '"list": [1, [2, 3]],' in lines
    assert '"x": 1' in lines


def test_values_of_subclasses_are_written_as_json_types():
    class Version(str):
        pass

    values = {
        "version": Version("2.1"),
        "error": np.float64(0.5),
        "order": OrderedDict(a=[1]),
        "flag": True,
        "none": None,
    }
    assert repr(encode(values)) == "{'version': '2.1', 'error': 0.5, 'order': {'a': [1]}, 'flag': True, 'none': None}"
    with pytest.raises(TypeError, match="int64 is not a JSON value"):
        encode([np.int64(3)])
