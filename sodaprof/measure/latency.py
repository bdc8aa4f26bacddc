"""Measured costs: what each action takes on this device, in milliseconds, from steps that differ in one kind of site.

A probe schedule computes everything in its first steps and then, step by step, runs one pattern each: everything
reused, and that but for one module of all layers, which is computed, pruned to some k, or forecast. What such a step
takes longer than one that reuses everything is that module's cost. The traced blocks with their conditioning tables
are what is measured, since they are what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..compiler.problem import draw_schedule
from ..errors import SodaprofError, UnsupportedModelError
from ..formats.cost import CostModel, SiteCost, StepCost, TransformerCost
from ..formats.sampler import rounded
from ..formats.schedule import Forecast, Plan, Schedule, TokenRule, Update
from ..formats.sites import Model, Sampler, Site
from ..pipelines.discover import inspect_pipeline
from ..pipelines.load import default_prompts
from ..pipelines.sampler_steps import own_update
from .bench import check_rounds, contender_of, time_runs

SOURCES = 4
FIRST = SOURCES  # steps that compute everything, so that there are sources to forecast from
HISTORY = 3  # outputs that the measured update weighs
SHARES = (0.125, 0.25, 0.5, 0.75)  # of a module's tokens, for P
FORECASTS = {k: Forecast(tuple(range(SOURCES - k, SOURCES)), (1.0 / k,) * k) for k in (1, SOURCES)}

Pattern = tuple[str, str, int]  # (module or "", action, k or number of sources)


def measure_costs(
    pipe: Any,
    *,
    steps: int = 50,
    batch_size: int = 1,
    rounds: int = 7,
    guidance_scale: float | None = None,
    prompts: Sequence[int | str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CostModel:
    """Returns the cost table of this pipeline on its device, in ms at this batch; medians of `rounds` runs.

    Both costs of a step hold its share of filling the conditioning tables. Raises SodaprofError below 6 steps,
    UnsupportedModelError for several transformers or blocks that cannot be lowered.
    """
    check_rounds(rounds, batch_size)
    if steps < FIRST + 2:
        raise SodaprofError(f"--steps is {steps}; costs are measured over at least {FIRST + 2}.")
    pool = default_prompts(pipe) if prompts is None else list(prompts)
    entries = [pool[i % len(pool)] for i in range(batch_size)]
    model, sampler, _ = inspect_pipeline(pipe, "", steps, guidance_scale, entries[0])
    if len(model.transformers) != 1:
        raise UnsupportedModelError(f"Costs are measured of one transformer; here are {', '.join(model.transformers)}.")
    ((name, transformer),) = model.transformers.items()
    modules: dict[str, list[Site]] = {}
    for site in transformer.sites:
        modules.setdefault(f"{site.stack}.{site.module}", []).append(site)
    patterns = _patterns(modules)
    groups = [patterns[i : i + steps - FIRST] for i in range(0, len(patterns), steps - FIRST)]
    cuda = "cuda" in str(getattr(pipe, "device", "cpu"))
    runs = [contender_of(pipe, "probe", _probe(model, sampler, name, modules, g), True, True, cuda) for g in groups]
    anchors = {"full": range(steps), "half": range(0, steps, 2)}
    whole, half = (
        contender_of(pipe, name, draw_schedule(model, sampler, list(at), {}), True, True, cuda)
        for name, at in anchors.items()
    )
    moved = _updated(pipe, draw_schedule(model, sampler, list(anchors["half"]), {}))
    updates = [] if moved is None else [contender_of(pipe, "update", moved, True, True, cuda)]
    time_runs(pipe, [whole, half, *runs, *updates], steps, entries, guidance_scale, rounds, on_progress)

    took: dict[Pattern, list[float]] = {}
    for group, run in zip(groups, runs, strict=True):
        median = np.median(run.transformer, 0)
        for step in range(FIRST, steps):
            took.setdefault(group[(step - FIRST) % len(group)], []).append(float(median[step]))
    ms = {pattern: float(np.median(values)) for pattern, values in took.items()}
    full = float(np.median(np.median(whole.transformer, 0)[1:]))
    # what a run's first step takes longer, for it fills the tables: with one pattern, and with two, half of the steps each
    one, two = (max(0.0, float(np.median(run.transformer, 0)[0]) - full) / steps for run in (whole, half))
    tables = one, max(0.0, 2 * two - one)
    runs = [whole, half, *runs]
    scheduler = float(np.median([run.scheduler for run in runs]))
    update = float(np.median([run.scheduler for run in updates])) if updates else scheduler
    rest = [
        (loop - t.sum() - s.sum()) / steps
        for r in runs
        for loop, t, s in zip(r.loop, r.transformer, r.scheduler, strict=True)
    ]
    costs = TransformerCost(*_costs(modules, ms, full, tables))
    return CostModel(
        "ms", str(getattr(pipe, "device", "cpu")), model.shape["dtype"], batch_size, model.shape["tokens"], {name: costs},
        {"scheduler": scheduler, "update": update, "guidance": max(0.0, float(np.median(rest)))},
        {"text_encoder": None, "vae": None},
    )  # fmt: skip


def _updated(pipe: Any, schedule: Schedule) -> Schedule | None:
    """Returns the schedule with the scheduler's own steps as an update of HISTORY outputs; None where they are not linear."""
    try:
        own = own_update(pipe.scheduler, list(schedule.sampler.timesteps))
    except UnsupportedModelError:  # no schedule of this pipeline can hold an update
        return None
    rows = rounded(own.padded(max(HISTORY, own.history)))
    return replace(schedule, update=Update(own.basis, len(rows[0]) - 1, rows, {"own": True}))


