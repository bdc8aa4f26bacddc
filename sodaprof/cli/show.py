"""`sodaprof show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import make_console, print_next
from .options import Json


def show(
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule.")],
    as_json: Json = False,
) -> None:
    """Draw a schedule: what every site does at every step, cache intervals, prune rates."""
    from ..formats.schedule_file import load_schedule
    from ..report.schedule import schedule_data, schedule_view

    loaded = load_schedule(schedule)
    if as_json:
        print(json.dumps(schedule_data(loaded)))
        return
    console = make_console()
    console.print(schedule_view(loaded, console.width))
    print_next(console, f"sodaprof run MODEL {schedule} -o picture.png --prompt TEXT (or --label N)")
