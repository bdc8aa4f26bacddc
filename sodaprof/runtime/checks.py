"""Checks that a schedule matches a pipeline, and makes the rows of its sites."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import diffusers
import torch

from ..errors import MismatchError
from ..formats.rules import OBSERVED, observed_steps, source_of
from ..formats.schedule import Plan, Schedule
from ..formats.sites import Sampler, SiteKey
from ..pipelines.discover import config_of, fingerprint
from ..pipelines.load import transformers_of
from ..pipelines.patch import owner_of
from ..pipelines.recording import refuse_caches, refuse_compiled
from ..pipelines.structure import find_modules
from .hooks.registry import hook_owners, refuse_group_offload
from .hooks.sites import SiteRow
from .sampler.update import check_linear


def check_matches(pipe: Any, schedule: Schedule) -> None:
    """Raises MismatchError that names the first difference between schedule and pipeline, and what to do.

    UnsupportedModelError if the schedule has an update and the scheduler's steps are no weighted sums.
    """
    parts = transformers_of(pipe)
    for name, plan in schedule.transformers.items():
        if name not in parts:
            raise MismatchError(
                f"The schedule is for {name!r}, the pipeline has {', '.join(parts)}. Compile for this one."
            )
        _check_transformer(name, parts[name], plan)
    _check_scheduler(pipe.scheduler, schedule.sampler)
    _check_boundary(pipe, schedule)
    if schedule.update is not None:
        check_linear(pipe.scheduler, schedule.update.basis)


def _check_scheduler(scheduler: Any, sampler: Sampler) -> None:
    if (found := type(scheduler).__name__) != (wanted := sampler.class_name):
        do = f"diffusers {diffusers.__version__} has no {wanted}: take the pipeline that was profiled."
        if hasattr(diffusers, wanted):
            do = (
                f"Type: pipe.scheduler = diffusers.{wanted}.from_config(pipe.scheduler.config); on the command line, if the "
                f"command has it: --scheduler {wanted}"
            )
        raise MismatchError(f"The schedule is for {wanted}, the pipeline has {found}. {do}")
    if owner_of(scheduler) is not None:
        raise MismatchError("The scheduler carries a schedule already. Remove it first: sodaprof.remove(pipe)")
    config = config_of(scheduler)
    if _other(config, sampler.config):
        # DPMSolverSinglestepScheduler changes settings in `set_timesteps`
        started = copy.deepcopy(scheduler)
        with suppress(TypeError, ValueError):  # one that needs more arguments changes no settings
            started.set_timesteps(sampler.steps)
        config = config_of(started)
    if key := _other(config, sampler.config):
        raise MismatchError(
            f"The scheduler's {key} is {config.get(key)!r}, {sampler.config[key]!r} in the schedule. Set it to this, or profile "
            "and compile anew."
        )


def _other(config: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Returns the first setting that is not as wanted."""
    return next((key for key, value in wanted.items() if _plain(config.get(key)) != _plain(value)), None)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_boundary(pipe: Any, schedule: Schedule) -> None:
    """Raises MismatchError if diffusers' `boundary_ratio` gives steps to another transformer than the schedule does.

    Other pipelines that change transformers are checked while they run.
    """
    config, trained = getattr(pipe, "config", {}), schedule.sampler.config.get("num_train_timesteps")
    if set(schedule.transformers) != {"transformer", "transformer_2"} or "boundary_ratio" not in config or not trained:
        return
    ratio = config["boundary_ratio"]
    # in a tensor, as the pipeline compares: a timestep at the boundary must be on the same side
    found = (torch.tensor(schedule.times) >= (0 if ratio is None else ratio * trained)).tolist()
    wanted = [past >= 0 for past in schedule.transformers["transformer"].past()]
    if found != wanted:
        count = sum(wanted)
        above, below = min(schedule.times[:count]) / trained, max(schedule.times[count:]) / trained
        middle = (above + below) / 2
        say = next((s for s in (f"{middle:.{d}g}" for d in range(4, 18)) if below < float(s) <= above), middle)
        raise MismatchError(
            f"With boundary_ratio={ratio} the pipeline calls transformer at {sum(found)} of {len(found)} steps, then "
            f"transformer_2; in the schedule it is {count}. Set the boundary above {below:.9g} and at most {above:.9g}, say "
            f"pipe.register_to_config(boundary_ratio={say}), or profile and compile for this one."
        )


def _check_transformer(name: str, transformer: Any, plan: Plan) -> None:
    refuse_compiled(name, transformer)
    if type(transformer).__name__ != plan.class_name:
        raise MismatchError(
            f"{name} is a {type(transformer).__name__}, the schedule is for {plan.class_name}. Compile for this model."
        )
    found = fingerprint(transformer, ())
    for key, wanted in plan.fingerprint.items():
        if key not in ("tokens", "kinds", "layouts", "text") and found.get(key) != wanted:
            raise MismatchError(
                f"{name} has {key} {found.get(key)}, the schedule is for {wanted}: another model. Compile for this one."
            )
    known, named = set(find_modules(transformer)), {SiteKey.parse(site).path for site in plan.rows}
    if missing := sorted(named - known):
        raise MismatchError(
            f"{name} has no module {missing[0]}, the schedule has a row for it. Compile for this model."
        )
    if missing := sorted(known - named):
        raise MismatchError(
            f"{name} has the site {missing[0]}, the schedule has no row for it. Compile for this model."
        )
    refuse_group_offload(name, transformer)
    refuse_caches(name, transformer)
    if hook_owners(transformer):
        raise MismatchError(
            f"{name} carries a schedule already. Remove it first: sodaprof.remove(pipe). To run another pipeline with the same "
            "network under that schedule, give it a copy of the scheduler: copy.deepcopy(pipe.scheduler)"
        )


def rows_by_module(transformer: Any, plan: Plan, schedule: Schedule) -> dict[str, list[SiteRow]]:
    """Returns the rows by module path; a row that prunes is linked to the site whose attention scores its tokens."""
    known, rule = find_modules(transformer), schedule.token_rule
    observed = observed_steps(plan, rule.base) if rule is not None else {}
    rows, modules = dict[str, SiteRow](), dict[str, list[SiteRow]]()
    for site, actions in plan.rows.items():
        path = SiteKey.parse(site).path
        *_, kind, module = known[path]
        raster = _raster(schedule, plan, site, rule.bonus_grid) if rule and rule.bonus and "P" in actions else None
        rows[site] = SiteRow(plan, site, module, kind == "attn", rule, observed.get(site, frozenset()), raster)
        modules.setdefault(path, []).append(rows[site])
    if rule is not None and rule.base in OBSERVED:
        for site, row in rows.items():
            row.scored_by = rows[source_of(plan, site, rule.base) or site] if row.prunes else None
    return modules


def _raster(schedule: Schedule, plan: Plan, site: str, grid: int) -> tuple[int, int]:
    """Returns rows and columns of the site's tokens; MismatchError if blocks of grid x grid do not fill them."""
    tokens, patch = plan.tokens(site), plan.fingerprint.get("patch", 1)
    patches = patch[-2:] if isinstance(patch, list) else [patch, patch]
    rows, columns = (size // p for size, p in zip(schedule.shape["latent"][-2:], patches, strict=True))
    if rows * columns != tokens or rows % grid or columns % grid:
        raise MismatchError(
            f"{site} has {tokens} tokens, of {rows} x {columns} patches, which blocks of {grid} x {grid} do not fill; the "
            "schedule's local bonus needs such blocks. Choose another size, or --policy soda."
        )
    return rows, columns
