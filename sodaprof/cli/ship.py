"""`sodaprof ship`."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import make_console, print_next, print_wrote
from .options import Force, ScheduleFile


def ship(
    schedule: ScheduleFile,
    folder: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="The pipeline's folder.")],
    force: Force = False,
) -> None:
    """Copy a schedule into a model's folder, where run and apply find it, after checking that it matches the model."""
    from ..formats.schedule_file import load_schedule

    steps = load_schedule(schedule).steps
    from ..runtime.shipped import ship as ship_schedule

    console = make_console()
    print_wrote(console, ship_schedule(schedule, folder, force=force))
    print_next(console, f"sodaprof run {folder} --steps {steps} -o picture.png --prompt TEXT (or --label N)")
