"""`profile`: samples full trajectories once and writes how much error reuse and pruning cause at every site."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, UnsupportedModelError
from ..formats.cost import save_cost
from ..formats.disk import locked
from ..formats.files import PositiveInt, Record, decode, digest, read_json, refuse_existing, write_json
from ..formats.profile import Profile, load_profile, write_inspection, write_solver
from ..formats.sampler import OwnUpdate
from ..formats.sites import Sampler
from ..formats.tables import COLUMNS, table_digest
from ..pipelines.device import device_facts, versions
from ..pipelines.finite import not_finite
from ..pipelines.flops import count_flops
from ..pipelines.load import call
from ..pipelines.sampler_steps import own_update
from .plan import RATES, ProfilePlan, plan_profile
from .response import measure_response
from .statistics import Statistics
from .taps import Stopwatch, Taps

FIRST = {"model.json", "sampler.json", "solver.json", "cost.flops.json"}  # written before anything is sampled
STATE_VERSION = 3  # of state.npz
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
    _replaced(folder, force)  # ahead of the lock, which makes a folder
    work = folder.with_name(folder.name + ".partial")
    if os.path.lexists(work) and (work.is_symlink() or not work.is_dir()):
        raise FormatError(f"{work}: is a link or no folder; an unfinished profile is kept there. Move it away.")
    with locked(work, folder=True):
        _restore_replaced(folder)
        found = _replaced(folder, force)
        if not _is_complete(work, plan):
            _open_partial(work, pipe, plan, force)
            _fill(pipe, plan, work, on_progress)
        _publish(work, folder, found)
    return load_profile(folder)


def _replaced(folder: Path, force: bool) -> os.stat_result | None:
    """Returns what identifies the older profile that is to be replaced, None if there is none.

    Raises FormatError if it may not be replaced, or holds what is no part of a profile.
    """
    refuse_existing(folder, force, folder=True)
    if not folder.exists():
        return None
    if others := _others(folder):
        raise FormatError(
            f"{folder}: holds {others[0]}, which is no part of a profile and would be lost. Move it away, or choose another name."
        )
    return folder.stat()


def _others(folder: Path) -> list[str]:
    """Returns what is no part of a profile in a folder: other names, and whatever is no regular file."""
    found = [
        path.name for path in folder.iterdir() if path.name not in PARTS or path.is_symlink() or not path.is_file()
    ]
    return sorted(found)


def _publish(work: Path, folder: Path, found: os.stat_result | None) -> None:
    """Renames the complete `work` to `folder`, in place of the older profile `found`.

    FormatError if anything else is there by now: it is left as it is.
    """
    if not os.path.lexists(folder):
        os.rename(work, folder)
        return
    if found is None or not os.path.samestat(found, folder.stat()) or _others(folder):
        raise FormatError(
            f"{folder}: has appeared or changed while the profile was made, and is left as it is. Move it away, then repeat "
            f"the same command, which takes the complete profile from {work}."
        )
    aside = _aside(folder)
    os.rename(folder, aside)
    os.rename(work, folder)
    shutil.rmtree(aside)


def _aside(folder: Path) -> Path:
    """Returns where an older profile is while the new one takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def _begins_with(work: Path, plan: ProfilePlan) -> bool:
    """Whether a run of this plan was killed in the folder before its request was written."""
    try:
        return digest(read_json(work / "model.json")) == digest(plan.model.to_json())
    except FormatError:
        return False


def _restore_replaced(folder: Path) -> None:
    """Completes what a run left that was killed between the renames: the older profile goes, or comes back."""
    aside = _aside(folder)
    if aside.exists() and (others := _others(aside)):
        raise FormatError(f"{aside}: holds {others[0]}, which is no part of a profile. Move it away.")
    if aside.exists() and folder.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        os.rename(aside, folder)


def _is_complete(work: Path, plan: ProfilePlan) -> bool:
    """Whether the working folder holds the whole profile of this plan, which only had to be renamed."""
    if (work / "request.json").exists() or not (work / "manifest.json").exists():
        return False
    left_out = ("batch_size", "device", "versions", "measured", "digests")
    wanted = {key: value for key, value in plan.request.items() if key not in left_out}
    try:
        profile = load_profile(work)
    except FormatError:
        return False  # `_open_partial` refuses it
    same = {key: value for key, value in profile.manifest.items() if key not in left_out} == wanted
    return same and (profile.model, profile.sampler) == (plan.model, plan.sampler)


