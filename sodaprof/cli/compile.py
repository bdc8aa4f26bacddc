"""`sodaprof compile`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import SodaprofError
from .console import make_console, note_written, print_next, print_wrote, progress, summary
from .options import Cost, Force, MaxCache, check_choice, parse_size, say_entries

BUDGET = "2.0x"  # if none is given and the policy has no released settings


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
        typer.Option(
            help="Speed-up of the denoising loop, or with --cost FILE its time: 2.0x, 50ms.  [default: 2.0x; toca and duca: "
            "their released settings]"
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="A policy: see the list in --help, or docs/policies.md; mix: measure several on the model and take the best.  "
            "[default: solver, or soda if the profile does not allow it]"
        ),
    ] = None,
    cost: Cost = "flops",
    knob: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a setting of the policy; may be repeated.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Fit on this model's calibration generations: update and placement of solver, N of toca and duca, mix's choice.",
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="With --fit: add a fitted update to the schedule of a caching policy.")
    ] = False,
    max_cache: MaxCache = None,
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
        check_choice("--policy", policy, (*POLICIES, "mix"))
    if budget is not None:
        parse_budget(budget, None if cost == "flops" else math.inf)  # a wrong one is reported before a model is loaded
    knobs = dict(_knob(text) for text in knob or [])
    kept = parse_size(max_cache)
    if update and fit is None:
        raise SodaprofError("--update is fitted on the model's own generations. Add --fit MODEL")
    if policy is None:
        policy, why = default_policy(folder)
        if why:
            console.print(f"Policy {policy}: {why}", soft_wrap=True)
    asked: dict[str, Any] = {
        "folder": folder, "budget": budget, "policy": policy, "cost": cost, "knobs": knobs, "max_cache": kept
    }  # fmt: skip
    if fit is None:
        schedule = compile_schedule(**asked)
    elif policy == "mix":
        if knobs or update:
            raise SodaprofError(
                "Policy mix takes every policy as it is, with an update and without. Leave --knob and --update out, or name "
                "one policy: --policy drift --update"
            )
        schedule = _mix(console, fit, asked)
    else:
        schedule = _fit(console, fit, asked, update or POLICIES[policy].fits_update)
    schedule.save(output, force=force)
    note_written(output)
    predicted = schedule.predicted or {}
    error = "" if predicted["error"] is None else f", predicted error {predicted['error']:.4g}"
    console.print(f"{policy}: {predicted['speedup']:.3f}x {predicted['unit']} predicted{error}; {summary(schedule)}")
    print_wrote(console, output)
    print_next(console, f"sodaprof show {output}")


def _knob(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise SodaprofError(f"--knob {text!r}; expected NAME=VALUE, as in --knob uas=paper")
    return name, value


def _fit(console: Any, model: str, asked: dict[str, Any], update: bool) -> Any:
    """Returns the policy's schedule with what is fitted on the model: N of toca and duca, the update's coefficients."""
    from ..compiler import compile_schedule
    from ..compiler.policies import RELEASED
    from ..formats.cost import cost_of
    from ..formats.profile import load_profile
    from ..tuning.candidates import choose_period, fit_to_model

    choose = asked["policy"] in RELEASED and "N" not in asked["knobs"]
    if not (update or choose):
        raise SodaprofError(
            f"--fit finds nothing to fit for --policy {asked['policy']}. Add --update, or leave --fit out."
        )
    schedule: Any = None if choose else compile_schedule(**asked, updated=update)
    pipe = _load(console, model, asked["folder"])
    if choose:
        with progress(console, "fit") as on_progress:
            tried = choose_period(
                pipe, **asked | {"budget": asked["budget"] or BUDGET}, updated=update, on_progress=on_progress
            )
        console.print("PSNR on calibration seeds: " + ", ".join(f"{one.name} {one.score:.1f} dB" for one in tried))
        schedule = tried[0].schedule
    if not update:
        return schedule
    profile, table = load_profile(asked["folder"]), cost_of(asked["folder"], asked["cost"])
    with progress(console, "update") as on_progress:
        fitted, distances = fit_to_model(pipe, profile, schedule, table, on_progress=on_progress)
    of: Any = fitted.update.fitted if fitted.update else {}
    how = "The open loop is best" if of["loop"] == "open" else "Best of the fits" if "error" in of else "Fitted"
    compared = of.get("error", "the last latents, signal to error")
    console.print(
        f"{how} on {len(distances)} calibration generations: mean {distances.mean():.1f} dB, worst {distances.min():.1f} dB "
        f"({compared})"
    )
    return fitted


def _mix(console: Any, model: str, asked: dict[str, Any]) -> Any:
    from ..report.results import candidates_view
    from ..tuning.candidates import mix

    pipe = _load(console, model, asked["folder"])
    with progress(console, "mix") as on_progress:
        schedule, measured, left_out = mix(
            pipe, asked["folder"], asked["budget"] or BUDGET, asked["cost"], max_cache=asked["max_cache"],
            on_progress=on_progress,
        )  # fmt: skip
    console.print(candidates_view([(one.name, one.schedule, one.figures(), one.score) for one in measured]))
    for name, reason in left_out.items():
        console.print(f"Left out: {name}. {reason}", soft_wrap=True)
    console.print(
        f"Taken: {measured[0].name}. dB: signal to error of the last latents on {len(measured[0].distances)} calibration "
        "generations."
    )
    return schedule


def _load(console: Any, model: str, folder: Path) -> Any:
    """Returns the pipeline to fit on, with the sampler that the profile was made with."""
    from ..formats.profile import load_profile
    from ..pipelines.load import load_pipeline
    from ..runtime.sampler.scheduler import scheduler_of

    profile = load_profile(folder)
    sampler, pipe = profile.sampler, load_pipeline(model)
    say_entries(console, pipe, (profile.manifest["prompts"], "the profile"))
    own = type(pipe.scheduler).__name__
    if own != sampler.class_name:
        console.print(f"Sampled by {sampler.class_name}, as the profile was, instead of {own}")
        pipe.scheduler = scheduler_of(sampler)
    return pipe
