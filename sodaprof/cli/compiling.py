"""The commands that need no model: compile and show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SodaprofError
from .shared import Force, Json, make_console, progress, say_next


def compile_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `sodaprof profile` or `inspect` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Schedule to write.")],
    budget: Annotated[
        str | None,
        typer.Option(help="Speed-up of the denoising loop.  [default: 2.0x; toca and duca: their released settings]"),
    ] = None,
    policy: Annotated[str, typer.Option(help="soda, fora, toca or duca.")] = "soda",
    cost: Annotated[str, typer.Option(help="flops, or a cost.json of measured milliseconds.")] = "flops",
    knob: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a setting of the policy; may be repeated.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="toca, duca: choose N in 2…8 by the calibration pictures of this model."),
    ] = None,
    force: Force = False,
) -> None:
    """Compile a schedule for the speed-up you ask for. Needs no GPU, and without --fit no model."""
    from ..compiler import compile_schedule
    from ..files import refuse_existing

    refuse_existing(output, force)
    knobs = dict(_knob(text) for text in knob or [])
    console = make_console()
    if fit is None:
        schedule = compile_schedule(folder, budget, policy, cost, knobs)
    else:
        schedule, tried = _fit(console, fit, folder, budget, policy, cost, knobs)
        console.print("PSNR on calibration seeds: " + ", ".join(f"N={t['N']} {t['psnr_db']:.1f} dB" for t in tried))
    schedule.save(output, force=force)
    predicted = schedule.predicted or {}
    anchors = len(schedule.anchors())
    error = "" if predicted["error"] is None else f", predicted error {predicted['error']:.4g}"
    console.print(
        f"{policy}: {predicted['speedup']:.3f}x {predicted['unit']} predicted{error}; {anchors} anchors of "
        f"{schedule.steps}, {schedule.counts()['P']} pruned cells, {predicted['cache_bytes'] / 2**20:.2f} MiB of cache "
        "a generation"
    )
    console.print(f"Wrote {output}")
    say_next(console, f"sodaprof show {output}")


def _fit(console: Any, model: str, folder: Path, budget: str | None, policy: str, cost: str, knobs: Any) -> Any:
    from ..fit import fit_schedule
    from ..models.load import load_pipeline

    pipe = load_pipeline(model)
    with progress(console, "fit") as on_progress:
        return fit_schedule(pipe, folder, budget or "2.0x", policy, cost, knobs, on_progress)


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
