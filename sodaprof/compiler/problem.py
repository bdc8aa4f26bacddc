"""The problem that a policy solves: a model, a sampler, a profile, a cost table and a budget; and the schedules drawn for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from msgspec.structs import replace

from ..errors import BudgetError, UnsupportedModelError
from ..formats.cost import CostModel, TransformerCost, check_covers
from ..formats.profile import Profile
from ..formats.sampler import MAX_HISTORY, OwnUpdate, rounded
from ..formats.schedule import Forecast, Plan, Schedule, TokenRule, Update
from ..formats.sites import Model, Sampler, Transformer
from ..version import __version__

FEATURE_MEAN = TokenRule(base="feature_mean")

# of each transformer, how many of its steps take an action at every site: (action, sources of its forecast) -> steps
WholeSteps = Mapping[str, Mapping[tuple[str, int], int]]
Loop = Schedule | WholeSteps
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What a policy receives. Raises MismatchError if the cost table is another model's."""

    model: Model
    sampler: Sampler
    cost: CostModel
    budget: float  # speed-up of the denoising loop; 0: what a policy's released settings give
    profile: Profile | None = None
    flops: CostModel | None = None  # next to a cost table in ms: to say whether FLOPs would allow a budget
    own_update: OwnUpdate | None = None  # the sampler's own steps, if an update replaces the scheduler's step

    def __post_init__(self) -> None:
        check_covers(self.cost, {name: [s.key for s in t.sites] for name, t in self.model.transformers.items()})

    def tables(self, policy: str) -> Profile:
        """Returns the profile; BudgetError if there is none."""
        if self.profile is None:
            raise BudgetError(
                f"Policy {policy} needs a profile with tables, and the folder has no manifest.json. Measure them: sodaprof "
                "profile MODEL -o DIR"
            )
        return self.profile

    def only_transformer(self, policy: str) -> tuple[str, Transformer]:
        """Returns the model's transformer and its name; UnsupportedModelError if there are several."""
        if len(self.model.transformers) != 1:
            names = ", ".join(self.model.transformers)
            raise UnsupportedModelError(
                f"{self.model.name} has several transformers ({names}); --policy {policy} takes one."
            )
        return next(iter(self.model.transformers.items()))

    @cached_property
    def turns(self) -> dict[str, list[range]]:
        """Each transformer's turns: runs of steps at which the pipeline calls it.

        Raises UnsupportedModelError unless exactly one transformer is called at each step.
        """
        past = {name: transformer.past(self.sampler.steps) for name, transformer in self.model.transformers.items()}
        if any(sum(p >= 0 for p in column) != 1 for column in zip(*past.values(), strict=True)):
            raise UnsupportedModelError(
                f"{self.model.name} has several transformers ({', '.join(self.model.transformers)}) that do not take turns; "
                "policies need one that is called at each step."
            )
        return {
            name: [range(t - age, t + 1) for t, (age, later) in enumerate(pairwise([*ages, -1])) if age >= 0 >= later]
            for name, ages in past.items()
        }

    @property
    def longest(self) -> int:
        """The longest interval between full steps that the profile measured."""
        assert self.profile is not None  # a policy without tables is not restricted by them
        return self.profile.max_age + 1

    def whole_steps(self, full: Mapping[str, int], action: str) -> WholeSteps:
        """Returns so many full steps of each transformer and the action at all its other steps."""
        own = {name: sum(map(len, turns)) for name, turns in self.turns.items()}
        return {name: {("C", 0): count, (action, 0): own[name] - count} for name, count in full.items()}

    def cost_of(self, loop: Loop) -> float:
        """Returns the cost of the denoising loop."""
        if isinstance(loop, Schedule):
            return self.cost.schedule(self._with_update(loop))
        return self.sampler.steps * self.cost.loop_step(self.own_update is not None) + sum(
            step_cost(self.cost.transformers[name], *column) * count
            for name, steps in loop.items()
            for column, count in steps.items()
        )

    @cached_property
    def full_cost(self) -> float:
        """The cost of the loop with every step full, under the scheduler's own step."""
        steps = self.sampler.steps
        called = {name: sum(age >= 0 for age in t.past(steps)) for name, t in self.model.transformers.items()}
        inside = sum(self.cost.transformers[name].full * count for name, count in called.items())
        return steps * self.cost.loop_step(False) + inside

    @property
    def allowed(self) -> float:
        """The cost that the budget leaves for the loop."""
        return self.full_cost / self.budget

    def speedup(self, loop: Loop) -> float:
        return self.full_cost / self.cost_of(loop)

    def meets(self, loop: Loop) -> bool:
        return within(self.cost_of(loop), self.allowed)

    def affordable(
        self, choices: Sequence[T], loop: Callable[[T], WholeSteps], anchors: int, bounded: bool = True
    ) -> list[T]:
        """Returns the choices whose loop meets the budget; unless `anchors` is 0, those with so many full steps in all.

        bounded: by the intervals that the profile measured. Raises BudgetError if there are none.
        """
        meeting = [choice for choice in choices if self.meets(loop(choice))]
        if not meeting:
            raise self.unreachable(min(map(loop, choices), key=self.cost_of), bounded=bounded)
        counts = [sum(steps["C", 0] for steps in loop(choice).values()) for choice in meeting]
        if anchors and anchors not in counts:
            more = self._measured_intervals() if bounded and anchors < min(counts) else ""
            raise BudgetError(
                f"Knob anchors is {anchors}; {min(counts)} to {max(counts)} full steps meet a budget of "
                f"{self.budget:.3g}x.{more}"
            )
        return [choice for choice, count in zip(meeting, counts, strict=True) if anchors in (0, count)]

    def threshold(self, given: float, draw: Callable[[float], Loop], **unreachable: Any) -> float:
        """Returns the given threshold, or for 0 the smallest, to 1e-6 of it, whose loop meets the budget.

        unreachable: arguments of the error if not even an infinite one does.
        """
        if given:
            self.check_given("threshold", given, draw(given))
            return given
        if not self.meets(draw(math.inf)):
            raise self.unreachable(draw(math.inf), **unreachable)
        if self.meets(draw(0.0)):
            return 0.0
        low, high = 0.0, 1e-6
        while not self.meets(draw(high)):
            low, high = high, 2 * high
        found = bisect(lambda value: self.meets(draw(value)), low, high, relative=1e-6)
        short = float(f"{found:.7g}")
        return short if self.meets(draw(short)) else found

    def check_given(self, name: str, value: float, loop: Loop, others: str = "") -> None:
        """Raises BudgetError if the loop under a given knob does not meet the budget. others: knobs that have a part in it."""
        if not self.meets(loop):
            raise BudgetError(
                f"{name}={value:g}{others} gives {self.speedup(loop):.3g}x, the budget is {self.budget:.3g}x. Leave out --knob "
                f"{name} to have it chosen for the budget.{self._flops_hint(loop)}"
            )

    def unreachable(self, cheapest: Loop, under: str = "", advice: str = "", bounded: bool = False) -> BudgetError:
        """Returns the error of a budget that not even the cheapest loop meets.

        under: knobs that restrict it, in words. advice: what else to change. bounded: by the intervals that were measured.
        """
        reachable = self.speedup(cheapest)
        return BudgetError(
            f"A budget of {self.budget:.4g}x cannot be met{under}: at most {reachable:.3g}x ({self.cost.unit}) can. "
            f"Ask for --budget {math.floor(reachable * 100) / 100:.2f}x or less{advice}."
            f"{self._flops_hint(cheapest)}{self._measured_intervals() if bounded else ''}"
        )

    def _measured_intervals(self) -> str:
        """Returns what bounds the intervals between full steps and what to do; "" if nothing does."""
        if self.longest >= max(len(turn) for own in self.turns.values() for turn in own):
            return ""
        return (
            f" Full steps are at most {self.longest} apart, the longest interval of the profile; for longer ones profile again: "
            f"sodaprof profile MODEL --max-interval {self.longest + 1} (or more) -o DIR"
        )

    def _flops_hint(self, loop: Loop) -> str:
        """Returns what limits a budget in ms that the loop would meet in FLOPs; "" if it would not."""
        if self.flops is None or not dataclasses.replace(self, cost=self.flops).meets(loop):
            return ""
        step = self.cost.loop_step(False)
        shares = [f"{t.step.all_cached + step:.3g} ms of {t.full + step:.3g}" for t in self.cost.transformers.values()]
        return (
            f" FLOPs alone would allow it: on this device a step that reuses everything takes {' or '.join(shares)}, scheduler "
            "and guidance included."
        )

    def signed(self, schedule: Schedule, policy: str, knobs: Any, error: float | None) -> Schedule:
        """Returns the schedule with its policy, knobs, profile and predictions, and an update if one is to be fitted."""
        schedule = self._with_update(schedule)
        predicted = {
            "unit": self.cost.unit,
            "speedup": self.cost.speedup(schedule),
            "cost": self.cost.schedule(schedule),
            "error": error,
            "cache_bytes": cache_bytes(schedule, self.model),
        }
        return replace(
            schedule,
            policy={"name": policy, "knobs": dataclasses.asdict(knobs)},
            profile=None if self.profile is None else self.profile.reference(),
            predicted=predicted,
            made_by=f"sodaprof {__version__}",
        )

    def _with_update(self, schedule: Schedule) -> Schedule:
        """Returns the schedule with the sampler's own steps as its update, of the longest history: what a fit starts from."""
        own = self.own_update
        if own is None or schedule.update is not None:
            return schedule
        fitted = {"loop": "none", "guidance_scale": self.sampler.guidance_scale}
        return replace(schedule, update=Update(own.basis, MAX_HISTORY, rounded(own.padded(MAX_HISTORY)), fitted))


