"""One property for every reader: legal → accepted and equal; changed in meaning → refused with a SodaprofError."""

from __future__ import annotations

import re
import signal
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

import sodaprof
from sodaprof.errors import SodaprofError
from tests.fuzz.readers import READERS, Reader, Wrong, require

PACKAGE = str(Path(sodaprof.__file__).parent)
LIMIT = 20  # seconds for one file


class Hang(Exception):
    """A file took longer than LIMIT."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Hang(f"more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_one(reader: Reader, data: st.DataObject, changes: list[str]) -> None:
    """Reads one legal file and one changed file; the last of `changes` says what the file at hand is."""
    value = data.draw(reader.legal)
    reader.write(value)
    mutation = data.draw(reader.mutations())
    if value is not None or not reader.checked:  # else it is the same file again
        changes.append("a legal file")
        with time_limit():
            reader.check(value, reader.read())
        reader.checked = True
        reader.write(value)
    changes.append(f"{mutation.kind}: {mutation.detail}")
    reader.path.write_bytes(mutation.content)
    with time_limit():
        try:
            found = reader.read()
        except SodaprofError as error:
            reader.refused(error)
            return
        require(not mutation.refused, f"{mutation.kind}: read although it must be refused")
        reader.use(found)


def faults(reader: Reader, count: int, seed: int) -> dict[str, tuple[int, str]]:
    """Returns of each kind of fault in `count` files the smallest: its size in bytes, and what was changed.

    Faults are not raised to hypothesis, which would end at the first: its examples are drawn, and not shrunk further.
    """
    found: dict[str, tuple[int, str]] = {}

    @seeded(seed)
    @settings(
        max_examples=count, derandomize=False, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        changes: list[str] = []
        try:
            check_one(reader, data, changes)
        except HypothesisException:
            raise
        except Exception as error:
            size = reader.path.stat().st_size if reader.path.is_file() else 0
            fault = describe(error)
            found[fault] = min(found.get(fault, (size + 1, "")), (size, changes[-1] if changes else "a legal file"))

    run()
    return found


def one_chunk(task: tuple[str, int, int]) -> tuple[str, dict[str, tuple[int, str]]]:
    """Returns the name of the kind of file, and its faults; a task is (name, number of files, seed)."""
    name, count, seed = task
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk would wait for each file that is replaced
    with tempfile.TemporaryDirectory(prefix="sodaprof-fuzz-", dir=memory) as folder:
        return name, faults(READERS[name](Path(folder)), count, seed)


def describe(error: Exception) -> str:
    """Returns the exception, with digits and quoted values left out, and the innermost function of the package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{PACKAGE}/" in f.filename]
    where = f" in {frames[-1].filename.removeprefix(PACKAGE)}:{frames[-1].name}" if frames else ""
    if isinstance(error, Wrong):
        return str(error)
    message = re.sub(r"'[^']*'|\"[^\"]*\"|[^ -~]", "…", re.sub(r"\d+", "N", str(error).split("\n")[0]))
    return f"{type(error).__name__}{where}: {message:.160}"
