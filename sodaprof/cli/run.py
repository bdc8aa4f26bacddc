"""`sodaprof run`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SodaprofError
from .console import make_console, note_written, print_next, print_wrote
from .options import Device, Dtype, Force, Model, NoGraphs, PixelRange, Runtime, Scale, Scheduler, SeedRange, StepRange


def run(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Picture to write; for a video model a clip (.mp4) or some frames."
        ),
    ],
    schedule: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A schedule.  [default: the one in the model's folder]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(callback=StepRange, help="Steps of the schedule to take from the model's folder.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text prompt; may be repeated.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Class label, or its name if the model has names; may be repeated.")
    ] = None,
    seed: Annotated[
        int, typer.Option(callback=SeedRange, help="Seed of the first picture; each further picture adds 1.")
    ] = 0,
    guidance_scale: Scale = None,
    height: Annotated[
        int | None, typer.Option(callback=PixelRange, help="In pixels, with --width.  [default: the pipeline's]")
    ] = None,
    width: Annotated[int | None, typer.Option(callback=PixelRange, help="In pixels, with --height.")] = None,
    allow_resolution: Annotated[
        bool,
        typer.Option("--allow-resolution", help="Allow another size than profiled; pruned tokens are scaled to it."),
    ] = False,
    runtime: Runtime = "hooks",
    no_graphs: NoGraphs = False,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Sample pictures with a schedule, and report which cells were planned and executed."""
    from ..formats.files import refuse_existing
    from ..formats.schedule_file import load_schedule
    from ..report.pictures import check_picture

    refuse_existing(output, force)
    if output.suffix != ".mp4":
        check_picture(output)
    if not (prompt or label):
        raise SodaprofError("Nothing to sample. Give --label N or --prompt TEXT, once or more.")
    if (height is None) != (width is None):
        raise SodaprofError("Give --height and --width together, or neither.")
    if schedule is not None:
        load_schedule(schedule)  # a broken file is reported before a model is loaded
    from ..pipelines.entries import makes_video
    from ..pipelines.finite import finite_pictures
    from ..pipelines.load import call, load_pipeline
    from ..runtime.apply import apply, runtime_settings
    from ..runtime.shipped import find_shipped

    settings = runtime_settings(runtime, not no_graphs) or runtime
    console = make_console()
    pipe = load_pipeline(model, dtype, device, scheduler)
    entries = _entries(pipe, prompt or [], label or [])
    schedule = schedule or find_shipped(pipe, steps)
    loaded = load_schedule(schedule)
    if steps not in (None, loaded.steps):
        raise SodaprofError(
            f"{schedule} is for {loaded.steps} steps, not {steps}. Leave --steps out, or name another file."
        )
    if output.suffix == ".mp4" and (len(entries) > 1 or not makes_video(pipe)):
        raise SodaprofError(f"{output}: an mp4 holds one clip. Give one prompt to a video model, or a .png.")
    pipe.set_progress_bar_config(disable=not console.is_terminal)
    scale = loaded.sampler.guidance_scale if guidance_scale is None else guidance_scale
    pixels = None if height is None or width is None else (height, width)
    seeds = [seed + i for i in range(len(entries))]
    with apply(pipe, loaded, runtime=settings, allow_resolution=allow_resolution) as handle:
        pictures = finite_pictures(pipe, lambda: call(pipe, entries, seeds, loaded.steps, scale, size=pixels))
    _save(pictures, [f"{e} (seed {s})" for e, s in zip(entries, seeds, strict=True)], output, force)
    note_written(output)
    console.print(str(handle.report()))
    print_wrote(console, output)
    print_next(console, f"sodaprof eval {model} {schedule}{'' if scheduler is None else f' --scheduler {scheduler}'}")


def _entries(pipe: Any, prompts: list[str], labels: list[str]) -> list[int | str]:
    """Returns what to sample; SodaprofError if the pipeline takes the other kind, or does not know a label."""
    from ..pipelines.entries import check_entries, takes_labels

    of_labels = takes_labels(pipe)
    if prompts if of_labels else labels:
        takes, give = ("labels", "--label N") if of_labels else ("text prompts", "--prompt TEXT")
        raise SodaprofError(
            f"{type(pipe).__name__} takes {takes}. Give {give} in place of --{'prompt' if of_labels else 'label'}"
        )
    numbers = [int(text) if re.fullmatch(r"-?\d{1,9}", text, re.ASCII) else text for text in labels]
    return check_entries(pipe, numbers if of_labels else prompts, "--label N")


def _save(pictures: Any, names: list[str], output: Path, force: bool) -> None:
    """Writes a clip as an mp4, one picture (of a clip some frames) as it is, several side by side."""
    from ..report.pictures import save_picture, save_side_by_side, save_video, strip

    if output.suffix == ".mp4":
        save_video(pictures[0], output, force=force)
    elif len(pictures) == 1:
        save_picture(strip(pictures[0]) if pictures.ndim == 5 else pictures[0], output, force=force)
    else:
        save_side_by_side({name: pictures[i : i + 1] for i, name in enumerate(names)}, output, force=force)
