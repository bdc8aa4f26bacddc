"""The commands that run a model: profile, inspect, run and eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Device,
    Dtype,
    Force,
    Model,
    Prompts,
    Scale,
    Scheduler,
    Steps,
    duration,
    make_console,
    one_of,
    progress,
    say_next,
    size,
)


def profile(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")],
    steps: Steps = None,
    samples: Annotated[
        int | None, typer.Option(help="Generations to average over.  [default: 100, of video 10]")
    ] = None,
    prompts: Prompts = None,
    guidance_scale: Scale = None,
    max_interval: Annotated[int, typer.Option(help="Longest cache interval; ages 1 to this minus 1 are measured.")] = 8,
    batch_size: Annotated[
        int, typer.Option(help="Generations at once, at most: fewer where that saves passes over them.")
    ] = 16,
    tokens: Annotated[
        str, typer.Option(help="Errors a token: pooled to 1024 a site where there are more, or full.")
    ] = "pooled",
    states_only: Annotated[
        bool,
        typer.Option("--states-only", help="Only what policy solver reads: products of latents and guided outputs."),
    ] = False,
    no_gram: Annotated[
        bool, typer.Option("--no-gram", help="No products: only the errors that policy soda reads.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the first generation.")] = 0,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Measure what every step, layer and module suffers when its result is reused, pruned or forecast."""
    from ..formats.files import refuse_existing

    refuse_existing(output, force, folder=True)
    one_of("--tokens", tokens, ("pooled", "full"))
    from ..compiler import default_policy
    from ..pipelines.load import load_pipeline, read_prompts
    from ..profiler.plan import plan_profile
    from ..profiler.run import run_profile

    console = make_console()
    entries = None if prompts is None else read_prompts(prompts)
    pipe = load_pipeline(model, dtype, device, scheduler)
    plan = plan_profile(
        pipe, model, steps=steps, samples=samples, prompts=entries, guidance_scale=guidance_scale,
        max_interval=max_interval, batch_size=batch_size, seed=seed, full_tokens=tokens == "full",
        states_only=states_only, gram=not no_gram,
    )  # fmt: skip
    taken = plan.request
    console.print(
        f"{len(plan.sites)} sites, {plan.sampler.steps} steps, {taken['samples']} generations, {taken['batch_size']} at once, in "
        f"{len(plan.groups)} pass(es). Memory beside the model's: {size(plan.extra_bytes)} on the device, "
        f"{size(plan.host_bytes)} on the host. Disk: at most {size(plan.disk_bytes)}. Time: about {duration(plan.seconds)}"
    )
    with progress(console, "profile") as on_progress:
        found = run_profile(pipe, plan, output, force=force, on_progress=on_progress)
    measured = found.manifest["measured"]
    console.print(
        f"Took {duration(measured['seconds'])}, {measured['time_over_plain']:.2f}x plain sampling. "
        f"Wrote {output}/ ({size(sum(f.stat().st_size for f in output.iterdir()))})"
    )
    if default_policy(output)[0] == "solver" and found.response() is None:
        console.print(
            "How outputs move with the latents was not measured: that takes 16 samples, and a pipeline whose steps can be "
            "replayed. Policy solver then places full steps without simulating them.",
            soft_wrap=True,
        )
    policy = "--policy soda " if no_gram else ""
    say_next(console, f"sodaprof compile {output} {policy}--budget 2.0x -o schedule.json")
