"""Measured costs: what each action takes on this device, in milliseconds, from steps that differ in one kind of site.

After full steps a probe schedule runs one pattern a step: every site reuses, except that one module of all layers is computed,
pruned or forecast. Its time minus that of a step that only reuses is the module's cost, of traced blocks with tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from msgspec.structs import replace

from ..compiler.problem import draw_schedule
from ..errors import SodaprofError, UnsupportedModelError
from ..formats.cost import CostModel, SiteCost, StepCost, TransformerCost
from ..formats.sampler import rounded
from ..formats.schedule import Forecast, Plan, Schedule, TokenRule, Update
from ..formats.sites import Model, Sampler, Site
from ..pipelines.discover import inspect_pipeline
from ..pipelines.sampler_steps import own_update
from .bench import Timings, all_compute, time_runs, timings_of, work_of

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
    graphs: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CostModel:
    """Returns the cost table of this pipeline on its device, in ms at this batch; medians of `rounds` runs.

    Both costs of a step hold its share of filling the conditioning tables. graphs: measure in CUDA graphs on a GPU. Raises
    SodaprofError below 6 steps, UnsupportedModelError for several transformers or blocks that cannot be traced.
    """
    work = work_of(pipe, prompts, batch_size, rounds, steps, guidance_scale)
    if steps < FIRST + 2:
        raise SodaprofError(f"--steps is {steps}; costs are measured over at least {FIRST + 2}.")
    model, sampler, _ = inspect_pipeline(pipe, "", steps, guidance_scale, work.entries[0])
    if len(model.transformers) != 1:
        raise UnsupportedModelError(
            f"Costs are measured for one transformer; this pipeline has {', '.join(model.transformers)}."
        )
    ((name, transformer),) = model.transformers.items()
    modules: dict[str, list[Site]] = {}
    for site in transformer.sites:
        modules.setdefault(_module(site), []).append(site)
    patterns, count = _patterns(modules), steps - FIRST
    groups = [patterns[i : i + count] for i in range(0, len(patterns), count)]
    runtime = "captured" if work.cuda and graphs else "tables"
    every_second = draw_schedule(model, sampler, list(range(0, steps, 2)), {})
    probes = [timings_of(pipe, "probe", _probe(model, sampler, group), runtime) for group in groups]
    whole = timings_of(pipe, "full", all_compute(model, sampler), runtime)
    half = timings_of(pipe, "half", every_second, runtime)
    updated = _with_own_update(pipe, every_second)
    updates = [] if updated is None else [timings_of(pipe, "update", updated, runtime)]
    time_runs(work, [whole, half, *probes, *updates], rounds, on_progress)

    full_ms = float(np.median(np.median(whole.transformer, 0)[1:]))
    tables = _table_shares(whole, half, full_ms)
    costs = TransformerCost(*_costs(modules, _pattern_ms(groups, probes), full_ms, tables))
    return CostModel(
        "ms", str(getattr(pipe, "device", "cpu")), model.shape["dtype"], batch_size, model.shape["tokens"], {name: costs},
        _loop_ms([whole, half, *probes], updates), {"text_encoder": None, "vae": None},
    )  # fmt: skip


def _module(site: Site) -> str:
    """Returns the name that the sites of one module have in all layers."""
    return f"{site.stack}.{site.module}"


def _pattern_ms(groups: list[list[Pattern]], probes: list[Timings]) -> dict[Pattern, float]:
    """Returns the median time of a step of each pattern; probes: the runs of each group of patterns."""
    found: dict[Pattern, float] = {}
    for group, probe in zip(groups, probes, strict=True):
        ms = np.median(probe.transformer, 0)[FIRST:]
        found |= {pattern: float(np.median(ms[i :: len(group)])) for i, pattern in enumerate(group)}
    return found


def _table_shares(whole: Timings, half: Timings, full_ms: float) -> tuple[float, float]:
    """Returns a step's share of filling the tables, of steps that compute and of those that do not.

    The tables are filled in a run's first step. whole: every step computes; half: every second one, so two patterns' tables.
    """
    steps = len(whole.transformer[0])
    one, two = (max(0.0, float(np.median(run.transformer, 0)[0]) - full_ms) / steps for run in (whole, half))
    return one, max(0.0, 2 * two - one)


def _loop_ms(runs: list[Timings], updates: list[Timings]) -> dict[Literal["scheduler", "update", "guidance"], float]:
    """Returns what a step of the loop takes outside the transformer: scheduler, fitted update, guidance."""
    scheduler = float(np.median([run.scheduler for run in runs]))
    update = float(np.median([run.scheduler for run in updates])) if updates else scheduler
    rest = [
        (loop - in_transformer.sum() - in_scheduler.sum()) / len(in_scheduler)
        for run in runs
        for loop, in_transformer, in_scheduler in zip(run.loop, run.transformer, run.scheduler, strict=True)
    ]
    return {"scheduler": scheduler, "update": update, "guidance": max(0.0, float(np.median(rest)))}


def _with_own_update(pipe: Any, schedule: Schedule) -> Schedule | None:
    """Returns the schedule with the scheduler's own steps as an update of HISTORY outputs; None if they are not linear."""
    try:
        own = own_update(pipe.scheduler, list(schedule.sampler.timesteps))
    except UnsupportedModelError:  # no schedule of this pipeline can hold an update
        return None
    rows = rounded(own.padded(max(HISTORY, own.history)))
    return replace(schedule, update=Update(own.basis, len(rows[0]) - 1, rows, {"own": True}))


