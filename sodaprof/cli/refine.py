"""`sodaprof refine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import make_console, note_written, print_next, print_wrote, progress, size, summary
from .options import (
    Cost,
    Device,
    Dtype,
    Force,
    Labels,
    MaxCache,
    Model,
    Prompts,
    SampleRange,
    Scheduler,
    SeedRange,
    check_choice,
    entries,
    parse_size,
    parse_span,
    ranged,
    say_entries,
)


def refine_(
    model: Model,
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Schedule to start from.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="File for the best schedule found so far.")
    ],
    time: Annotated[str | None, typer.Option(metavar="SPAN", help="Stop after this time: 90s, 5m, 1h.")] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(callback=ranged(0, 10**9), help="Search this many placements; the result is then reproducible."),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            callback=SampleRange,
            help="Calibration generations: three quarters for the fits, the rest for validation.",
        ),
    ] = 40,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Method of the joint fit: auto (adam, or gauss-newton without backward pass), adam, gauss-newton, none.",
        ),
    ] = "auto",
    iterations: Annotated[
        int, typer.Option(callback=ranged(1, 10**6), help="Iterations of Adam, the joint fit's default method.")
    ] = 100,
    seed: Annotated[
        int, typer.Option(callback=SeedRange, help="Seed of the sequence of candidates and of Adam's batches.")
    ] = 0,
    prompts: Prompts = None,
    labels: Labels = None,
    cost: Cost = "flops",
    max_cache: MaxCache = None,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Search for better step placements, then fit coefficients and network times jointly on the final images."""
    from ..formats.cost import load_cost
    from ..formats.schedule_file import load_schedule

    console, given = make_console(), entries(prompts, labels)
    first = load_schedule(source)
    seconds, most = parse_span(time), parse_size(max_cache)
    from ..pipelines.load import load_pipeline
    from ..tuning.refine import check_search, kept_bytes, refine
    from ..tuning.refine_jumps import METHODS

    check_choice("--method", method, METHODS)
    check_search(first, seconds, evaluations, samples)  # ahead of the model
    samples = min(samples, (first.profile or {"samples": samples})["samples"])
    console.print(
        f"Keeps {size(kept_bytes(first, samples))} of latents and outputs of {samples} calibration generations."
    )
    pipe = load_pipeline(model, dtype, device, scheduler)
    found = say_entries(console, pipe, given)
    with progress(console, "refine") as on_progress:

        def show_score(part: str, done: int, validation: float) -> None:
            on_progress(done, evaluations if part == "placements" else iterations)
            scores[part] = validation

        scores: dict[str, float] = {}
        best = refine(
            pipe, first, output, seconds=seconds, evaluations=evaluations, samples=samples,
            seed=seed, force=force, prompts=found, method=method, iterations=iterations,
            cost=None if cost == "flops" else load_cost(cost), max_cache=most, on_progress=show_score,
        )  # fmt: skip
        note_written(output)
    knobs, update = best.policy["knobs"], best.update
    console.print(
        f"Placements: {scores['placements']:.2f} dB on the validation generations (signal to error of the last latents; mean of "
        f"the mean and of the worst tenth). Best found at candidate {knobs['refined']}: {summary(best)}"
    )
    if "jumps" in scores and update is not None:
        console.print(f"Joint fit: {scores['jumps']:.2f} dB on the validation generations ({update.fitted['error']})")
    print_wrote(console, output)
    print_next(console, f"sodaprof eval {model} {output}{'' if scheduler is None else f' --scheduler {scheduler}'}")
