"""The commands that run a model: profile, inspect, run and eval."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    Batch,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Prompts,
    Runtime,
    Scale,
    Scheduler,
    check_outputs,
    make_console,
    progress,
    say_next,
)


def evaluate_(
    model: Model,
    schedules: Annotated[list[Path], typer.Argument(metavar="FILE...", help="One schedule or more.")],
    samples: Annotated[int, typer.Option(help="Held-out seeds.")] = 64,
    seed: Annotated[int, typer.Option(help="First of them; must keep clear of the profile's.")] = 1_000_000,
    prompts: Prompts = None,
    guidance_scale: Scale = None,
    batch_size: Batch = 16,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    runtime: Runtime = "hooks",
    controls: Annotated[bool, typer.Option(help="FORA and fewer sampler steps at the same cost.")] = True,
    picture: Annotated[Path | None, typer.Option(help="Write the first pictures side by side.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Add the result to the schedules' `measured`.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result as JSON.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare pictures with and without schedules on the same seeds, beside FORA and fewer steps at the same cost."""
    from msgspec.structs import replace

    from ..formats.files import write_json
    from ..formats.schedule_file import load_schedule
    from ..report.pictures import check_picture, save_side_by_side

    check_outputs({"--picture": picture, "--output": output}, force)
    if picture is not None:
        check_picture(picture)
    loaded = [load_schedule(path) for path in schedules]
    from ..measure.evaluate import evaluate, measured_record
    from ..pipelines.load import load_pipeline, read_prompts
    from ..report.results import evaluation_view

    console = make_console(stderr=as_json)
    pipe = load_pipeline(model, dtype, device, scheduler)
    with progress(console, "eval") as on_progress:
        result = evaluate(
            pipe, loaded, samples=samples, seed=seed, prompts=None if prompts is None else read_prompts(prompts),
            batch_size=batch_size, guidance_scale=guidance_scale, controls=controls, runtime=runtime, on_progress=on_progress,
            names=_names(schedules, loaded),
        )  # fmt: skip
    pictures = result.pop("pictures")
    result["command"] = shlex.join(["sodaprof", *sys.argv[1:]])
    if as_json:
        print(json.dumps(result))
    else:
        console.print(evaluation_view(result))
    if output is not None:
        write_json(output, result, force=force)
        console.print(f"Wrote {output}")
    if picture is not None:
        save_side_by_side(pictures, picture, force=force)
        console.print(f"Wrote {picture}")
    if record:
        for path, schedule, row in zip(schedules, loaded, result["rows"], strict=False):
            new = replace(schedule, measured=(*schedule.measured, measured_record(result, row)))
            new.save(path, force=True)
            console.print(f"Recorded in {path}")
    if output is not None or picture is not None or record:
        say_next(console, f"sodaprof show {schedules[0]}")


def _names(paths: list[Path], loaded: list[Any]) -> list[str]:
    """Names the schedules by policy, by file where that is ambiguous."""
    policies = [schedule.policy["name"] for schedule in loaded]
    return [p if policies.count(p) == 1 else path.stem for p, path in zip(policies, paths, strict=True)]
