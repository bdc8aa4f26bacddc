"""What the commands share: options, the console, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SodaprofError

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A pipeline folder, a shipped reference model, or a hub id a/b.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …  [default: cuda where there is one]")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16  [default: float32 on a CPU, else bfloat16]")
]
Scale = Annotated[float | None, typer.Option("--guidance-scale", help="[default: the pipeline's, or the schedule's]")]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="One prompt or label a line, or a shipped list: text-to-image.  [default: by model]",
    ),
]
Batch = Annotated[int, typer.Option(help="Generations at once.")]
Runtime = Annotated[
    str,
    typer.Option(
        help="hooks; lowered: traced, faster from the second picture on; captured: CUDA graphs; whole-steps: with the solver in."
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="CLASS", help="A scheduler of diffusers to sample with.  [default: the pipeline's own]"),
]
Steps = Annotated[int | None, typer.Option(help="Sampling steps.  [default: the pipeline's]")]


def make_console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def say_next(console: Console, command: str) -> None:
    console.print(f"Next: [bold]{command}[/]", soft_wrap=True)


@contextmanager
def progress(console: Console, title: str) -> Any:
    """Yields a callback (done, total) that moves a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        update: Callable[[int, int], None] = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        yield update


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def size(number: float) -> str:
    return f"{number / 2**20:.0f} MiB" if number < 2**30 else f"{number / 2**30:.1f} GiB"


def show_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows of text under their columns, the first of which is a name."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_left_out(console: Console, reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        console.print(f"Left out: {name}. {reason}", soft_wrap=True)


def show_verdict(
    console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]], left_out: dict[str, str], verdict: str
) -> None:
    """Prints what was held against each other as a table, what could not be and why, and what follows from it."""
    show_table(console, columns, rows)
    show_left_out(console, left_out)
    console.print(verdict, soft_wrap=True)


def told(schedule: Any) -> str:
    """Returns in a few words what a schedule does."""
    counts = schedule.counts()
    parts = [f"{len(schedule.anchors())} full steps of {schedule.steps}"]
    parts += [
        f"{counts[action]} {name} cells" for action, name in (("P", "pruned"), ("F", "forecast")) if counts[action]
    ]
    if schedule.update is not None:
        parts.append(f"update fitted {schedule.update.fitted['loop']} loop")
    return ", ".join(parts)


def check_outputs(paths: dict[str, Path | None], force: bool) -> None:
    """Raises SodaprofError unless all files that these options name can be written, and are different ones."""
    from ..formats.files import refuse_existing

    options: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        refuse_existing(path, force)
        if (other := options.setdefault(path.resolve(), option)) != option:
            raise SodaprofError(f"{other} and {option} are both {path}. Give each a file of its own.")


def one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raises SodaprofError unless the option has one of the allowed values."""
    if value not in allowed:
        *others, last = allowed
        raise SodaprofError(f"{option} is {value!r}; expected {', '.join(others)} or {last}.")


def parse_size(text: str) -> int:
    """Returns the bytes that 2GB or 500MB says; SodaprofError for anything else."""
    return int(with_unit(text, {"KB": 10**3, "MB": 10**6, "GB": 10**9}, "--max-cache", "2GB"))


def parse_span(text: str) -> float:
    """Returns the seconds that 90s, 5m or 1h says; SodaprofError for anything else."""
    return with_unit(text, {"S": 1, "M": 60, "H": 3600}, "--time", "5m")


def with_unit(text: str, units: dict[str, int], option: str, example: str) -> float:
    """Returns the number that a text such as 5m stands for; SodaprofError for anything else."""
    for unit, factor in units.items():
        number = text.strip().upper().removesuffix(unit)
        if text.strip().upper().endswith(unit):
            try:
                if 0 < float(number) < math.inf:
                    return float(number) * factor
            except ValueError:
                break
    raise SodaprofError(f"{option} is {text!r}; expected a number above 0 with its unit, as in {option} {example}")
