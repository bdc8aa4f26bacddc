"""`profile`: samples full trajectories once and writes how much error reuse and pruning cause at every site."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, UnsupportedModelError
from ..formats.cost import save_cost
from ..formats.files import digest, read_json, refuse_existing, write_json
from ..formats.profile import Profile, load_profile, write_inspection, write_solver
from ..formats.sampler import OwnUpdate
from ..formats.sites import Sampler
from ..formats.tables import COLUMNS
from ..pipelines.device import device_facts, versions
from ..pipelines.flops import count_flops
from ..pipelines.load import call
from ..pipelines.sampler_steps import own_update
from .plan import RATES, ProfilePlan, plan_profile
from .response import measure_response
from .statistics import Statistics
from .taps import Stopwatch, Taps

FIRST = {"model.json", "sampler.json", "solver.json", "cost.flops.json"}  # written before anything is sampled
STATE_VERSION = 2  # of state.npz
PARTS = FIRST | {"manifest.json"} | {f"{table}.parquet" for table in COLUMNS}


def profile(pipe: Any, folder: str | Path, *, name: str | None = None, force: bool = False, **settings: Any) -> Profile:
    """Profiles `pipe` into `folder` and returns the profile; `settings` are those of `plan_profile`.

    With prompt embeddings, for example: call=lambda entries, generators: pipe(prompt_embeds=embeddings[entries], ...).
    """
    plan = plan_profile(pipe, str(name or pipe.config.get("_name_or_path") or type(pipe).__name__), **settings)
    return run_profile(pipe, plan, folder, force=force)


def run_profile(
    pipe: Any,
    plan: ProfilePlan,
    folder: str | Path,
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Samples the plan's generations and writes the profile to `folder`, which appears only when it is complete.

    Until then everything is in `folder`.partial, saved after every batch; a call with the same plan continues there and
    ends with the same tables, bit for bit. on_progress receives (steps done, steps in all).
    """
    folder = Path(folder)
    refuse_existing(folder, force, folder=True)
    if folder.exists() and (others := sorted({path.name for path in folder.iterdir()} - PARTS)):
        raise FormatError(
            f"{folder}: holds {others[0]}, which is no part of a profile and would be lost. Move it away, or choose another name."
        )
    work = folder.with_name(folder.name + ".partial")
    _open_partial(work, pipe, plan, force)
    sites, grids = (plan.sites, plan.grids) if plan.measures else ([], [])
    statistics = Statistics(sites, plan.steps, plan.ages, plan.branches, RATES, grids, plan.varying, plan.gram())
    watch = Stopwatch(pipe)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    _sample(pipe, plan, statistics, work / "state.npz", watch, on_progress)
    if statistics.gram:
        with watch:
            response = measure_response(pipe, plan)
    seconds = time.perf_counter() - began
    if plan.measures:
        statistics.write_tables(work, plan.model)
    if statistics.gram:
        statistics.gram.write(work, plan.past, statistics.samples, response)
    device = str(plan.device(pipe))
    measured = {
        "seconds": round(seconds, 2),
        "time_over_plain": round(seconds / max(seconds - watch.seconds(), 1e-9), 3),
        "extra_bytes": plan.extra_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if "cuda" in device else None,
        "passes": len(plan.groups),
        "hardware": device_facts(device),
    }
    manifest = plan.request | {"device": device, "versions": versions(), "measured": measured}
    write_json(work / "manifest.json", manifest, force=True)
    (work / "state.npz").unlink(missing_ok=True)
    (work / "request.json").unlink()
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(work, folder)
    return load_profile(folder)


def _sample(
    pipe: Any,
    plan: ProfilePlan,
    statistics: Statistics,
    state: Path,
    watch: Stopwatch,
    on_progress: Callable[[int, int], None],
) -> None:
    """Samples all batches in a pass for each group of sites, continuing from the saved `state`; saves it after each batch."""
    steps, request, samples = plan.steps, plan.request, plan.request["samples"]
    batches = list(product(range(len(plan.groups)), range(0, samples, request["batch_size"])))
    done = statistics.restore(state) if state.exists() else 0
    for number, (group, start) in enumerate(batches[done:], start=done + 1):
        count = min(request["batch_size"], samples - start)
        entries, seeds = plan.generations(start, count)

        def on_step(step: int, before: int = group * samples + start, count: int = count) -> None:
            on_progress(before * steps + step * count, len(plan.groups) * samples * steps)

        with Taps(pipe, plan, plan.groups[group], group == 0, count, statistics, watch, on_step) as taps:
            call(pipe, entries, seeds, steps, request["guidance_scale"], output_type="np", own=plan.own)
        taps.flush()
        if group == 0:
            statistics.samples += count
        statistics.save(state, number)


def solver_of(pipe: Any, sampler: Sampler) -> OwnUpdate | UnsupportedModelError:
    """Returns the steps of the pipeline's scheduler (after a recorded run) as coefficients, or why there are none."""
    try:
        return own_update(pipe.scheduler, sampler.timesteps)
    except UnsupportedModelError as error:
        return error


def _open_partial(work: Path, pipe: Any, plan: ProfilePlan, force: bool) -> None:
    """Creates the working folder, or continues in an existing one of the same request, with its batch size and groups."""
    asked = {key: value for key, value in plan.request.items() if key != "batch_size"}  # which follows from the memory
    parts = {"request": asked, "model": plan.model.to_json(), "sampler": plan.sampler.to_json(), "state": STATE_VERSION}
    mark = digest(parts)
    for leftover in work.glob(".*"):  # files that a killed run had not finished
        leftover.unlink()
    if (work / "request.json").exists():
        found = read_json(work / "request.json")
        if isinstance(found, dict) and found.get("digest") == mark:
            # as at first, even if the free memory has changed
            plan.request["batch_size"], plan.groups = found["batch_size"], found["groups"]
            return
    if work.exists() and not force and not {path.name for path in work.iterdir()} <= FIRST:
        raise FormatError(
            f"{work}: an interrupted profile with other settings is there. Repeat its settings to continue it, or add --force "
            "to start anew."
        )
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_inspection(work, plan.model, plan.sampler)
    write_solver(work, solver_of(pipe, plan.sampler))
    save_cost(count_flops(pipe, plan.model, plan.step), work / "cost.flops.json", force=True)
    write_json(work / "request.json", {"digest": mark, "groups": plan.groups, "batch_size": plan.request["batch_size"]})
