"""The commands that make schedules without a search, and show them: compile and show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, make_console


def show(
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule.")],
    as_json: Json = False,
) -> None:
    """Draw a schedule: the picture, the cache intervals, the prune rates."""
    from ..formats.schedule_file import load_schedule
    from ..report.schedule import schedule_data, schedule_view

    loaded = load_schedule(schedule)
    if as_json:
        print(json.dumps(schedule_data(loaded)))
    else:
        console = make_console()
        console.print(schedule_view(loaded, console.width))
