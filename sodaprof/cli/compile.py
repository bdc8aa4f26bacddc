"""The commands that make schedules without a search, and show them: compile and show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import SodaprofError
from .options import Force, make_console, one_of, parse_size, progress, say_next, show_verdict, told


class CompileCommand(TyperCommand):
    """Prints the policies of the registry with the help, which alone needs them."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        from ..compiler.policies import POLICIES

        super().format_options(ctx, formatter)
        with formatter.section("Policies, by what happens between full steps"):
            formatter.write_dl([(name, policy.help) for name, policy in POLICIES.items()])


def compile_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `sodaprof profile` or `inspect` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Schedule to write.")],
    budget: Annotated[
        str | None,
        typer.Option(help="Speed-up of the denoising loop.  [default: 2.0x; toca and duca: their released settings]"),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="A policy of the list below; mix: measure several on the model and take the best.  [default: solver, or soda "
            "if the profile does not allow it]"
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
            help="Fit on the calibration generations of this model: the update's coefficients closed loop, N of toca and duca; "
            "measure the candidates of mix.",
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
    from ..compiler import compile_schedule, default_policy, parse_budget
    from ..compiler.policies import POLICIES, current_name
    from ..formats.files import refuse_existing

    refuse_existing(output, force)
    console = make_console()
    if policy is not None:
        policy, note = current_name(policy)
        if note:
            console.print(note)
        one_of("--policy", policy, (*POLICIES, "mix"))
    if budget is not None:
        parse_budget(budget)  # told before a model is loaded
    knobs = dict(_knob(text) for text in knob or [])
    most = None if max_cache is None else parse_size(max_cache)
    if update and fit is None:
        raise SodaprofError("--update is fitted on the model's own pictures. Add --fit MODEL")
    if policy is None:
        policy, why = default_policy(folder)
        if why:
            console.print(f"Policy {policy}: {why}")
    if fit is None:
        schedule = compile_schedule(folder, budget, policy, cost, knobs, most)
    elif policy == "mix":
        if knobs or update:
            raise SodaprofError(
                "Policy mix takes every policy as it is, with an update and without. Leave --knob and --update out, or name "
                "one policy: --policy drift --update"
            )
        schedule = _mix(console, fit, folder, budget or "2.0x", cost, most)
    else:
        schedule = _fitted(
            console, fit, folder, budget, policy, cost, knobs, most, update or POLICIES[policy].fits_update
        )
    _write(console, policy, schedule, output, force)


def _fitted(
    console: Any, model: str, folder: Path, budget: str | None, policy: str, cost: str, knobs: dict[str, Any],
    most: int | None, updated: bool,
) -> Any:  # fmt: skip
    """Returns the policy's schedule with what the model settles: N of toca and duca, and an update's coefficients."""
    from ..compiler import compile_schedule
    from ..compiler.policies import RELEASED

    open_period = policy in RELEASED and "N" not in knobs
    if not (updated or open_period):
        raise SodaprofError(f"--fit finds nothing to fit for --policy {policy}. Add --update, or leave --fit out.")
    if open_period:
        pipe = _load(console, model, folder)
        schedule = _choose_period(console, pipe, folder, budget or "2.0x", policy, cost, knobs, most, updated)
    else:
        schedule = compile_schedule(folder, budget, policy, cost, knobs, most, updated)
        pipe = _load(console, model, folder)
    return _fit_update(console, pipe, folder, schedule, cost) if updated else schedule


def _write(console: Any, policy: str, schedule: Any, output: Path, force: bool) -> None:
    schedule.save(output, force=force)
    predicted = schedule.predicted or {}
    error = "" if predicted["error"] is None else f", predicted error {predicted['error']:.4g}"
    console.print(
        f"{policy}: {predicted['speedup']:.3f}x {predicted['unit']} predicted{error}; {told(schedule)}, "
        f"{predicted['cache_bytes'] / 2**20:.2f} MiB of cache a generation"
    )
    console.print(f"Wrote {output}")
    say_next(console, f"sodaprof show {output}")


def _load(console: Any, model: str, folder: Path) -> Any:
    """Returns the pipeline, with the sampler that the profile was made with."""
    from ..formats.profile import load_inspection
    from ..pipelines.load import load_pipeline
    from ..runtime.sampler.scheduler import scheduler_of

    sampler, pipe = load_inspection(folder).sampler, load_pipeline(model)
    if type(pipe.scheduler).__name__ != sampler.class_name:
        console.print(f"Sampled by {sampler.class_name}, as the profile was, not by {type(pipe.scheduler).__name__}")
        pipe.scheduler = scheduler_of(sampler)
    return pipe


def _mix(console: Any, model: str, folder: Path, budget: str, cost: str, most: int | None) -> Any:
    from ..tuning.candidates import mix

    pipe = _load(console, model, folder)
    with progress(console, "mix") as on_progress:
        schedule, weighed, left_out = mix(pipe, folder, budget, cost, max_cache=most, on_progress=on_progress)
    rows = []
    for one in weighed:
        predicted, figures = one.schedule.predicted or {}, one.figures()
        rows.append((
            one.name, str(len(one.schedule.anchors())), f"{predicted['speedup']:.3f}x", f"{predicted['cache_bytes'] / 2**20:.2f}",
            f"{figures['mean_db']:.2f}", f"{figures['worst_decile_db']:.2f}", f"{one.score:.2f}",
        ))  # fmt: skip
    columns = ("candidate", "full steps", "speed-up", "MiB", "mean dB", "worst decile dB", "both")
    verdict = (
        f"Taken: {weighed[0].name}. dB of the last latents to their error, {len(weighed[0].distances)} calibration "
        "generations, under the accelerated loop"
    )
    show_verdict(console, columns, rows, left_out, verdict)
    return schedule


def _choose_period(
    console: Any, pipe: Any, folder: Path, budget: str, policy: str, cost: str, knobs: Any, most: int | None,
    updated: bool,
) -> Any:  # fmt: skip
    from ..tuning.fit import fit_schedule

    with progress(console, "fit") as on_progress:
        schedule, tried = fit_schedule(pipe, folder, budget, policy, cost, knobs, on_progress, most, updated)
    console.print("PSNR on calibration seeds: " + ", ".join(f"N={t['N']} {t['psnr_db']:.1f} dB" for t in tried))
    return schedule


def _fit_update(console: Any, pipe: Any, folder: Path, schedule: Any, cost: str) -> Any:
    from ..formats.cost import cost_of
    from ..formats.profile import load_profile
    from ..tuning.closed_loop import fit_to_model

    profile, table = load_profile(folder), cost_of(folder, cost)
    with progress(console, "update") as on_progress:
        fitted, distances = fit_to_model(pipe, profile, schedule, table, on_progress=on_progress)
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
