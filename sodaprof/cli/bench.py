"""The command that takes times: bench."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SodaprofError
from .options import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Prompts,
    Scale,
    Scheduler,
    Steps,
    check_outputs,
    make_console,
    progress,
    say_next,
)


def bench(
    model: Model,
    schedules: Annotated[list[Path] | None, typer.Argument(metavar="[FILE...]", help="Schedules.")] = None,
    cost: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure what each action takes, too: a cost.json to compile with."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turn, after three that do not count.")] = 7,
    batch_size: Annotated[int, typer.Option(help="Generations at once.")] = 1,
    steps: Steps = None,
    prompts: Prompts = None,
    guidance_scale: Scale = None,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result as JSON.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time the denoising loop: plain, all computed here, and under each schedule; measure costs in milliseconds."""
    from ..formats.files import write_json
    from ..formats.schedule_file import load_schedule

    check_outputs({"--cost": cost, "--output": output}, force)
    loaded = [load_schedule(path) for path in schedules or []]
    if loaded and steps not in (None, loaded[0].steps):
        raise SodaprofError(f"The schedules are for {loaded[0].steps} steps, --steps is {steps}. Leave --steps out.")
    from ..formats.cost import save_cost
    from ..measure.bench import benchmark
    from ..measure.latency import measure_costs
    from ..pipelines.load import default_steps, load_pipeline, read_prompts
    from ..report.results import benchmark_view

    console = make_console(stderr=as_json)
    pipe = load_pipeline(model, dtype, device, scheduler)
    entries = None if prompts is None else read_prompts(prompts)
    steps = loaded[0].steps if loaded else default_steps(pipe) if steps is None else steps
    scale = loaded[0].sampler.guidance_scale if loaded and guidance_scale is None else guidance_scale
    if cost is not None:
        with progress(console, "costs") as on_progress:
            table = measure_costs(
                pipe, steps=steps, batch_size=batch_size, rounds=rounds, guidance_scale=scale, prompts=entries,
                on_progress=on_progress,
            )  # fmt: skip
        save_cost(table, cost, force=force)
        console.print(f"Wrote {cost}")
    with progress(console, "bench") as on_progress:
        result = benchmark(
            pipe, loaded, steps=steps, batch_size=batch_size, rounds=rounds, guidance_scale=scale, prompts=entries,
            names=[path.stem for path in schedules or []], on_progress=on_progress,
        )  # fmt: skip
    result["command"] = shlex.join(["sodaprof", *sys.argv[1:]])
    if as_json:
        print(json.dumps(result))
    else:
        console.print(benchmark_view(result))
    if output is not None:
        write_json(output, result, force=force)
        console.print(f"Wrote {output}")
    if cost is not None:
        say_next(console, f"sodaprof compile PROFILE --cost {cost} --budget 2.0x -o schedule.json")
