"""`sodaprof profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import duration, make_console, note_written, print_next, progress, size
from .options import (
    BatchRange,
    Device,
    Dtype,
    Force,
    Labels,
    Model,
    Prompts,
    SampleRange,
    Scale,
    Scheduler,
    SeedRange,
    Steps,
    check_choice,
    entries,
    ranged,
    say_entries,
)


def profile(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")],
    steps: Steps = None,
    samples: Annotated[
        int | None,
        typer.Option(callback=SampleRange, help="Generations to average over.  [default: 100; 10 for video]"),
    ] = None,
    prompts: Prompts = None,
    labels: Labels = None,
    guidance_scale: Scale = None,
    max_interval: Annotated[
        int | None,
        typer.Option(
            callback=ranged(2, 100),
            help="Longest cache interval; ages 1 to this minus 1 are measured.  [default: 8, at most the steps]",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            callback=BatchRange, help="Most generations sampled at once; fewer are taken if that saves passes."
        ),
    ] = 16,
    tokens: Annotated[str, typer.Option(help="Errors per token: pooled (to at most 1024 a site) or full.")] = "pooled",
    states_only: Annotated[
        bool,
        typer.Option(
            "--states-only", help="Measure only what policy solver reads: products of latents and guided outputs."
        ),
    ] = False,
    no_gram: Annotated[
        bool, typer.Option("--no-gram", help="Measure no products, only the errors that policy soda reads.")
    ] = False,
    seed: Annotated[int, typer.Option(callback=SeedRange, help="Seed of the first generation.")] = 0,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Measure the error at every step, layer and module if its output is reused, pruned or forecast."""
    from ..formats.files import refuse_existing

    refuse_existing(output, force, folder=True)
    check_choice("--tokens", tokens, ("pooled", "full"))
    from ..pipelines.load import load_pipeline
    from ..profiler.plan import plan_profile
    from ..profiler.run import run_profile

    console, given = make_console(), entries(prompts, labels)
    pipe = load_pipeline(model, dtype, device, scheduler)
    plan = plan_profile(
        pipe, model, steps=steps, samples=samples, prompts=say_entries(console, pipe, given), guidance_scale=guidance_scale,
        max_interval=max_interval, batch_size=batch_size, seed=seed, full_tokens=tokens == "full",
        states_only=states_only, gram=not no_gram,
    )  # fmt: skip
    console.print(
        f"{len(plan.sites)} sites, {plan.sampler.steps} steps, {plan.request['samples']} generations, "
        f"{plan.request['batch_size']} at once, in {len(plan.groups)} pass(es). Memory in addition to the model's: "
        f"{size(plan.extra_bytes)} on the device, {size(plan.host_bytes)} on the host. Disk: at most "
        f"{size(plan.disk_bytes)}. Time: about {duration(plan.seconds)}"
    )
    with progress(console, "profile") as on_progress:
        found = run_profile(pipe, plan, output, force=force, on_progress=on_progress)
        note_written(f"{output}/")
    _print_end(console, found, output, no_gram)


def _print_end(console: Any, found: Any, output: Path, no_gram: bool) -> None:
    from ..compiler import default_policy

    measured = found.manifest["measured"]
    written = sum(file.stat().st_size for file in output.iterdir())
    console.print(
        f"Took {duration(measured['seconds'])}, {measured['time_over_plain']:.2f}x plain sampling. "
        f"Wrote {output}/ ({size(written)})"
    )
    if default_policy(output)[0] == "solver" and found.response() is None:
        console.print(
            "The response of the outputs to the latents was not measured: that takes 16 samples, and a pipeline whose steps "
            "can be replayed. Policy solver then places full steps without simulating them."
        )
    policy = "--policy soda " if no_gram else ""
    print_next(console, f"sodaprof compile {output} {policy}--budget 2.0x -o schedule.json")
