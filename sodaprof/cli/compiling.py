"""The commands that make schedules, and show: compile and refine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SodaprofError
from .shared import Device, Dtype, Force, Json, Model, Prompts, make_console, progress, say_next


def compile_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `sodaprof profile` or `inspect` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Schedule to write.")],
    budget: Annotated[
        str | None,
        typer.Option(help="Speed-up of the denoising loop.  [default: 2.0x; toca and duca: their released settings]"),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="solver, soda, fora, toca, duca, fit, drift, taylor, dpcache, magcache, smoothcache.  [default: solver, "
            "soda where the profile cannot carry it]"
        ),
    ] = None,
    cost: Annotated[str, typer.Option(help="flops, or a cost.json of measured milliseconds.")] = "flops",
    knob: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a setting of the policy; may be repeated.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Fit on the calibration generations of this model: the update's coefficients closed loop, N of toca and duca.",
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="With --fit: give the schedule of a caching policy a fitted update, too.")
    ] = False,
    max_cache: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most that the caches of a generation may take: 2GB, 500MB.")
    ] = None,
    force: Force = False,
) -> None:
    """Compile a schedule for the speed-up you ask for. Needs no GPU, and without --fit no model."""
    from ..compiler import RELEASED, compile_schedule, default_policy
    from ..cost import cost_of
    from ..files import refuse_existing

    refuse_existing(output, force)
    if update and fit is None:
        raise SodaprofError("--update is fitted on the model's own pictures. Add --fit MODEL")
    knobs = dict(_knob(text) for text in knob or [])
    most = None if max_cache is None else parse_size(max_cache)
    console = make_console()
    if policy is None:
        policy, why = default_policy(folder)
        if why:
            console.print(f"Policy {policy}: {why}")
    if fit is None:
        schedule = compile_schedule(folder, budget, policy, cost, knobs, most)
    else:
        from ..models.load import load_pipeline

        updated = update or policy == "solver"
        pipe = load_pipeline(fit)
        if policy in RELEASED and "N" not in knobs:
            schedule, tried = _fit(console, pipe, folder, budget, policy, cost, knobs)
            console.print("PSNR on calibration seeds: " + ", ".join(f"N={t['N']} {t['psnr_db']:.1f} dB" for t in tried))
        elif not updated:
            raise SodaprofError(f"--fit finds nothing to fit for --policy {policy}. Add --update, or leave --fit out.")
        else:
            schedule = compile_schedule(folder, budget, policy, cost, knobs, most)
        if updated:
            schedule = _fit_update(console, pipe, folder, schedule, cost_of(folder, cost))
    schedule.save(output, force=force)
    predicted = schedule.predicted or {}
    error = "" if predicted["error"] is None else f", predicted error {predicted['error']:.4g}"
    console.print(
        f"{policy}: {predicted['speedup']:.3f}x {predicted['unit']} predicted{error}; {_told(schedule)}, "
        f"{predicted['cache_bytes'] / 2**20:.2f} MiB of cache a generation"
    )
    console.print(f"Wrote {output}")
    say_next(console, f"sodaprof show {output}")


def refine_(
    model: Model,
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="The schedule to begin with.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The best one found, at any time.")],
    time: Annotated[str | None, typer.Option(metavar="SPAN", help="Search for so long: 90s, 5m, 1h.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="End after so many candidates: reproducible.")] = None,
    samples: Annotated[
        int, typer.Option(help="Calibration generations: three quarters to search on, the rest to validate.")
    ] = 24,
    seed: Annotated[int, typer.Option(help="Of the sequence of candidates.")] = 0,
    prompts: Prompts = None,
    cost: Annotated[str, typer.Option(help="What the budget is counted in: flops, or a cost.json.")] = "flops",
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Search full steps and what stands between them on the final error of the model's own pictures."""
    from ..cost import load_cost
    from ..schedule import load_schedule

    first = load_schedule(schedule)
    seconds = None if time is None else parse_span(time)
    from ..models.load import load_pipeline, read_prompts
    from ..refine import refine

    console = make_console()
    pipe = load_pipeline(model, dtype, device)
    with progress(console, "refine") as on_progress:

        def show_scores(done: int, search: float, held: float) -> None:
            on_progress(done, evaluations)
            scores.update({"search": search, "validation": held})

        scores: dict[str, float] = {}
        best = refine(
            pipe, first, output, seconds=seconds, evaluations=evaluations, samples=samples, seed=seed, force=force,
            prompts=None if prompts is None else read_prompts(prompts), cost=None if cost == "flops" else load_cost(cost),
            on_progress=show_scores,
        )  # fmt: skip
    done = best.policy["knobs"]["refined"]
    console.print(
        f"{scores['search']:.2f} dB on the search generations, {scores['validation']:.2f} dB on the validation ones (mean and "
        f"worst decile of the latents' signal to error); best found at candidate {done}; {_told(best)}"
    )
    console.print(f"Wrote {output}")
    say_next(console, f"sodaprof eval {model} {output}")


