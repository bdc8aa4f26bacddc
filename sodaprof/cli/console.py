"""What commands print: results, progress, the files written, the next command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


SIZES = range(20, 1001)  # columns or lines that are believed
written: list[str] = []  # files that the command has written, each complete


class OutputError(OSError):
    """Standard output cannot be written."""


class Output:
    """Standard output whose errors are OutputErrors. After the first one nothing more is written, at exit neither."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[..., Any], *args: Any) -> Any:
        try:
            return act(*args)
        except OSError as error:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if isinstance(error, BrokenPipeError):  # the reader, `head` say, has what it wants
                raise SystemExit(1) from None
            raise OutputError(error.errno, error.strerror) from error


def make_console(stderr: bool = False) -> Console:
    """Returns a console that takes strings literally and escapes what a terminal would act on."""
    from rich.console import Console
    from rich.segment import Segment

    class Plain(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
            for text, style, control in super().render(*args, **kwargs):
                yield Segment(text if control else printable(text, kept="\n"), style, control)

    for name in ("COLUMNS", "LINES"):  # rich believes any number: 0, 10^9
        given = os.environ.get(name, "")
        if given and not (given.isdecimal() and len(given) < 5 and int(given) in SIZES):
            del os.environ[name]
    return Plain(stderr=stderr, highlight=False, soft_wrap=False, markup=False, emoji=False)


def note_written(path: Path | str) -> None:
    """Notes that a file is complete, for the message if standard output then fails."""
    if str(path) not in written:
        written.append(str(path))


def print_wrote(console: Console, path: Path | str) -> None:
    note_written(path)
    console.print(f"Wrote {path}", soft_wrap=True)


def print_next(console: Console, command: str) -> None:
    from rich.text import Text

    console.print(Text.assemble("Next: ", (command, "bold")), soft_wrap=True)


def print_result(console: Console, result: dict[str, Any], view: Callable[[], RenderableType], as_json: bool) -> None:
    """Prints a result as JSON for scripts, or its view."""
    if as_json:
        print(json.dumps(result))
    else:
        console.print(view())


def command_line() -> str:
    """Returns the command as it was typed."""
    return shlex.join(["sodaprof", *sys.argv[1:]])


@contextmanager
def progress(console: Console, title: str) -> Any:
    """Yields a callback (done, total) that moves a progress bar."""
    from rich import progress as rich

    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    columns = (rich.TextColumn(title), rich.BarColumn(), rich.MofNCompleteColumn(), *times)
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def size(number: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number / 2**10:.0f} KiB"


def summary(schedule: Any) -> str:
    """Returns the cells and the caches of a schedule in words."""
    counts, kept = schedule.counts(), (schedule.predicted or {}).get("cache_bytes")
    cells = [
        f"{counts[action]} {name} cells" for action, name in (("P", "pruned"), ("F", "forecast")) if counts[action]
    ]
    parts = [f"{len(schedule.anchors())} full steps of {schedule.steps}", *cells]
    if schedule.update is not None:
        from ..formats.schedule import LOOPS

        parts.append(f"update fitted {LOOPS.get(schedule.update.fitted.get('loop'), 'not yet')}")
    if kept is not None:
        parts.append(f"{kept / 2**20:.2f} MiB of cache a generation")
    return ", ".join(parts)