def _patterns(modules: dict[str, list[Site]]) -> list[Pattern]:
    found: list[Pattern] = [("", "R", 0)]
    for name, sites in modules.items():
        found.append((name, "C", 0))
        found += [(name, "F", k) for k in FORECASTS]
        if all(site.prunable for site in sites):
            found += [(name, "P", max(1, round(share * sites[0].tokens))) for share in SHARES]
    return [*found, *(("", "S", k) for k in FORECASTS)]


def _probe(
    model: Model, sampler: Sampler, name: str, modules: dict[str, list[Site]], patterns: list[Pattern]
) -> Schedule:
    """Returns a schedule that runs the patterns one a step, again and again."""
    transformer = model.transformers[name]
    rows = {site.key: ["C"] * FIRST for site in transformer.sites}
    ks: dict[str, list[int]] = {}
    forecasts: dict[str, list[Forecast]] = {}
    stack, skips = ["."] * FIRST, []
    for step in range(FIRST, sampler.steps):
        module, action, number = patterns[(step - FIRST) % len(patterns)]
        stack.append("S" if action == "S" else ".")
        if action == "S":
            skips.append(FORECASTS[number])
        for part, sites in modules.items():
            for site in sites:
                rows[site.key].append("-" if action == "S" else action if part == module else "R")
                if part == module and action == "P":
                    ks.setdefault(site.key, []).append(min(number, site.tokens))
                if part == module and action == "F":
                    forecasts.setdefault(site.key, []).append(FORECASTS[number])
    plan = Plan(
        transformer.class_name, transformer.fingerprint, {key: "".join(row) for key, row in rows.items()}, "".join(stack),
        {key: tuple(k) for key, k in ks.items()}, {key: tuple(f) for key, f in forecasts.items()}, tuple(skips),
    )  # fmt: skip
    rule = TokenRule("feature_mean") if ks else None
    return replace(Schedule({name: plan}, sampler, model.shape, {"name": "probe", "knobs": {}}), token_rule=rule)


def _costs(
    modules: dict[str, list[Site]], ms: dict[Pattern, float], full: float, tables: tuple[float, float]
) -> tuple[StepCost, dict[str, SiteCost]]:
    """Returns the costs of a step and of every site; a module's cost is shared alike by its layers.

    tables: a step's share of filling the tables, where it computes and where it does not.
    """
    cached = ms["", "R", 0]
    over = lambda pattern, sites: max(0.0, ms[pattern] - cached) / len(sites)  # noqa: E731
    computed = {name: over((name, "C", 0), sites) for name, sites in modules.items()}
    together = sum(computed[name] * len(sites) for name, sites in modules.items())
    scale = (full - cached) / together if together > 0 else 1.0  # so that both ends, all R and all C, are as measured
    sites_costs = {}
    for name, sites in modules.items():
        c = computed[name] * scale
        one, most = (over((name, "F", k), sites) for k in FORECASTS)
        forecasts = tuple(float(v) for v in np.interp(range(1, SOURCES + 1), list(FORECASTS), (one, most)))
        points = [
            (k, min(c, over((name, action, k), sites))) for part, action, k in ms if part == name and action == "P"
        ]
        for site in sites:
            cost = SiteCost(
                c, 0.0, forecasts, (*sorted((k, v) for k, v in points if k < site.tokens), (site.tokens, c))
            )
            sites_costs[site.key] = cost
    stack = [ms["", "S", k] + tables[1] for k in FORECASTS]
    skipped = tuple(float(v) for v in np.interp(range(1, SOURCES + 1), list(FORECASTS), stack))
    return StepCost(cached + tables[0], cached + tables[1], skipped), sites_costs
