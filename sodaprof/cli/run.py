"""The commands that run a model: profile, inspect, run and eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SodaprofError
from .options import (
    Device,
    Dtype,
    Force,
    Model,
    Runtime,
    Scale,
    Scheduler,
    make_console,
    say_next,
)


def run(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="Picture to write; of a video model .mp4, or some frames."),
    ],
    schedule: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A schedule.  [default: the one beside the weights]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the schedule to take from beside the weights.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text prompt; may be repeated.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="Class label; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture, the next counts on.")] = 0,
    guidance_scale: Scale = None,
    height: Annotated[int | None, typer.Option(help="In pixels, with --width.  [default: the pipeline's]")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, with --height.")] = None,
    allow_resolution: Annotated[
        bool, typer.Option("--allow-resolution", help="Also at another size than profiled, pruning scaled to it.")
    ] = False,
    runtime: Runtime = "hooks",
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Make pictures with a schedule, and say what was planned and executed."""
    from ..formats.files import refuse_existing
    from ..formats.schedule_file import load_schedule
    from ..report.pictures import check_picture, save_picture, save_side_by_side, strip

    refuse_existing(output, force)
    if output.suffix != ".mp4":
        check_picture(output)
    entries: list[int | str] = [*(prompt or []), *(label or [])]
    if not entries:
        raise SodaprofError("Nothing to draw. Give --label N or --prompt TEXT, once or more.")
    if schedule is not None:
        load_schedule(schedule)  # a broken file is told before a model is loaded
    from ..pipelines.load import call, load_pipeline, makes_video, pictures_of
    from ..report.pictures import save_video
    from ..runtime.apply import apply_with
    from ..runtime.shipped import find_shipped

    console = make_console()
    pipe = load_pipeline(model, dtype, device, scheduler)
    schedule = schedule or find_shipped(pipe, steps)
    loaded = load_schedule(schedule)
    if steps not in (None, loaded.steps):
        raise SodaprofError(
            f"{schedule} is for {loaded.steps} steps, not {steps}. Leave --steps out, or name another file."
        )
    pipe.set_progress_bar_config(disable=not console.is_terminal)
    scale = loaded.sampler.guidance_scale if guidance_scale is None else guidance_scale
    if (height is None) != (width is None):
        raise SodaprofError("Give --height and --width together, or neither.")
    if output.suffix == ".mp4" and (len(entries) > 1 or not makes_video(pipe)):
        raise SodaprofError(f"{output}: an mp4 holds one clip. Give one prompt to a video model, or a .png.")
    size_ = None if height is None or width is None else (height, width)
    seeds = [seed + i for i in range(len(entries))]
    with apply_with(pipe, loaded, runtime, allow_resolution=allow_resolution) as handle:
        pictures = pictures_of(call(pipe, entries, seeds, loaded.steps, scale, size=size_))
    if output.suffix == ".mp4":
        save_video(pictures[0], output, force=force)
    elif len(pictures) == 1:
        save_picture(strip(pictures[0]) if pictures.ndim == 5 else pictures[0], output, force=force)
    else:
        names = {f"{e} (seed {seed + i})": pictures[i : i + 1] for i, e in enumerate(entries)}
        save_side_by_side(names, output, force=force)
    console.print(str(handle.report()), highlight=False)
    console.print(f"Wrote {output}")
    say_next(console, f"sodaprof eval {model} {schedule}{'' if scheduler is None else f' --scheduler {scheduler}'}")
