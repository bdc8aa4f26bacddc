"""The commands that run a model: profile, inspect, run and eval."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SodaprofError
from .shared import (
    Batch,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Prompts,
    Runtime,
    Scale,
    Scheduler,
    Steps,
    check_outputs,
    duration,
    make_console,
    one_of,
    progress,
    say_next,
    size,
)  # fmt: skip


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
    from ..files import refuse_existing

    refuse_existing(output, force, folder=True)
    one_of("--tokens", tokens, ("pooled", "full"))
    from ..compiler import default_policy
    from ..models.load import load_pipeline, read_prompts
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


def inspect(
    model: Model,
    steps: Steps = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")] = None,
    guidance_scale: Scale = None,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show a model's sites, shapes, FLOPs, and what can be pruned; write what compilers need that takes no sampling."""
    from ..files import refuse_existing

    if output is not None:
        refuse_existing(output, force, folder=True)
    from ..cost import save_cost
    from ..models.discover import inspect_pipeline
    from ..models.flops import count_flops
    from ..models.load import default_guidance, default_steps, load_pipeline
    from ..profiler.run import solver_of
    from ..profiles import write_inspection, write_solver
    from ..report.results import inspection_view

    pipe = load_pipeline(model, dtype, device, scheduler)
    scale = default_guidance(pipe) if guidance_scale is None else guidance_scale
    found, sampler, step = inspect_pipeline(pipe, model, default_steps(pipe) if steps is None else steps, scale)
    cost = count_flops(pipe, found, step)
    console = make_console(stderr=as_json)
    if as_json:
        print(json.dumps({"model": found.to_json(), "sampler": sampler.to_json(), "cost": cost.to_json()}))
    else:
        console.print(inspection_view(found, sampler, cost))
    if output is not None:
        write_inspection(output, found, sampler)
        write_solver(output, solver_of(pipe, sampler))
        save_cost(cost, output / "cost.flops.json", force=True)
        console.print(f"Wrote {output}/")
        say_next(console, f"sodaprof compile {output} --policy fora --budget 2.0x -o fora.json")
    elif not as_json:
        say_next(console, f"sodaprof profile {model} -o profile")