def step_cost(table: TransformerCost, action: str, sources: int) -> float:
    """Returns the cost of a step at which every site takes the action: C, R, F, S (the stack) or - (no call)."""
    if action == "F":
        return table.step.fixed + sum(site.F[sources - 1] for site in table.sites.values())
    if action == "S":
        return table.step.stack[sources - 1]
    return {"C": table.full, "R": table.step.all_cached, "-": 0.0}[action]


def within(cost: float, allowed: float) -> bool:
    """Returns whether a cost is at most what is allowed, up to rounding."""
    return cost <= allowed * (1 + 1e-9)


def bisect(
    meets: Callable[[float], bool],
    low: float,
    high: float,
    absolute: float = 0.0,
    relative: float = 0.0,
    halvings: int = 200,
) -> float:
    """Returns the smallest value that meets, to a tolerance or after so many halvings; `high` meets."""
    for _ in range(halvings):
        if high - low <= max(absolute, relative * high):
            break
        middle = (low + high) / 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def cache_bytes(schedule: Schedule, model: Model) -> int:
    """Returns the bytes that are kept between the steps of one generation, both guidance branches included.

    One output for each site with R or P cells; for forecasts of a site or of the stack the most sources that are needed at
    once; the guided outputs that a fitted update weighs. Of transformers that take turns the one that keeps most counts.
    """
    branches = 1 if schedule.sampler.guidance_form == "none" else 2
    size = 4 if model.shape["dtype"] == "float32" else 2
    totals = []
    for name, plan in schedule.transformers.items():
        sites = model.transformers[name].sites
        total = _most_kept(plan.stack, "S", plan.stack_forecasts) * sites[-1].tokens * sites[-1].width
        for site in sites:
            row = plan.rows[site.key]
            outputs = bool(set(row) & set("RP")) + _most_kept(row, "F", plan.forecasts.get(site.key, ()))
            total += outputs * site.tokens * site.width
        totals.append(total * size * branches)
    outputs = schedule.update.history if schedule.update else 0
    return max(totals) + outputs * math.prod(model.shape["latent"]) * size


