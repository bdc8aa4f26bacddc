"""`sodaprof inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import make_console, note_written, print_next, print_result, print_wrote
from .options import Device, Dtype, Force, Json, Model, Scale, Scheduler, Steps


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
    """List a model's sites with shapes, FLOPs and what can be pruned. With -o write what compile reads without a profile."""
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
    data = {"model": found.to_json(), "sampler": sampler.to_json(), "cost": cost.to_json()}
    if output is not None:
        write_inspection(output, found, sampler)
        write_solver(output, solver_of(pipe, sampler))
        save_cost(cost, output / "cost.flops.json", force=True)
        note_written(f"{output}/")
    print_result(console, data, lambda: inspection_view(found, sampler, cost), as_json)
    if output is not None:
        print_wrote(console, f"{output}/")
        print_next(console, f"sodaprof compile {output} --policy fora --budget 2.0x -o fora.json")
    elif not as_json:
        print_next(console, f"sodaprof profile {model} -o profile")