def run(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="Picture to write; of a video model .mp4, or some frames."),
    ],
    schedule: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A schedule.  [default: the one beside the weights]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the schedule to take from beside the weights.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text prompt; may be repeated.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="Class label; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture, the next counts on.")] = 0,
    guidance_scale: Scale = None,
    height: Annotated[int | None, typer.Option(help="In pixels, with --width.  [default: the pipeline's]")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, with --height.")] = None,
    allow_resolution: Annotated[
        bool, typer.Option("--allow-resolution", help="Also at another size than profiled, pruning scaled to it.")
    ] = False,
    runtime: Runtime = "hooks",
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Make pictures with a schedule, and say what was planned and executed."""
    from ..files import refuse_existing
    from ..report.pictures import check_picture, save_picture, save_side_by_side, strip
    from ..schedule import load_schedule

    refuse_existing(output, force)
    if output.suffix != ".mp4":
        check_picture(output)
    entries: list[int | str] = [*(prompt or []), *(label or [])]
    if not entries:
        raise SodaprofError("Nothing to draw. Give --label N or --prompt TEXT, once or more.")
    if schedule is not None:
        load_schedule(schedule)  # a broken file is told before a model is loaded
    from ..models.load import call, load_pipeline, makes_video, pictures_of
    from ..report.clips import save_video
    from ..runtime.attach import apply_with
    from ..runtime.shipped import find_shipped

    console = make_console()
    pipe = load_pipeline(model, dtype, device, scheduler)
    schedule = schedule or find_shipped(pipe, steps)
    loaded = load_schedule(schedule)
    if steps not in (None, loaded.steps):
        raise SodaprofError(
            f"{schedule} is for {loaded.steps} steps, not {steps}. Leave --steps out, or name another file."
        )
    pipe.set_progress_bar_config(disable=not console.is_terminal)
    scale = loaded.sampler.guidance_scale if guidance_scale is None else guidance_scale
    if (height is None) != (width is None):
        raise SodaprofError("Give --height and --width together, or neither.")
    if output.suffix == ".mp4" and (len(entries) > 1 or not makes_video(pipe)):
        raise SodaprofError(f"{output}: an mp4 holds one clip. Give one prompt to a video model, or a .png.")
    size_ = None if height is None or width is None else (height, width)
    seeds = [seed + i for i in range(len(entries))]
    with apply_with(pipe, loaded, runtime, allow_resolution=allow_resolution) as handle:
        pictures = pictures_of(call(pipe, entries, seeds, loaded.steps, scale, size=size_))
    if output.suffix == ".mp4":
        save_video(pictures[0], output, force=force)
    elif len(pictures) == 1:
        save_picture(strip(pictures[0]) if pictures.ndim == 5 else pictures[0], output, force=force)
    else:
        names = {f"{e} (seed {seed + i})": pictures[i : i + 1] for i, e in enumerate(entries)}
        save_side_by_side(names, output, force=force)
    console.print(str(handle.report()), highlight=False)
    console.print(f"Wrote {output}")
    say_next(console, f"sodaprof eval {model} {schedule}{'' if scheduler is None else f' --scheduler {scheduler}'}")


def ship(
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule.")],
    folder: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="The pipeline's folder.")],
    force: Force = False,
) -> None:
    """Put a schedule beside a model's weights, where run and apply find it, after checking that it fits."""
    from ..schedule import load_schedule

    loaded = load_schedule(schedule)
    from ..runtime.shipped import ship as ship_schedule

    console = make_console()
    console.print(f"Wrote {ship_schedule(schedule, folder, force=force)}")
    say_next(console, f"sodaprof run {folder} --steps {loaded.steps} -o picture.png --prompt TEXT (or --label N)")


def evaluate_(
    model: Model,
    schedules: Annotated[list[Path], typer.Argument(metavar="FILE...", help="One schedule or more.")],
    samples: Annotated[int, typer.Option(help="Held-out seeds.")] = 64,
    seed: Annotated[int, typer.Option(help="First of them; must keep clear of the profile's.")] = 1_000_000,
    prompts: Prompts = None,
    guidance_scale: Scale = None,
    batch_size: Batch = 16,
    scheduler: Scheduler = None,
    dtype: Dtype = None,
    device: Device = None,
    runtime: Runtime = "hooks",
    controls: Annotated[bool, typer.Option(help="FORA and fewer sampler steps at the same cost.")] = True,
    picture: Annotated[Path | None, typer.Option(help="Write the first pictures side by side.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Add the result to the schedules' `measured`.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result as JSON.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare pictures with and without schedules on the same seeds, beside FORA and fewer steps at the same cost."""
    from dataclasses import replace

    from ..files import write_json
    from ..report.pictures import check_picture, save_side_by_side
    from ..schedule import load_schedule

    check_outputs({"--picture": picture, "--output": output}, force)
    if picture is not None:
        check_picture(picture)
    loaded = [load_schedule(path) for path in schedules]
    from ..evaluation import evaluate, measured_record
    from ..models.load import load_pipeline, read_prompts
    from ..report.results import evaluation_view

    console = make_console(stderr=as_json)
    pipe = load_pipeline(model, dtype, device, scheduler)
    with progress(console, "eval") as on_progress:
        result = evaluate(
            pipe, loaded, samples=samples, seed=seed, prompts=None if prompts is None else read_prompts(prompts),
            batch_size=batch_size, guidance_scale=guidance_scale, controls=controls, runtime=runtime, on_progress=on_progress,
            names=_names(schedules, loaded),
        )  # fmt: skip
    pictures = result.pop("pictures")
    result["command"] = shlex.join(["sodaprof", *sys.argv[1:]])
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
        say_next(console, f"sodaprof show {schedules[0]}")


def _names(paths: list[Path], loaded: list[Any]) -> list[str]:
    """Names the schedules by policy, by file where that is ambiguous."""
    policies = [schedule.policy["name"] for schedule in loaded]
    return [p if policies.count(p) == 1 else path.stem for p, path in zip(policies, paths, strict=True)]