def _fill(pipe: Any, plan: ProfilePlan, work: Path, on_progress: Callable[[int, int], None]) -> None:
    """Samples the plan's generations, and writes tables and manifest to the working folder."""
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
    digests = {table: table_digest(work, table) for table in plan.request["tables"]}
    manifest = plan.request | {"device": device, "versions": versions(), "measured": measured, "digests": digests}
    write_json(work / "manifest.json", manifest, force=True)
    (work / "state.npz").unlink(missing_ok=True)
    (work / "request.json").unlink()


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
    try:
        done = statistics.restore(state) if state.exists() else 0
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{state}: the sums of an interrupted profile are damaged ({error}). Delete the file, and repeat the command: it "
            "begins anew."
        ) from None
    for number, (group, start) in enumerate(batches[done:], start=done + 1):
        count = min(request["batch_size"], samples - start)
        entries, seeds = plan.generations(start, count)

        def on_step(step: int, before: int = group * samples + start, count: int = count) -> None:
            on_progress(before * steps + step * count, len(plan.groups) * samples * steps)

        with Taps(pipe, plan, plan.groups[group], group == 0, count, statistics, watch, on_step) as taps:
            sample = partial(
                call, pipe, entries, seeds, steps, request["guidance_scale"], output_type="np", own=plan.own
            )
            sample()
        taps.flush()
        if not statistics.finite:
            raise not_finite(pipe, sample)
        if group == 0:
            statistics.samples += count
        statistics.save(state, number)


def solver_of(pipe: Any, sampler: Sampler) -> OwnUpdate | UnsupportedModelError:
    """Returns the steps of the pipeline's scheduler (after a recorded run) as coefficients, or why there are none."""
    try:
        return own_update(pipe.scheduler, sampler.timesteps)
    except UnsupportedModelError as error:
        return error


class Request(Record, frozen=True):
    """The content of request.json: what an interrupted profile had begun with."""

    digest: str  # of the request, the model, the sampler and the fields below
    groups: list[list[int]]
    batch_size: PositiveInt


def _open_partial(work: Path, pipe: Any, plan: ProfilePlan, force: bool) -> None:
    """Fills the empty working folder, or continues in one of the same request, with its batch size and groups."""
    asked = {key: value for key, value in plan.request.items() if key != "batch_size"}  # which follows from the memory
    parts = {"request": asked, "model": plan.model.to_json(), "sampler": plan.sampler.to_json(), "state": STATE_VERSION}
    known = {path.name for path in work.iterdir() if not path.name.startswith(".")}
    ours = PARTS | {"request.json", "state.npz"}
    leftovers = [path for path in work.glob(".*") if path.name[1:].startswith(tuple(f"{name}." for name in ours))]
    others = {path.name for path in work.iterdir() if path.name not in ours and path not in leftovers}
    if "request.json" not in known and known and not _begins_with(work, plan):
        others |= known
    if others:
        raise FormatError(
            f"{work}: holds {min(others)}, which is no part of this profile. Move it away, or choose another name."
        )
    for leftover in leftovers:  # files that a killed run had not finished
        leftover.unlink()
    if "request.json" in known:
        try:
            found = decode(read_json(work / "request.json"), Request, str(work))
        except FormatError:
            found = None  # damaged: as one of other settings
        if found and found.digest == digest(parts | {"groups": found.groups, "batch_size": found.batch_size}):
            # as at first, even if the free memory has changed
            plan.request["batch_size"], plan.groups = found.batch_size, found.groups
            return
    if not force and not known <= FIRST:
        raise FormatError(
            f"{work}: an interrupted profile with other settings is there, or a damaged one. Repeat its settings to continue it, "
            "or add --force to start anew."
        )
    for name in known:
        (work / name).unlink()
    write_inspection(work, plan.model, plan.sampler)
    write_solver(work, solver_of(pipe, plan.sampler))
    save_cost(count_flops(pipe, plan.model, plan.step), work / "cost.flops.json", force=True)
    begun = {"groups": plan.groups, "batch_size": plan.request["batch_size"]}
    write_json(work / "request.json", {"digest": digest(parts | begun)} | begun)