def _patterns(modules: dict[str, list[Site]]) -> list[Pattern]:
    found: list[Pattern] = [("", "R", 0)]
    for name, sites in modules.items():
        found += [(name, "C", 0), *((name, "F", k) for k in FORECASTS)]
        if all(site.prunable for site in sites):
            found += [(name, "P", max(1, round(share * sites[0].tokens))) for share in SHARES]
    return [*found, *(("", "S", k) for k in FORECASTS)]


def _probe(model: Model, sampler: Sampler, patterns: list[Pattern]) -> Schedule:
    """Returns a schedule that runs the patterns one a step, cyclically."""
    ((name, transformer),) = model.transformers.items()
    run = [patterns[i % len(patterns)] for i in range(sampler.steps - FIRST)]
    stack = ["S" if action == "S" else "." for _, action, _ in run]
    skips = tuple(FORECASTS[number] for _, action, number in run if action == "S")
    rows, ks, forecasts = {}, {}, {}
    for site in transformer.sites:
        own = _module(site)
        row = ["-" if action == "S" else action if module == own else "R" for module, action, _ in run]
        rows[site.key] = "C" * FIRST + "".join(row)
        if k := tuple(min(number, site.tokens) for *cell, number in run if cell == [own, "P"]):
            ks[site.key] = k
        if cells := tuple(FORECASTS[number] for *cell, number in run if cell == [own, "F"]):
            forecasts[site.key] = cells
    row_of_stack = "." * FIRST + "".join(stack)
    plan = Plan(transformer.class_name, transformer.fingerprint, rows, row_of_stack, ks, forecasts, skips)
    rule = TokenRule("feature_mean") if ks else None
    return Schedule({name: plan}, sampler, model.shape, {"name": "probe", "knobs": {}}, token_rule=rule)


def _costs(
    modules: dict[str, list[Site]], ms: dict[Pattern, float], full: float, tables: tuple[float, float]
) -> tuple[StepCost, dict[str, SiteCost]]:
    """Returns the costs of a step and of every site; a module's cost is divided evenly among its layers.

    full: ms of a full step. tables: a step's share of filling the tables, of one that computes and of one that does not.
    """
    cached = ms["", "R", 0]

    def excess(name: str, action: str, number: int) -> float:
        """Returns what a site of the module takes under an action, in ms."""
        return max(0.0, ms[name, action, number] - cached) / len(modules[name])

    computed = {name: excess(name, "C", 0) for name in modules}
    together = sum(computed[name] * len(sites) for name, sites in modules.items())
    # so that both ends, all R and all C, are as measured; a timing in which all C is the faster one gives no negative cost
    scale = max(0.0, full - cached) / together if together > 0 else 1.0
    site_costs = {}
    for name, sites in modules.items():
        c = computed[name] * scale
        forecasts = _between([excess(name, "F", k) for k in FORECASTS])
        pruned = sorted((k, min(c, excess(name, "P", k))) for part, action, k in ms if (part, action) == (name, "P"))
        for site in sites:
            points = (*((k, v) for k, v in pruned if k < site.tokens), (site.tokens, c))
            site_costs[site.key] = SiteCost(c, 0.0, forecasts, points)
    skipped = _between([ms["", "S", k] + tables[1] for k in FORECASTS])
    return StepCost(cached + tables[0], cached + tables[1], skipped), site_costs


def _between(ends: list[float]) -> tuple[float, ...]:
    """Returns the costs for 1 to SOURCES sources, by interpolation between those of FORECASTS."""
    return tuple(float(v) for v in np.interp(range(1, SOURCES + 1), list(FORECASTS), ends))
