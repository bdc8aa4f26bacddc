"""What commands print: results, progress, the files written, the next command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def make_console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def print_wrote(console: Console, path: Path | str) -> None:
    console.print(f"Wrote {path}", soft_wrap=True, markup=False)


def print_next(console: Console, command: str) -> None:
    console.print(f"Next: [bold]{command}[/]", soft_wrap=True)


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
    counts, kept = schedule.counts(), schedule.predicted["cache_bytes"]
    cells = [
        f"{counts[action]} {name} cells" for action, name in (("P", "pruned"), ("F", "forecast")) if counts[action]
    ]
    parts = [f"{len(schedule.anchors())} full steps of {schedule.steps}", *cells]
    if schedule.update is not None:
        parts.append(f"update fitted {schedule.update.fitted['loop']} loop")
    return ", ".join([*parts, f"{kept / 2**20:.2f} MiB of cache a generation"])
