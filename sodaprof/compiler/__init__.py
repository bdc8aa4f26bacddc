"""Compilers: from a profile and a cost table to a schedule, by arithmetic alone.

A policy is a function (Problem, knobs) -> Schedule, in a file of its own in `policies`, whose registry lists them.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BudgetError, FormatError, UnsupportedModelError
from ..formats.cost import cost_of, load_cost
from ..formats.profile import Inspection, Profile, load_inspection, load_profile
from ..formats.rules import verify
from ..formats.schedule import Schedule
from .knobs import read_knobs
from .policies import POLICIES, Policy, current_name
from .problem import Problem, cache_bytes

LOG = logging.getLogger(__name__)


def compile_schedule(
    folder: str | Path,
    budget: str | float | None = None,
    policy: str | None = None,
    cost: str | Path = "flops",
    knobs: dict[str, Any] | None = None,
    max_cache: int | None = None,
    updated: bool = False,
) -> Schedule:
    """Returns the schedule that `policy` compiles from the profile in `folder` for a speed-up of the denoising loop.

    budget: "2.0x" or 2.0; by default 2.0x, for policies with released settings what these give. policy: by default
    `default_policy`, whose reason is logged if it is not `solver`.
    cost: "flops" for the folder's own count, or the path of a cost.json. knobs: texts or values by name. max_cache: bytes that
    the caches of one generation may take; policies that keep several outputs are tried with fewer, unless a knob says how many.
    updated: with an update that is to be fitted closed loop, which budget and bytes leave room for; until then it is the
    sampler's own steps. Raises BudgetError if the budget or the bytes cannot be met and for wrong knobs, FormatError if a file
    is broken.
    """
    folder = Path(folder)
    source = load_profile(folder) if (folder / "manifest.json").exists() else load_inspection(folder)
    name, chosen = _policy(policy, source)
    problem = _problem(source, chosen, budget, cost, updated)
    settings: Any = read_knobs(name, chosen.knobs, knobs or {})
    schedule = chosen.compile(problem, settings)
    if max_cache is not None:
        depth = "" if chosen.depth in (knobs or {}) else chosen.depth
        schedule = _within_cache(schedule, max_cache, problem, replace(chosen, depth=depth), settings)
    verify(schedule)
    return schedule


def _policy(name: str | None, source: Inspection) -> tuple[str, Policy]:
    """Returns the policy of this name, or the default; logs a reason for another default than `solver` and a former name."""
    if name is None:
        name, why = _default(source)
        if why:
            LOG.warning("Policy %s: %s", name, why)
    name, note = current_name(name)
    if note:
        LOG.warning(note)
    if name == "mix":
        raise BudgetError(
            "Policy mix measures its candidates on the model. Type: sodaprof compile DIR --policy mix --fit MODEL -o FILE; "
            f"without a model, leave --policy out: the default for this profile is {_default(source)[0]}."
        )
    if name not in POLICIES:
        raise BudgetError(f"No policy {name!r}; there are {', '.join(POLICIES)}. Try --policy soda")
    return name, POLICIES[name]


def _problem(
    source: Inspection, policy: Policy, budget: str | float | None, cost: str | Path, updated: bool
) -> Problem:
    """Returns the problem of a folder, with the FLOPs next to a cost table in ms and the sampler's own steps if updated."""
    ratio = 0.0 if budget is None and policy.released else parse_budget(2.0 if budget is None else budget)
    table, flops = cost_of(source.folder, cost), source.folder / "cost.flops.json"
    return Problem(
        source.model,
        source.sampler,
        table,
        ratio,
        source if isinstance(source, Profile) else None,
        load_cost(flops) if table.unit == "ms" and flops.exists() else None,
        source.own_update() if updated else None,
    )


def default_policy(folder: str | Path) -> tuple[str, str]:
    """Returns the policy for a profile if none is named, and why it is not `solver`, or "".

    A fitted update is nearest to the full run at every budget that was measured (docs/results.md); it needs a profile with
    inner products, one transformer, and a scheduler whose steps are linear. Raises FormatError if one of them is broken.
    """
    folder = Path(folder)
    return _default(load_profile(folder)) if (folder / "manifest.json").exists() else ("soda", "")


def _default(source: Inspection) -> tuple[str, str]:
    if not isinstance(source, Profile):
        return "soda", ""  # whose error says what is missing
    if len(source.model.transformers) > 1:
        count = len(source.model.transformers)
        return "soda", f"a fitted update is for one transformer, {source.model.name} has {count}."
    if "gram" not in source.manifest["tables"]:
        return "soda", "the profile holds no inner products to fit an update from. Profile again without --no-gram."
    try:
        source.own_update()
    except UnsupportedModelError as error:
        return "soda", str(error)
    except FormatError as error:
        if (source.folder / "solver.json").exists():  # a broken file is no reason for another policy
            raise
        return "soda", str(error)
    return "solver", ""


def _within_cache(schedule: Schedule, most: int, problem: Problem, policy: Policy, knobs: Any) -> Schedule:
    """Returns the schedule, or one that keeps fewer outputs, whose caches take at most `most` bytes; BudgetError if none does.

    An update that is still the sampler's own is first cut to as few outputs as the sampler itself weighs; then the policy's
    depth is lowered.
    """
    while True:
        for one in (schedule, *_shorter_updates(schedule, problem)):
            if (kept := cache_bytes(one, problem.model)) <= most:
                return replace(one, predicted=(one.predicted or {}) | {"cache_bytes": kept})
        if not policy.depth or getattr(knobs, policy.depth) <= 1:
            raise BudgetError(
                f"The caches of one generation take {kept:,} bytes, at most {most:,} are allowed (--max-cache). Allow as much, "
                "or take a policy that keeps less: solver keeps a few latents, drift a few outputs of the last block."
            )
        knobs = replace(knobs, **{policy.depth: getattr(knobs, policy.depth) - 1})
        schedule = policy.compile(problem, knobs)


def _shorter_updates(schedule: Schedule, problem: Problem) -> list[Schedule]:
    """Returns the schedule with ever fewer outputs in its update, down to the sampler's own; none if it is fitted already."""
    update, own = schedule.update, problem.own_update
    if update is None or own is None or update.fitted["loop"] != "none":
        return []
    lengths = range(update.history - 1, own.history - 1, -1)
    cut = [replace(update, history=n, coefficients=tuple(row[: 1 + n] for row in update.coefficients)) for n in lengths]
    return [replace(schedule, update=one) for one in cut]


def parse_budget(text: str | float) -> float:
    """Returns the speed-up that `2.0x` (or `2.0`) asks for; BudgetError unless it is a finite number of at least 1."""
    try:
        value = float(str(text).strip().removesuffix("x").removesuffix("X"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 1:
        raise BudgetError(f"The budget is {str(text)!r}; expected a speed-up of at least 1, as in --budget 2.0x")
    return value
