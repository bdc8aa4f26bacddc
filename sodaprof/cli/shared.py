"""What the commands share: options, the console, progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
