"""The command that improves schedules with the model at hand: refine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SodaprofError
from .compile import OBJECTIVES
from .options import (
    Device,
    Dtype,
    Force,
    Model,
    Prompts,
    Scheduler,
    make_console,
    one_of,
    parse_size,
    parse_span,
    progress,
    say_next,
    show_verdict,
    told,
    told_sampler,
)


def refine_(
    model: Model,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|DIR...", help="faithful: the schedule to begin with; distribution: profiles of the model."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The best one found, at any time.")],
    objective: Annotated[
        str,
        typer.Option(
            help="faithful: searches, near to the full run; distribution: of several samplers or numbers of steps at one cost "
            "takes the one whose samples are nearest to data."
        ),
    ] = "faithful",
    time: Annotated[str | None, typer.Option(metavar="SPAN", help="Search for so long: 90s, 5m, 1h.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="End after so many candidates: reproducible.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="distribution: speed-up over the first profile's full loop.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Calibration generations: three quarters to search on, the rest to validate; distribution: samples of each "
            "profile.  [default: 24, 1000]"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the sequence of candidates; of the first sample.  [default: 0, 500000]")
    ] = None,
    prompts: Prompts = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="distribution: pictures to be near to.  [default: a shipped model's data]"),
    ] = None,
    cost: Annotated[str, typer.Option(help="What the budget is counted in: flops, or a cost.json.")] = "flops",
    max_cache: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="faithful: most that the caches of a generation may take: 2GB, 500MB."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="distribution: generations at once.  [default: 16; faithful takes all]")
    ] = None,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Search full steps and what stands between them on the final error of the model's own pictures."""
    from ..formats.files import refuse_existing
    from ..formats.schedule import load_schedule

    one_of("--objective", objective, OBJECTIVES)
    console = make_console()
    if objective == "distribution":
        if time is not None or evaluations is not None or scheduler is not None or max_cache is not None:
            raise SodaprofError(
                "--objective distribution judges each profile's schedule once, by its own sampler. Leave --time, --evaluations, "
                "--max-cache and --scheduler out."
            )
        refuse_existing(output, force)
        from ..measure.metrics import LEAST_FOR_DISTANCE
        from ..pipelines.load import load_pipeline, read_prompts
        from ..tuning.distribution import SEED

        best = _decide(
            console, load_pipeline(model, dtype, device), sources, budget or "2.0x", cost=cost, data=data,
            samples=LEAST_FOR_DISTANCE if samples is None else samples, seed=SEED if seed is None else seed,
            prompts=None if prompts is None else read_prompts(prompts), batch_size=16 if batch_size is None else batch_size,
        )  # fmt: skip
        best.save(output, force=force)
        console.print(f"Wrote {output}")
        say_next(console, f"sodaprof eval {model} {output} --scheduler {best.sampler.class_name}")
        return
    if budget is not None or data is not None or batch_size is not None:
        raise SodaprofError(
            "--budget, --data and --batch-size are for --objective distribution; a search keeps to the cost of the schedule it "
            "begins with, and takes all its generations at once."
        )
    if len(sources) > 1:
        raise SodaprofError(f"Found {len(sources)} files; a search begins with one schedule. Give one.")
    first = load_schedule(sources[0])
    seconds = None if time is None else parse_span(time)
    most = None if max_cache is None else parse_size(max_cache)
    from ..formats.cost import load_cost
    from ..pipelines.load import load_pipeline, read_prompts
    from ..tuning.refine import check_search, refine

    samples = 24 if samples is None else samples
    check_search(first, seconds, evaluations, samples)  # ahead of the model
    pipe = load_pipeline(model, dtype, device, scheduler)
    with progress(console, "refine") as on_progress:

        def show_scores(done: int, search: float, held: float) -> None:
            on_progress(done, evaluations)
            scores.update({"search": search, "validation": held})

        scores: dict[str, float] = {}
        best = refine(
            pipe, first, output, seconds=seconds, evaluations=evaluations, samples=samples,
            seed=seed or 0, force=force, prompts=None if prompts is None else read_prompts(prompts),
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


def _decide(console: Any, pipe: Any, folders: list[Path], budget: str, **settings: Any) -> Any:
    from ..tuning.distribution import refine_distribution

    with progress(console, "samples") as on_progress:
        best, judged, left_out = refine_distribution(pipe, folders, budget, on_progress=on_progress, **settings)
    rows = []
    for one in judged:
        over = one.over_best
        rows.append((
            Path(one.ranked.name).name, *told_sampler(one.schedule), f"{one.ranked.speedup:.2f}x", f"{one.fidelity_db:.1f}",
            f"{one.worst_decile_db:.1f}", f"{one.kernel:.4g}",
            "best" if over is None else f"{over['mean']:.3g} [{over['low']:.3g}, {over['high']:.3g}]",
        ))  # fmt: skip
    columns = (
        "profile", "sampler", "full steps", "against the first", "mean dB", "worst decile", "kernel distance", "over the best",
    )  # fmt: skip
    verdict = (
        f"Taken: {judged[0].ranked.name}, whose {settings['samples']} samples are nearest to the data (kernel distance, 95 % "
        "intervals of the differences). dB: to each profile's own full run, not compared."
    )
    show_verdict(console, columns, rows, left_out, verdict)
    return best