def _told(schedule: Any) -> str:
    """Returns in a few words what a schedule does."""
    counts = schedule.counts()
    parts = [f"{len(schedule.anchors())} full steps of {schedule.steps}"]
    parts += [
        f"{counts[action]} {name} cells" for action, name in (("P", "pruned"), ("F", "forecast")) if counts[action]
    ]
    if schedule.update is not None:
        parts.append(f"update fitted {schedule.update.fitted.get('loop', '')} loop")
    return ", ".join(parts)


def parse_size(text: str) -> int:
    """Returns the bytes that 2GB or 500MB says; SodaprofError for anything else."""
    return int(_with_unit(text, {"KB": 10**3, "MB": 10**6, "GB": 10**9}, "--max-cache", "2GB"))


def parse_span(text: str) -> float:
    """Returns the seconds that 90s, 5m or 1h says; SodaprofError for anything else."""
    return _with_unit(text, {"S": 1, "M": 60, "H": 3600}, "--time", "5m")


def _with_unit(text: str, units: dict[str, int], option: str, example: str) -> float:
    for unit, factor in units.items():
        number = text.strip().upper().removesuffix(unit)
        if text.strip().upper().endswith(unit):
            try:
                if float(number) > 0:
                    return float(number) * factor
            except ValueError:
                break
    raise SodaprofError(f"{option} is {text!r}; expected a number above 0 with its unit, as in {option} {example}")


def _fit(console: Any, pipe: Any, folder: Path, budget: str | None, policy: str, cost: str, knobs: Any) -> Any:
    from ..fit import fit_schedule

    with progress(console, "fit") as on_progress:
        return fit_schedule(pipe, folder, budget or "2.0x", policy, cost, knobs, on_progress)


def _fit_update(console: Any, pipe: Any, folder: Path, schedule: Any, cost: Any) -> Any:
    from ..closed_loop import fit_to_model
    from ..profiles import load_profile

    with progress(console, "update") as on_progress:
        fitted, distances = fit_to_model(pipe, load_profile(folder), schedule, cost, on_progress=on_progress)
    console.print(
        f"Fitted on {len(distances)} calibration generations: last latents {distances.mean():.1f} dB above their error, the "
        f"worst {distances.min():.1f} dB"
    )
    return fitted


def _knob(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise SodaprofError(f"--knob {text!r}; expected NAME=VALUE, as in --knob uas=paper")
    return name, value


def show(
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule.")],
    as_json: Json = False,
) -> None:
    """Draw a schedule: the picture, the cache intervals, the prune rates."""
    from ..report.schedules import schedule_data, schedule_view
    from ..schedule import load_schedule

    loaded = load_schedule(schedule)
    if as_json:
        print(json.dumps(schedule_data(loaded)))
    else:
        console = make_console()
        console.print(schedule_view(loaded, console.width))
