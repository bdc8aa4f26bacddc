"""The commands that run a model: profile, inspect, run and eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Scale,
    Scheduler,
    Steps,
    make_console,
    say_next,
)


def inspect(
    model: Model,
    steps: Steps = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")] = None,
    guidance_scale: Scale = None,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show a model's sites, shapes, FLOPs, and what can be pruned; write what compilers need that takes no sampling."""
    from ..formats.files import refuse_existing

    if output is not None:
        refuse_existing(output, force, folder=True)
    from ..formats.cost import save_cost
    from ..formats.profile import write_inspection, write_solver
    from ..pipelines.discover import inspect_pipeline
    from ..pipelines.flops import count_flops
    from ..pipelines.load import default_guidance, default_steps, load_pipeline
    from ..profiler.run import solver_of
    from ..report.results import inspection_view

    pipe = load_pipeline(model, dtype, device, scheduler)
    scale = default_guidance(pipe) if guidance_scale is None else guidance_scale
    found, sampler, step = inspect_pipeline(pipe, model, default_steps(pipe) if steps is None else steps, scale)
    cost = count_flops(pipe, found, step)
    console = make_console(stderr=as_json)
    if as_json:
        print(json.dumps({"model": found.to_json(), "sampler": sampler.to_json(), "cost": cost.to_json()}))
    else:
        console.print(inspection_view(found, sampler, cost))
    if output is not None:
        write_inspection(output, found, sampler)
        write_solver(output, solver_of(pipe, sampler))
        save_cost(cost, output / "cost.flops.json", force=True)
        console.print(f"Wrote {output}/")
        say_next(console, f"sodaprof compile {output} --policy fora --budget 2.0x -o fora.json")
    elif not as_json:
        say_next(console, f"sodaprof profile {model} -o profile")
