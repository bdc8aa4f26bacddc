"""`sodaprof bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SodaprofError
from . import options
from .console import command_line, make_console, note_written, print_next, print_result, print_wrote, progress


def bench(
    model: options.Model,
    schedules: Annotated[list[Path] | None, typer.Argument(metavar="[FILE...]", help="Schedules.")] = None,
    cost: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also measure what each action takes: a cost.json to compile with."),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            callback=options.ranged(1, 100_000), help="Timed runs of each, in turn, after three warm-up runs."
        ),
    ] = 7,
    batch_size: options.Batch = 1,
    steps: options.Steps = None,
    prompts: options.Prompts = None,
    labels: options.Labels = None,
    guidance_scale: options.Scale = None,
    scheduler: options.Scheduler = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    no_graphs: options.NoGraphs = False,
    output: options.ResultFile = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Time the denoising loop: plain, all computed by each runtime, and under each schedule. Measure costs in ms."""
    from ..formats.cost import save_cost
    from ..formats.files import write_json
    from ..formats.schedule_file import load_schedule

    options.check_outputs({"--cost": cost, "--output": output}, force)
    loaded = [load_schedule(path) for path in schedules or []]
    if loaded and steps not in (None, loaded[0].steps):
        raise SodaprofError(f"The schedules are for {loaded[0].steps} steps, --steps is {steps}. Leave --steps out.")
    from ..measure.bench import benchmark
    from ..measure.latency import measure_costs
    from ..pipelines.load import default_steps, load_pipeline
    from ..report.results import benchmark_view

    console, given = make_console(stderr=as_json), options.entries(prompts, labels)
    pipe = load_pipeline(model, dtype, device, scheduler)
    settings: dict[str, Any] = {
        "steps": loaded[0].steps if loaded else default_steps(pipe) if steps is None else steps,
        "guidance_scale": loaded[0].sampler.guidance_scale if loaded and guidance_scale is None else guidance_scale,
        "prompts": given and options.say_entries(console, pipe, given),
        "batch_size": batch_size,
        "rounds": rounds,
        "graphs": not no_graphs,
    }
    if cost is not None:
        with progress(console, "costs") as on_progress:
            table = measure_costs(pipe, **settings, on_progress=on_progress)
            save_cost(table, cost, force=force)
            note_written(cost)
        print_wrote(console, cost)
    with progress(console, "bench") as on_progress:
        names = [path.stem for path in schedules or []]
        result = benchmark(pipe, loaded, **settings, names=names, on_progress=on_progress)
        result["command"] = command_line()
        if output is not None:
            write_json(output, result, force=force)
            note_written(output)
    print_result(console, result, lambda: benchmark_view(result), as_json)
    if output is not None:
        print_wrote(console, output)
    if cost is not None:
        print_next(console, f"sodaprof compile PROFILE --cost {cost} --budget 2.0x -o schedule.json")
    elif not as_json:
        print_next(console, f"sodaprof bench {model} --cost cost.json")
