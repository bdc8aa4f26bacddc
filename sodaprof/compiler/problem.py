"""From anchors and prune rates to a schedule: the one place where compilers draw rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..errors import BudgetError, UnsupportedModelError
from ..formats.cost import CostModel, check_covers
from ..formats.profile import Inspection, Profile
from ..formats.sampler import MAX_HISTORY, rounded
from ..formats.schedule import Forecast, Plan, Schedule, TokenRule, Update
from ..formats.sites import Model, Sampler
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


def draw_forecasts(
    model: Model, sampler: Sampler, anchors: Mapping[str, list[int]], cells: Mapping[str, dict[int, list[Forecast]]]
) -> Schedule:
    """Returns the schedule in which every site is C at the anchors and F elsewhere.

    cells: for each transformer {step: one forecast a site}.
    """
    plans = {}
    for name, transformer in model.transformers.items():
        row = _row(transformer.past(sampler.steps), anchors[name], "C", "F")
        rows = {site.key: row for site in transformer.sites}
        columns = [cells[name][step] for step in sorted(cells[name])]
        forecasts = {key: tuple(column[i] for column in columns) for i, key in enumerate(rows)} if columns else {}
        stack = _row(transformer.past(sampler.steps), anchors[name], ".", ".")
        plans[name] = Plan(transformer.class_name, transformer.fingerprint, rows, stack, forecasts=forecasts)
    return Schedule(plans, sampler, model.shape, {})


def draw_skips(
    model: Model, sampler: Sampler, anchors: Mapping[str, list[int]], cells: Mapping[str, dict[int, Forecast]]
) -> Schedule:
    """Returns the schedule in which every site is C at the anchors and the stack is skipped elsewhere.

    cells: for each transformer {step: the forecast of its last block's output or of its drift}.
    """
    plans = {}
    for name, transformer in model.transformers.items():
        past = transformer.past(sampler.steps)
        row, stack = _row(past, anchors[name], "C", "-"), _row(past, anchors[name], ".", "S")
        skips = tuple(cells[name][step] for step in sorted(cells[name]))
        rows = {site.key: row for site in transformer.sites}
        plans[name] = Plan(transformer.class_name, transformer.fingerprint, rows, stack, stack_forecasts=skips)
    return Schedule(plans, sampler, model.shape, {})


def draw_jumps(model: Model, sampler: Sampler, anchors: Sequence[int]) -> Schedule:
    """Returns the schedule in which every site is C at the anchors and the network is not called elsewhere; no update yet."""
    plans = {}
    for name, transformer in model.transformers.items():
        past = transformer.past(sampler.steps)
        row = _row(past, anchors, "C", "-")
        rows = {site.key: row for site in transformer.sites}
        plans[name] = Plan(transformer.class_name, transformer.fingerprint, rows, _row(past, anchors, ".", "-"))
    return Schedule(plans, sampler, model.shape, {})


def _row(past: list[int], anchors: Sequence[int], computed: str, other: str) -> str:
    return "".join("_" if age < 0 else computed if t in anchors else other for t, age in enumerate(past))


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
    """Bytes that are kept between the steps of one generation, both guidance branches included.

    One output for each site with R or P cells; for forecasts of a site or of the stack the most sources alive at once; the
    guided outputs that a fitted update weighs. Of transformers that take turns the one that keeps most: each begins
    with nothing.
    """
    branches = 1 if schedule.sampler.guidance_form == "none" else 2
    size = 4 if model.shape["dtype"] == "float32" else 2
    totals = []
    for name, plan in schedule.transformers.items():
        sites = model.transformers[name].sites
        total = _most_alive(plan.stack, "S", plan.stack_forecasts) * sites[-1].tokens * sites[-1].width
        for site in sites:
            row = plan.rows[site.key]
            outputs = bool(set(row) & set("RP")) + _most_alive(row, "F", plan.forecasts.get(site.key, ()))
            total += outputs * site.tokens * site.width
        totals.append(total * size * branches)
    outputs = schedule.update.history if schedule.update else 0
    return max(totals) + outputs * math.prod(model.shape["latent"]) * size


def _most_alive(row: str, action: str, cells: Iterable[Forecast]) -> int:
    """Returns how many outputs are held at once for the forecasts to come."""
    last: dict[int, int] = {}
    for step, cell in zip((t for t, a in enumerate(row) if a == action), cells, strict=True):
        last |= dict.fromkeys(cell.sources, step)
    return max((sum(s <= t <= last[s] for s in last) for t in range(len(row))), default=0)


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


def tables_of(policy: str, profile: Profile | None) -> Profile:
    """Returns the profile; BudgetError where there is none."""
    if profile is None:
        raise BudgetError(f"Policy {policy} needs a profile with tables. Measure them: sodaprof profile MODEL -o DIR")
    return profile


def one_of(knobs: Mapping[str, Any], name: str, allowed: Iterable[Any]) -> None:
    """Raises BudgetError unless the knob has one of the allowed values."""
    if knobs[name] not in (allowed := list(allowed)):
        raise BudgetError(f"Knob {name} is {knobs[name]!r}; expected one of {', '.join(map(str, allowed))}.")


def at_least(knobs: Mapping[str, Any], **least: float) -> None:
    """Raises BudgetError unless each of these knobs has at least its least value."""
    for name, value in least.items():
        if knobs[name] < value:
            raise BudgetError(f"Knob {name} is {knobs[name]}; expected at least {value:g}.")


def within(cost: float, allowed: float) -> bool:
    """Whether a cost keeps to what is allowed, but for rounding."""
    return cost <= allowed * (1 + 1e-9)


def unreachable(budget: float, reachable: float, cost: CostModel, longest: int = 0, steps: int = 0) -> BudgetError:
    """Returns the error of a budget that cannot be met.

    longest: steps from a full one to the next that the profile measured, where no more are taken; `steps` is what a turn has.
    """
    more = f" {measured_no_longer(longest)}" if longest < steps else ""
    return BudgetError(
        f"A budget of {budget:.4g}x cannot be met: at most {reachable:.3g}x ({cost.unit}) can. "
        f"Ask for --budget {np.floor(reachable * 100) / 100:.2f}x or less.{more}"
    )


def measured_no_longer(longest: int) -> str:
    """Returns what bounds placements between full steps that the profile measured up to `longest` apart, and what to do."""
    return (
        f"Full steps stand at most {longest} apart, as far as the profile measured; for longer intervals profile again: sodaprof "
        f"profile MODEL --max-interval {longest + 1} (or more) -o DIR"
    )


def beside_update(source: Inspection, cost: CostModel, ratio: float) -> float:
    """Returns the speed-up to compile for that leaves `ratio` once a fitted update takes the place of the scheduler's step."""
    full, _ = reuse_only_cost(source.model, source.sampler, cost)
    more = source.sampler.steps * (cost.loop_step(True) - cost.loop_step(False))
    if full / ratio <= more:
        raise unreachable(ratio, full / more, cost)
    return max(1.0, full / (full / ratio - more))


def with_own_update(schedule: Schedule, source: Inspection, cost: CostModel) -> Schedule:
    """Returns the schedule with the sampler's own steps as its update, of the longest history: what a fit starts from."""
    own = source.own_update()
    fitted = {"loop": "none", "guidance_scale": source.sampler.guidance_scale}
    update = Update(own.basis, MAX_HISTORY, rounded(own.padded(MAX_HISTORY)), fitted)
    found = replace(schedule, update=update)
    spent = {"speedup": cost.speedup(found), "cost": cost.schedule(found)}
    return _kept(replace(found, predicted=(schedule.predicted or {}) | spent), source)


def _kept(schedule: Schedule, source: Inspection) -> Schedule:
    """Returns the schedule with its memory counted anew."""
    return replace(
        schedule, predicted=(schedule.predicted or {}) | {"cache_bytes": cache_bytes(schedule, source.model)}
    )


def within_cache(
    schedule: Schedule, most: int, knob: str | None, again: Callable[[dict[str, Any]], Schedule], source: Inspection
) -> Schedule:
    """Returns the schedule, or one with less of `knob`, whose caches take at most `most` bytes; BudgetError where none does.

    An update that is still the sampler's own is first cut to as few outputs as the sampler itself weighs.
    """
    while True:
        for one in (schedule, *_shorter(schedule, source)):
            if (kept := one.predicted["cache_bytes"] if one.predicted else 0) <= most:
                return one
        if not knob or schedule.policy["knobs"][knob] <= 1:
            raise BudgetError(
                f"The caches of one generation take {kept:,} bytes, at most {most:,} are allowed (--max-cache). Allow as much, "
                "or take a policy that keeps less: solver keeps a few latents, drift a few outputs of the last block."
            )
        schedule = again({knob: schedule.policy["knobs"][knob] - 1})


def _shorter(schedule: Schedule, source: Inspection) -> list[Schedule]:
    """Returns the schedule with ever fewer outputs in its update, down to the sampler's own; none where it is fitted already."""
    update = schedule.update
    if update is None or update.fitted["loop"] != "none":
        return []
    lengths = range(update.history - 1, source.own_update().history - 1, -1)
    cut = [replace(update, history=n, coefficients=tuple(row[: 1 + n] for row in update.coefficients)) for n in lengths]
    return [_kept(replace(schedule, update=one), source) for one in cut]
