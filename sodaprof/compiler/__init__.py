"""Compilers: from a profile and a cost table to a schedule, by arithmetic alone.

A policy is a function (Problem, knobs) -> Schedule, in a file of `policies`, whose registry lists them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from ..errors import BudgetError, FormatError, UnsupportedModelError, printable
from ..formats.cost import cost_of, load_cost
from ..formats.profile import Inspection, Profile, load_inspection, load_profile
from ..formats.rules import verify
from ..formats.schedule import Schedule
from .knobs import read_knobs, values_of
from .policies import POLICIES, Policy, current_name
from .problem import Problem, cache_bytes, within

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

    budget: "2.0x" or 2.0, or with a cost table in ms "50ms", the time of the loop at the table's batch; by default 2.0x, for
    policies with released settings what these give. policy: by default `default_policy`, whose reason is logged if it is not
    `solver`.
    cost: "flops" for the folder's own count, or the path of a cost.json. knobs: texts or values by name. max_cache: bytes that
    the caches of one generation may take; policies that keep several outputs are tried with fewer, unless a knob says how many.
    updated: with an update that is to be fitted closed loop, which budget and bytes leave room for; until then it is the
    sampler's own steps. Raises BudgetError if the budget or the bytes cannot be met and for wrong knobs, FormatError if a file
    is broken.
    """
    source = _source(folder)
    name = _policy(policy, source)
    chosen = POLICIES[name]
    table, flops = cost_of(source.folder, cost), source.folder / "cost.flops.json"
    problem = Problem(
        source.model,
        source.sampler,
        table,
        0.0,
        source if isinstance(source, Profile) else None,
        load_cost(flops) if table.unit == "ms" and flops.exists() else None,
        source.own_update() if updated else None,
    )
    if budget is not None or not chosen.released:
        full_ms = problem.full_cost if table.unit == "ms" else None
        problem = dataclasses.replace(problem, budget=parse_budget(2.0 if budget is None else budget, full_ms))
    settings: Any = read_knobs(name, chosen.knobs, knobs or {})
    for schedule in _ever_smaller(problem, chosen, settings, knobs or {}):
        kept = cache_bytes(schedule, problem.model)
        if max_cache is None or kept <= max_cache:
            verify(schedule)
            return replace(schedule, predicted=(schedule.predicted or {}) | {"cache_bytes": kept})
    raise BudgetError(
        f"The caches of one generation take {kept:,} bytes, at most {max_cache:,} are allowed (--max-cache). Allow as much, or "
        "take a policy that keeps less: solver keeps a few latents, drift a few outputs of the last block."
    )


def _source(folder: str | Path) -> Inspection:
    return load_profile(folder) if (Path(folder) / "manifest.json").exists() else load_inspection(folder)


def _policy(name: str | None, source: Inspection) -> str:
    """Returns the policy's name of today, or the default's; logs a former name, and why the default is not `solver`."""
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
            f"without a model, leave --policy out: {_default(source)[0]} is taken for this profile."
        )
    if name not in POLICIES:
        raise BudgetError(f"No policy {name!r}; there are {', '.join(POLICIES)}. Try --policy soda")
    return name


def default_policy(folder: str | Path) -> tuple[str, str]:
    """Returns the policy for a profile if none is named, and why it is not `solver`, or "".

    A fitted update is nearest to the full run at every budget that was measured (docs/studies/results.md); it needs a profile
    with inner products, one transformer, and a scheduler whose steps are linear. Raises FormatError if one of them is broken.
    """
    return _default(_source(folder))


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
    except (FormatError, UnsupportedModelError) as error:
        if isinstance(error, FormatError) and (source.folder / "solver.json").exists():
            raise  # a broken file is no reason for another policy
        return "soda", str(error)
    return "solver", ""


def _ever_smaller(problem: Problem, policy: Policy, knobs: Any, given: Mapping[str, Any]) -> Iterator[Schedule]:
    """Yields the policy's schedule, then ones that keep ever fewer outputs.

    An update that is still the sampler's own is first cut to as few outputs as the sampler itself weighs; then the knob that
    says how many outputs are kept is lowered, unless it is given.
    """
    depth = [name for name, values in values_of(policy.knobs).items() if values.depth and name not in given]
    while True:
        schedule = policy.compile(problem, knobs)
        yield schedule
        if (update := schedule.update) and (own := problem.own_update) and update.fitted["loop"] == "none":
            for history in range(update.history - 1, own.history - 1, -1):
                rows = tuple(row[: 1 + history] for row in update.coefficients)
                yield replace(schedule, update=replace(update, history=history, coefficients=rows))
        if not depth or getattr(knobs, depth[0]) <= 1:
            return
        knobs = dataclasses.replace(knobs, **{depth[0]: getattr(knobs, depth[0]) - 1})


def parse_budget(text: str | float, full_ms: float | None = None) -> float:
    """Returns the speed-up that a budget asks for: `2.0x`, `2` or 2.0, or `50ms`, the time of the loop.

    full_ms: what the loop takes with every step full; None if costs are no times. Raises BudgetError for other text, a speed-up
    outside of 1 to 1,000,000, a time without full_ms, or one above it.
    """
    written = str(text).strip().lower()
    unit = "ms" if written.endswith("ms") else "x"
    try:
        value = float(written.removesuffix(unit))
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf if unit == "ms" else 1 <= value <= 1_000_000):
        raise BudgetError(
            f"The budget is {printable(str(text), 60)!r}; expected a speed-up of at least 1, as in --budget 2.0x (and at "
            "most 1,000,000), or with a cost table in ms the time of the loop, as in --budget 50ms"
        )
    if unit == "x":
        return value
    if full_ms is None:
        raise BudgetError(
            f"The budget is {text}, and the cost table counts FLOPs, which say nothing about time. Measure: sodaprof bench MODEL "
            "--cost cost.json, and add --cost cost.json here; or ask for a speed-up, as in --budget 2.0x"
        )
    if not within(value, full_ms):
        raise BudgetError(
            f"The budget is {text}, and the loop takes {full_ms:.4g} ms with every step full. Ask for less, as in --budget "
            f"{full_ms / 2:.4g}ms"
        )
    return max(1.0, full_ms / value)