def _most_kept(row: str, action: str, cells: Iterable[Forecast]) -> int:
    """Returns how many outputs are kept at once for later forecasts."""
    last: dict[int, int] = {}
    for step, cell in zip((t for t, a in enumerate(row) if a == action), cells, strict=True):
        last |= dict.fromkeys(cell.sources, step)
    return max((sum(s <= t <= last[s] for s in last) for t in range(len(row))), default=0)


def draw_schedule(model: Model, sampler: Sampler, anchors: Sequence[int], prune: dict[str, np.ndarray]) -> Schedule:
    """Returns the schedule with these full steps, P if prune[transformer][t, s] >= 0 (k tokens), R elsewhere.

    A P cell that would recompute every token becomes C, which it is.
    """
    plans = {}
    for name, transformer in model.transformers.items():
        past, sites = transformer.past(sampler.steps), transformer.sites
        k = prune.get(name, np.full((sampler.steps, len(sites)), -1))
        full = np.isin(np.arange(sampler.steps), anchors)[:, None] | (k >= [site.tokens for site in sites])
        cells = np.select([np.array(past)[:, None] < 0, full, k < 0], ["_", "C", "R"], "P")
        rows = {site.key: "".join(cells[:, i]) for i, site in enumerate(sites)}
        ks = {key: tuple(k[cells[:, i] == "P", i].tolist()) for i, (key, row) in enumerate(rows.items()) if "P" in row}
        plans[name] = Plan(transformer.class_name, transformer.fingerprint, rows, _row(past, (), ".", "."), ks)
    pruned = any(plan.k for plan in plans.values())
    return Schedule(plans, sampler, model.shape, {}, token_rule=FEATURE_MEAN if pruned else None)


def draw_steps(
    model: Model,
    sampler: Sampler,
    anchors: Mapping[str, Sequence[int]],
    action: str,
    cells: Mapping[str, Mapping[int, Sequence[Forecast]]] | None = None,
) -> Schedule:
    """Returns the schedule of full steps at `anchors` and elsewhere F at every site, S or - (without an update).

    cells: of each transformer {step: forecasts}, for F one a site, for S that of the last block's output or of the drift.
    """
    plans = {}
    for name, transformer in model.transformers.items():
        past, keys = transformer.past(sampler.steps), [site.key for site in transformer.sites]
        row = _row(past, anchors[name], "C", "F" if action == "F" else "-")
        stack = _row(past, anchors[name], ".", "." if action == "F" else action)
        columns = [column for _, column in sorted((cells or {}).get(name, {}).items())]
        plan = Plan(transformer.class_name, transformer.fingerprint, dict.fromkeys(keys, row), stack)
        if action == "S":
            plan = replace(plan, stack_forecasts=tuple(column[0] for column in columns))
        elif columns:
            plan = replace(plan, forecasts={key: tuple(column[i] for column in columns) for i, key in enumerate(keys)})
        plans[name] = plan
    return Schedule(plans, sampler, model.shape, {})


def _row(past: list[int], anchors: Sequence[int], full: str, other: str) -> str:
    return "".join("_" if age < 0 else full if t in anchors else other for t, age in enumerate(past))
