"""The command line: profile, compile, show, run, eval, inspect. Errors become one message and an exit code.

Exit codes: 0 done, 1 an error that sodaprof understands, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import SodaprofError
from .version import __version__

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="sodaprof", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Profile a diffusion transformer once, compile a schedule for the speed-up you want, run it.",
    epilog="Start: sodaprof profile tiny-dit -o profile --samples 16",
)  # fmt: skip

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A pipeline folder, a shipped reference model, or a hub id a/b.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …  [default: cuda where there is one]")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16  [default: float32 on a CPU, else bfloat16]")
]
Scale = Annotated[float | None, typer.Option("--guidance-scale", help="[default: the pipeline's, or the schedule's]")]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="One prompt or label a line, or a shipped list: text-to-image.  [default: by model]",
    ),
]
Batch = Annotated[int, typer.Option(help="Generations at once.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]


def version(value: bool) -> None:
    if value:
        print(f"sodaprof {__version__}")
        raise typer.Exit


@app.callback()
def options(show_version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False) -> None:
    pass


@app.command(epilog="Example: sodaprof profile tiny-dit -o profile --samples 16")
def profile(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")],
    steps: Steps = 50,
    samples: Annotated[int, typer.Option(help="Generations to average over.")] = 100,
    prompts: Prompts = None,
    guidance_scale: Scale = None,
    max_interval: Annotated[int, typer.Option(help="Longest cache interval; ages 1 to this minus 1 are measured.")] = 8,
    batch_size: Batch = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first generation.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Measure what every step, layer and module suffers when its result is reused or pruned."""
    from .files import refuse_existing

    refuse_existing(output, force)
    from .models.load import load_pipeline, read_prompts
    from .profiler.plan import plan_profile
    from .profiler.run import run_profile

    console = _console()
    entries = None if prompts is None else read_prompts(prompts)
    pipe = load_pipeline(model, dtype, device)
    plan = plan_profile(
        pipe, model, steps=steps, samples=samples, prompts=entries, guidance_scale=guidance_scale,
        max_interval=max_interval, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    console.print(
        f"{len(plan.sites)} sites, {steps} steps, {samples} generations in {len(plan.groups)} pass(es): "
        f"{plan.extra_bytes / 2**20:.0f} MiB of extra memory, about {plan.disk_bytes / 2**20:.1f} MiB on disk, "
        f"about {_duration(plan.seconds)}"
    )
    with _progress(console, "profile") as on_progress:
        found = run_profile(pipe, plan, output, force=force, on_progress=on_progress)
    taken = found.manifest["measured"]
    size = sum(f.stat().st_size for f in output.iterdir())
    console.print(
        f"Took {_duration(taken['seconds'])}, {taken['time_over_plain']:.2f}x plain sampling. "
        f"Wrote {output}/ ({size / 2**20:.2f} MiB)"
    )
    _next(console, f"sodaprof compile {output} --budget 2.0x -o schedule.json")


@app.command("compile", epilog="Example: sodaprof compile profile --budget 2.0x -o schedule.json")
def compile_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `sodaprof profile` or `inspect` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Schedule to write.")],
    budget: Annotated[
        str | None,
        typer.Option(help="Speed-up of the denoising loop.  [default: 2.0x; toca and duca: their released settings]"),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="soda, fora, toca or duca (this release compiles the last two, but does not run them).")
    ] = "soda",
    cost: Annotated[str, typer.Option(help="flops, or a cost.json of measured milliseconds.")] = "flops",
    knob: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a setting of the policy; may be repeated.")
    ] = None,
    force: Force = False,
) -> None:
    """Compile a schedule for the speed-up you ask for. Needs no GPU and no model."""
    from .compiler import compile_schedule
    from .files import refuse_existing

    refuse_existing(output, force)
    knobs = dict(_knob(text) for text in knob or [])
    schedule = compile_schedule(folder, budget, policy, cost, knobs)
    schedule.save(output, force=force)
    console, predicted = _console(), schedule.predicted or {}
    anchors = len(next(iter(schedule.transformers.values())).anchors())
    error = "" if predicted["error"] is None else f", predicted error {predicted['error']:.4g}"
    console.print(
        f"{policy}: {predicted['speedup']:.3f}x {predicted['unit']} predicted{error}; {anchors} anchors of "
        f"{schedule.steps}, {schedule.counts()['P']} pruned cells, {predicted['cache_bytes'] / 2**20:.2f} MiB of cache "
        "a generation"
    )
    console.print(f"Wrote {output}")
    _next(console, f"sodaprof show {output}")


