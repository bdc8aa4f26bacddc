"""`sodaprof show`."""

from __future__ import annotations

import json

from .console import make_console, print_next
from .options import Json, ScheduleFile


def show(schedule: ScheduleFile, as_json: Json = False) -> None:
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
