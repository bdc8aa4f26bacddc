"""From anchors and prune rates to a schedule: the one place where compilers draw rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..cost import CostModel, check_covers
from ..errors import BudgetError, UnsupportedModelError
from ..profiles import Profile
from ..schedule import Plan, Schedule, TokenRule
from ..sites import Model, Sampler
from ..version import __version__

FEATURE_MEAN = TokenRule(base="feature_mean")


def draw_schedule(model: Model, sampler: Sampler, anchors: list[int], prune: dict[str, np.ndarray]) -> Schedule:
    """Returns the schedule with these anchors, P where prune[transformer][t, s] >= 0 (k tokens), R elsewhere.

    A P cell that would recompute every token is drawn as the C that it is.
    """
    plans = {}
    for name, transformer in model.transformers.items():
        rows, ks = {}, {}
        own = [step for step, past in enumerate(transformer.past(sampler.steps)) if past >= 0]
        stack = "".join("." if step in own else "_" for step in range(sampler.steps))
        for i, site in enumerate(transformer.sites):
            k = prune[name][:, i] if name in prune else np.full(sampler.steps, -1)
            row = ["_"] * sampler.steps
            for t in own:
                row[t] = "C" if t in anchors or k[t] >= site.tokens else "R" if k[t] < 0 else "P"
            rows[site.key] = "".join(row)
            if "P" in row:
                ks[site.key] = tuple(int(k[t]) for t in range(sampler.steps) if row[t] == "P")
        plans[name] = Plan(transformer.class_name, transformer.fingerprint, rows, stack, ks)
    pruned = any(plan.k for plan in plans.values())
    return Schedule(plans, sampler, model.shape, {}, token_rule=FEATURE_MEAN if pruned else None)


def sign(
    schedule: Schedule,
    policy: str,
    knobs: dict[str, Any],
    profile: Profile | None,
    model: Model,
    cost: CostModel,
    error: float | None,
) -> Schedule:
    """Returns the schedule with policy, origin and predictions filled in; cache bytes are for one generation."""
    predicted = {
        "unit": cost.unit,
        "speedup": cost.speedup(schedule),
        "cost": cost.schedule(schedule),
        "error": error,
        "cache_bytes": cache_bytes(schedule, model),
    }
    return replace(
        schedule,
        policy={"name": policy, "knobs": knobs},
        profile=None if profile is None else profile.reference(),
        predicted=predicted,
        made_by=f"sodaprof {__version__}",
    )


def cache_bytes(schedule: Schedule, model: Model) -> int:
    """Bytes that the caches of one generation take, both guidance branches included.

    One output for each site that is not always computed; for forecasts of the stack, the most sources alive at once. Of
    transformers that take turns the one that keeps most: each begins with nothing.
    """
    branches = 1 if schedule.sampler.guidance_form == "none" else 2
    size = 4 if model.shape["dtype"] == "float32" else 2
    totals = []
    for name, plan in schedule.transformers.items():
        total = 0
        for site in model.transformers[name].sites:
            if set(plan.rows[site.key]) & set("RFP"):
                total += site.tokens * site.width * size * branches
        last = model.transformers[name].sites[-1]
        totals.append(total + _most_alive(plan) * last.tokens * last.width * size * branches)
    return max(totals)


def _most_alive(plan: Plan) -> int:
    """Returns how many outputs of the stack are held at once for the S cells to come."""
    skips = [t for t, action in enumerate(plan.stack) if action == "S"]
    last: dict[int, int] = {}
    for step, cell in zip(skips, plan.stack_forecasts, strict=True):
        last |= dict.fromkeys(cell.sources, step)
    return max((sum(s <= t <= last[s] for s in last) for t in range(len(plan.stack))), default=0)


def one_transformer(model: Model, policy: str) -> str:
    """Returns the name of the model's only transformer; this release's policies know no others."""
    if len(model.transformers) != 1:
        names = ", ".join(model.transformers)
        raise UnsupportedModelError(f"{model.name} has several transformers ({names}); --policy {policy} takes one.")
    return next(iter(model.transformers))


def turns_of(model: Model, sampler: Sampler, policy: str) -> dict[str, list[range]]:
    """Returns each transformer's turns: runs of steps at which the pipeline calls it.

    Raises UnsupportedModelError where not exactly one transformer is called at each step.
    """
    past = {name: transformer.past(sampler.steps) for name, transformer in model.transformers.items()}
    if any(sum(p >= 0 for p in column) != 1 for column in zip(*past.values(), strict=True)):
        raise UnsupportedModelError(
            f"{model.name} has several transformers ({', '.join(model.transformers)}) that do not take turns; --policy "
            f"{policy} takes those of which one works at each step."
        )
    turns: dict[str, list[range]] = {name: [] for name in past}
    for name, ages in past.items():
        for step, age in enumerate(ages):
            if age == 0:
                turns[name].append(range(step, step))
            if age >= 0:
                turns[name][-1] = range(turns[name][-1].start, step + 1)
    return turns


def reuse_only_cost(
    model: Model, sampler: Sampler, cost: CostModel
) -> tuple[float, Callable[[Mapping[str, int]], float]]:
    """Returns the loop's cost with every step full, and a function of {transformer: k}: with k full steps, the rest all R."""
    check_covers(cost, {name: [s.key for s in t.sites] for name, t in model.transformers.items()})
    loop = sampler.steps * cost.loop_step(False)
    steps = {name: sum(p >= 0 for p in t.past(sampler.steps)) for name, t in model.transformers.items()}

    def spent(full: Mapping[str, int]) -> float:
        tables = ((cost.transformers[name], full[name], steps[name]) for name in steps)
        return loop + sum(k * table.full + (own - k) * table.step.all_cached for table, k, own in tables)

    return spent(steps), spent


def take_knobs(policy: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns the defaults with the given knobs in place, each of its default's type; BudgetError on any other."""
    knobs = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            raise BudgetError(f"Policy {policy} has no knob {name!r}; it has {', '.join(defaults)}.")
        kind = type(defaults[name])
        try:
            knobs[name] = kind(value)
            if kind is not str and (not math.isfinite(knobs[name]) or knobs[name] != float(value)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise BudgetError(f"Knob {name} is {value!r}; expected {kind.__name__}.") from None
    return knobs


def within(cost: float, allowed: float) -> bool:
    """Whether a cost keeps to what is allowed, but for rounding."""
    return cost <= allowed * (1 + 1e-9)


def unreachable(budget: float, reachable: float, cost: CostModel) -> BudgetError:
    return BudgetError(
        f"A budget of {budget:.4g}x cannot be met: at most {reachable:.3g}x ({cost.unit}) can. "
        f"Ask for --budget {np.floor(reachable * 100) / 100:.2f}x or less."
    )
