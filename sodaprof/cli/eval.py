"""`sodaprof eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .console import command_line, make_console, note_written, print_next, print_result, print_wrote, progress


def eval_(
    model: options.Model,
    schedules: Annotated[list[Path], typer.Argument(metavar="FILE...", help="One schedule or more.")],
    samples: Annotated[int, typer.Option(callback=options.EvalRange, help="Held-out seeds.")] = 64,
    seed: Annotated[
        int,
        typer.Option(callback=options.SeedRange, help="First held-out seed; no calibration seed may be among them."),
    ] = 1_000_000,
    prompts: options.Prompts = None,
    labels: options.Labels = None,
    guidance_scale: options.Scale = None,
    batch_size: options.Batch = 16,
    scheduler: options.Scheduler = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    runtime: options.Runtime = "hooks",
    no_graphs: options.NoGraphs = False,
    controls: Annotated[bool, typer.Option(help="Also sample FORA and fewer sampler steps at the same cost.")] = True,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also measure distances to these pictures: 1000 or more, with --samples 1000 or more.",
        ),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the first pictures side by side.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Add the result to the schedules' `measured`.")] = False,
    output: options.ResultFile = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Compare pictures with and without schedules on the same held-out seeds, and with controls at the same cost."""
    from ..formats.files import write_json
    from ..formats.schedule_file import load_schedule
    from ..report.pictures import check_picture, save_side_by_side

    options.check_outputs({"--picture": picture, "--output": output}, force)
    if picture is not None:
        check_picture(picture)
    loaded = [load_schedule(path) for path in schedules]
    from ..measure.data import check_enough, pictures_in
    from ..measure.evaluate import evaluate
    from ..pipelines.load import load_pipeline
    from ..report.results import evaluation_view
    from ..runtime.apply import runtime_settings

    runtime_settings(runtime, not no_graphs)  # an unknown name is reported before a model is loaded
    real = None
    if data is not None:
        check_enough(samples)
        real = pictures_in(data)
    console, given = make_console(stderr=as_json), options.entries(prompts, labels)
    pipe = load_pipeline(model, dtype, device, scheduler)
    found = options.say_entries(console, pipe, given)
    with progress(console, "eval") as on_progress:
        result = evaluate(
            pipe, loaded, samples=samples, seed=seed, prompts=found, batch_size=batch_size,
            guidance_scale=guidance_scale, names=_names(schedules, loaded), controls=controls, data=real, runtime=runtime,
            graphs=not no_graphs, on_progress=on_progress,
        )  # fmt: skip
        pictures = result.pop("pictures")
        result["command"] = command_line()
        if output is not None:
            write_json(output, result, force=force)
            note_written(output)
        if picture is not None:
            save_side_by_side(pictures, picture, force=force)
            note_written(picture)
    print_result(console, result, lambda: evaluation_view(result), as_json)
    for path in (output, picture):
        if path is not None:
            print_wrote(console, path)
    if record:
        _record(console, result, schedules, loaded)
    if not as_json:
        print_next(console, f"sodaprof show {schedules[0]}")


def _names(paths: list[Path], loaded: list[Any]) -> list[str]:
    """Returns a name for each schedule: the policy's, or the file's if two have the same policy."""
    policies = [schedule.policy["name"] for schedule in loaded]
    return [p if policies.count(p) == 1 else path.stem for p, path in zip(policies, paths, strict=True)]


def _record(console: Any, result: dict[str, Any], paths: list[Path], loaded: list[Any]) -> None:
    """Adds each schedule's figures to its file."""
    from msgspec.structs import replace

    from ..measure.evaluate import measured_record

    for path, schedule, row in zip(paths, loaded, result["rows"], strict=False):
        new = replace(schedule, measured=(*schedule.measured, measured_record(result, row)))
        new.save(path, force=True)
        console.print(f"Recorded in {path}", soft_wrap=True)
