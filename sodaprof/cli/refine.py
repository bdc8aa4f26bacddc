"""The command that improves schedules with the model at hand: refine."""

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
    Scheduler,
    make_console,
    parse_size,
    parse_span,
    progress,
    say_next,
    told,
)


def refine_(
    model: Model,
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Schedule to start from.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Best schedule found so far.")],
    time: Annotated[str | None, typer.Option(metavar="SPAN", help="Stop after this time: 90s, 5m, 1h.")] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Stop after this many candidates; the result is then reproducible.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Calibration generations: three quarters for the search, the rest for validation.")
    ] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the sequence of candidates.")] = 0,
    prompts: Prompts = None,
    cost: Annotated[str, typer.Option(help="Unit of the budget: flops, or a cost.json.")] = "flops",
    max_cache: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Limit for the caches of one generation: 2GB, 500MB.")
    ] = None,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Search for better step placements, scored on the final images."""
    from ..formats.cost import load_cost
    from ..formats.schedule_file import load_schedule

    console = make_console()
    first = load_schedule(source)
    seconds = None if time is None else parse_span(time)
    most = None if max_cache is None else parse_size(max_cache)
    from ..pipelines.load import load_pipeline, read_prompts
    from ..tuning.refine import check_search, refine

    check_search(first, seconds, evaluations, samples)  # ahead of the model
    pipe = load_pipeline(model, dtype, device, scheduler)
    with progress(console, "refine") as on_progress:

        def show_scores(done: int, search: float, held: float) -> None:
            on_progress(done, evaluations)
            scores.update({"search": search, "validation": held})

        scores: dict[str, float] = {}
        best = refine(
            pipe, first, output, seconds=seconds, evaluations=evaluations, samples=samples,
            seed=seed, force=force, prompts=None if prompts is None else read_prompts(prompts),
            cost=None if cost == "flops" else load_cost(cost), max_cache=most, on_progress=show_scores,
        )  # fmt: skip
    done, predicted = best.policy["knobs"]["refined"], best.predicted or {}
    console.print(
        f"{scores['search']:.2f} dB on the search generations, {scores['validation']:.2f} dB on the validation ones (mean and "
        f"worst decile of the latents' signal to error); best found at candidate {done}; {told(best)}, "
        f"{predicted['cache_bytes'] / 2**20:.2f} MiB of cache a generation"
    )
    console.print(f"Wrote {output}")
    say_next(console, f"sodaprof eval {model} {output}{'' if scheduler is None else f' --scheduler {scheduler}'}")