@app.command(epilog="Example: sodaprof show schedule.json")
def show(
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule.")],
    as_json: Json = False,
) -> None:
    """Draw a schedule: the picture, the cache intervals, the prune rates."""
    from .report.schedules import schedule_data, schedule_view
    from .schedule import load_schedule

    loaded = load_schedule(schedule)
    if as_json:
        print(json.dumps(schedule_data(loaded)))
    else:
        console = _console()
        console.print(schedule_view(loaded, console.width))


@app.command(epilog="Example: sodaprof run tiny-dit schedule.json --label 5 --label 7 -o star-and-heart.png")
def run(
    model: Model,
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Picture to write.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text prompt; may be repeated.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="Class label; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture, the next counts on.")] = 0,
    guidance_scale: Scale = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Make pictures with a schedule, and say what was planned and executed."""
    from .files import refuse_existing
    from .schedule import load_schedule

    refuse_existing(output, force)
    entries: list[int | str] = [*(prompt or []), *(label or [])]
    if not entries:
        raise SodaprofError("Nothing to draw. Give --label N or --prompt TEXT, once or more.")
    loaded = load_schedule(schedule)
    from .models.load import call, load_pipeline, pictures_of
    from .report.pictures import save_picture, save_side_by_side
    from .runtime.attach import apply

    console = _console()
    pipe = load_pipeline(model, dtype, device)
    pipe.set_progress_bar_config(disable=not console.is_terminal)
    scale = loaded.sampler.guidance_scale if guidance_scale is None else guidance_scale
    with apply(pipe, loaded) as handle:
        pictures = pictures_of(call(pipe, entries, [seed + i for i in range(len(entries))], loaded.steps, scale))
    if len(pictures) == 1:
        save_picture(pictures[0], output, force=force)
    else:
        names = {f"{e} (seed {seed + i})": pictures[i : i + 1] for i, e in enumerate(entries)}
        save_side_by_side(names, output, force=force)
    console.print(str(handle.report()), highlight=False)
    console.print(f"Wrote {output}")
    _next(console, f"sodaprof eval {model} {schedule}")


@app.command("eval", epilog="Example: sodaprof eval tiny-dit schedule.json --samples 64 --picture side-by-side.png")
def evaluate_(
    model: Model,
    schedules: Annotated[list[Path], typer.Argument(metavar="FILE...", help="One schedule or more.")],
    samples: Annotated[int, typer.Option(help="Held-out seeds.")] = 64,
    seed: Annotated[int, typer.Option(help="First of them; must keep clear of the profile's.")] = 1_000_000,
    prompts: Prompts = None,
    guidance_scale: Scale = None,
    batch_size: Batch = 16,
    dtype: Dtype = None,
    device: Device = None,
    controls: Annotated[bool, typer.Option(help="FORA and fewer sampler steps at the same cost.")] = True,
    picture: Annotated[Path | None, typer.Option(help="Write the first pictures side by side.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Add the result to the schedules' `measured`.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result as JSON.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare pictures with and without schedules on the same seeds, beside FORA and fewer steps at the same cost."""
    from dataclasses import replace

    from .files import refuse_existing, write_json
    from .schedule import load_schedule

    for path in (picture, output):
        if path is not None:
            refuse_existing(path, force)
    loaded = [load_schedule(path) for path in schedules]
    from .evaluation import evaluate, measured_record
    from .models.load import load_pipeline, read_prompts
    from .report.pictures import save_side_by_side
    from .report.results import evaluation_view

    console = _console(stderr=as_json)
    pipe = load_pipeline(model, dtype, device)
    with _progress(console, "eval") as on_progress:
        result = evaluate(
            pipe, loaded, samples=samples, seed=seed, prompts=None if prompts is None else read_prompts(prompts),
            batch_size=batch_size, guidance_scale=guidance_scale, controls=controls, on_progress=on_progress,
            names=_names(schedules, loaded),
        )  # fmt: skip
    pictures = result.pop("pictures")
    if as_json:
        print(json.dumps(result))
    else:
        console.print(evaluation_view(result))
    if output is not None:
        write_json(output, result, force=force)
        console.print(f"Wrote {output}")
    if picture is not None:
        save_side_by_side(pictures, picture, force=force)
        console.print(f"Wrote {picture}")
    if record:
        for path, schedule, row in zip(schedules, loaded, result["rows"], strict=False):
            new = replace(schedule, measured=(*schedule.measured, measured_record(result, row)))
            new.save(path, force=True)
            console.print(f"Recorded in {path}")
    if output is not None or picture is not None or record:
        _next(console, f"sodaprof show {schedules[0]}")


