"""The commands that run a model: profile, inspect, run and eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Force,
    make_console,
    say_next,
)


def ship(
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule.")],
    folder: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="The pipeline's folder.")],
    force: Force = False,
) -> None:
    """Put a schedule beside a model's weights, where run and apply find it, after checking that it fits."""
    from ..formats.schedule_file import load_schedule

    loaded = load_schedule(schedule)
    from ..runtime.shipped import ship as ship_schedule

    console = make_console()
    console.print(f"Wrote {ship_schedule(schedule, folder, force=force)}")
    say_next(console, f"sodaprof run {folder} --steps {loaded.steps} -o picture.png --prompt TEXT (or --label N)")