@app.command(epilog="Example: sodaprof inspect tiny-dit --steps 50 -o inspected")
def inspect(
    model: Model,
    steps: Steps = 50,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")] = None,
    guidance_scale: Scale = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show a model's sites, shapes, FLOPs, and what can be pruned; write what compilers need that takes no sampling."""
    from .files import refuse_existing

    if output is not None:
        refuse_existing(output, force)
    from .cost import save_cost
    from .models.discover import inspect_pipeline
    from .models.flops import count_flops
    from .models.load import default_guidance, load_pipeline
    from .profiler.run import write_inspection
    from .report.results import inspection_view

    pipe = load_pipeline(model, dtype, device)
    scale = default_guidance(pipe) if guidance_scale is None else guidance_scale
    found, sampler, step = inspect_pipeline(pipe, model, steps, scale)
    cost = count_flops(pipe, found, step)
    console = _console(stderr=as_json)
    if as_json:
        print(json.dumps({"model": found.to_json(), "sampler": sampler.to_json(), "cost": cost.to_json()}))
    else:
        console.print(inspection_view(found, sampler, cost))
    if output is not None:
        write_inspection(output, found, sampler)
        save_cost(cost, output / "cost.flops.json", force=True)
        console.print(f"Wrote {output}/")
        _next(console, f"sodaprof compile {output} --policy fora --budget 2.0x -o fora.json")
    elif not as_json:
        _next(console, f"sodaprof profile {model} -o profile")


def main() -> None:
    """Runs the command line; every error that sodaprof understands ends in one message, without a traceback."""
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
    except SodaprofError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = _fail("Interrupted. A profile goes on when the same command is repeated; nothing else was written.", 130)
    except MemoryError:
        code = _fail("Out of memory. Lower --batch-size.")
    except OSError as error:
        reason = "The disk is full" if error.errno == errno.ENOSPC else f"{error.strerror or error}"
        code = _fail(f"{reason}{f' ({error.filename})' if error.filename else ''}. Nothing was left half-written.")
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            print(f"sodaprof: {error.format_message()} See: sodaprof --help", file=sys.stderr)
            code = error.exit_code
        elif type(error).__name__ == "OutOfMemoryError":
            code = _fail("The GPU is out of memory. Lower --batch-size.")
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 1) -> int:
    print(f"sodaprof: {message}", file=sys.stderr)
    return code


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def _next(console: Console, command: str) -> None:
    console.print(f"Next: [bold]{command}[/]", soft_wrap=True)


@contextmanager
def _progress(console: Console, title: str) -> Any:
    """Yields a callback (done, total) that moves a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        update: Callable[[int, int], None] = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        yield update


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _knob(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise SodaprofError(f"--knob {text!r}; expected NAME=VALUE, as in --knob uas=paper")
    return name, value


def _names(paths: list[Path], loaded: list[Any]) -> list[str]:
    """Names the schedules by policy, by file where that is ambiguous."""
    policies = [schedule.policy["name"] for schedule in loaded]
    return [p if policies.count(p) == 1 else path.stem for p, path in zip(policies, paths, strict=True)]
