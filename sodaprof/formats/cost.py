"""What each action costs: FLOPs counted from the model, or milliseconds measured on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from ..errors import MismatchError
from .files import MOST, WHOLE, PositiveInt, Record, decode, read_json, write_json
from .rules import MAPPED, observed_steps
from .schedule import Plan, Schedule

Amount = Annotated[int, Meta(ge=0, le=WHOLE)] | Annotated[float, Meta(ge=0, le=MOST)]
Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
BySources = Annotated[tuple[Amount, ...], Meta(min_length=4, max_length=4)]  # K = 1…4


class SiteCost(Record, frozen=True):
    """What the cells of a site cost by action, in the unit of the cost model."""

    C: Amount
    R: Amount
    F: BySources
    P: Annotated[tuple[tuple[Tokens, Amount], ...], Meta(min_length=1)]  # (k, cost), k ascending; linear between them
    map: Amount = 0.0  # of the attention weights that a token rule reads; k rows cost k / N of it

    def __post_init__(self) -> None:
        if list(self.P) != sorted(self.P):
            raise ValueError("`P` needs points in rising order of k")

    def prune(self, k: Any) -> Any:
        """Returns the cost of recomputing k tokens, of none that of R; k may be an array."""
        ks, costs = zip(*self.P, strict=True)
        return np.where(np.asarray(k) == 0, self.R, np.interp(k, ks, costs))


class StepCost(Record, frozen=True):
    """What a step costs as a whole."""

    fixed: Amount  # everything outside the sites
    all_cached: Amount  # a whole step in which every site is R
    stack: BySources  # a whole S step


class TransformerCost(Record, frozen=True):
    """What the steps of one transformer cost."""

    step: StepCost
    sites: dict[str, SiteCost]

    def __post_init__(self) -> None:
        if not self.full > 0:
            raise ValueError("a full step costs nothing; expected more than 0")

    @property
    def full(self) -> float:
        """A step in which every site is C."""
        return self.step.fixed + sum(site.C for site in self.sites.values())


class CostModel(Record, frozen=True):
    """What the steps of a denoising loop cost, all guidance branches included, in FLOPs or in milliseconds of a device."""

    FORMAT = "sodaprof.cost", 1
    unit: Literal["flops", "ms"]
    device: str
    dtype: str
    batch: PositiveInt
    tokens: PositiveInt
    transformers: dict[str, TransformerCost]
    loop: Annotated[dict[Literal["scheduler", "update", "guidance"], Amount], Meta(min_length=3)]  # paid at each step
    outside: Annotated[dict[Literal["text_encoder", "vae"], Amount | None], Meta(min_length=2)]  # null: not counted

    def loop_step(self, updated: bool) -> float:
        """Returns what guidance and scheduler (or the fitted update in its place) cost at a step."""
        return self.loop["guidance"] + self.loop["update" if updated else "scheduler"]

    def schedule(self, schedule: Schedule) -> float:
        """Returns the predicted cost of the denoising loop under `schedule`."""
        check_covers(self, {name: list(plan.rows) for name, plan in schedule.transformers.items()})
        base = schedule.token_rule.base if schedule.token_rule else ""
        plans = [(self.transformers[name], plan) for name, plan in schedule.transformers.items()]
        inside = sum(_plan_cost(cost, plan) + _map_cost(cost, plan, base) for cost, plan in plans)
        return schedule.steps * self.loop_step(schedule.update is not None) + inside

    def all_compute(self, schedule: Schedule) -> float:
        """Returns the cost of the same loop with every site C at every step."""
        plans = schedule.transformers.items()
        inside = sum(self.transformers[name].full * len(plan.stack.replace("_", "")) for name, plan in plans)
        return schedule.steps * self.loop_step(False) + inside

    def speedup(self, schedule: Schedule) -> float:
        return self.all_compute(schedule) / self.schedule(schedule)


def check_covers(cost: CostModel, sites: dict[str, list[str]]) -> None:
    """Raises MismatchError unless the table has costs for exactly these sites, which are given by transformer."""
    for name, keys in sites.items():
        known = cost.transformers[name].sites if name in cost.transformers else {}
        found = ""
        if missing := [key for key in keys if key not in known]:
            found = f"no costs for {name}/{missing[0]} ({len(missing)} sites missing)"
        elif others := [key for key in known if key not in keys]:
            found = f"costs for {name}/{others[0]}, which this model does not have ({len(others)} such sites)"
        if found:
            raise MismatchError(f"The cost table has {found}. Take the cost.flops.json or cost.json of the same model.")


def _plan_cost(cost: TransformerCost, plan: Plan) -> float:
    total = 0.0
    for step, stack in enumerate(plan.stack):
        if stack in "-_":
            continue
        if all(row[step] == "R" for row in plan.rows.values()):
            total += cost.step.all_cached
            continue
        total += cost.step.stack[len(plan.stack_forecast(step).sources) - 1] if stack == "S" else cost.step.fixed
        for site, row in plan.rows.items():
            total += _cell_cost(cost.sites[site], plan, site, row[step], step)
    return total


def _cell_cost(cost: SiteCost, plan: Plan, site: str, action: str, step: int) -> float:
    if action == "P":
        return float(cost.prune(plan.computed(site, step)))
    if action == "F":
        return cost.F[len(plan.forecast(site, step).sources) - 1]
    return {"C": cost.C, "R": cost.R, "-": 0.0}[action]


def _map_cost(cost: TransformerCost, plan: Plan, base: str) -> float:
    """Returns the cost of the attention weights that a token rule of this base reads; 0 for a rule that reads none."""
    total = 0.0
    for site, steps in observed_steps(plan, base).items() if base in MAPPED else ():
        for step in steps:
            total += cost.sites[site].map * plan.computed(site, step) / plan.tokens(site)
    return total


def save_cost(cost: CostModel, path: Path, *, force: bool = False) -> None:
    """Writes the cost table atomically; FormatError if `path` exists and `force` is not set."""
    write_json(path, cost.to_json(), force=force)


def load_cost(path: str | Path) -> CostModel:
    """Returns the cost table in `path`; FormatError if it is broken, negative or incomplete."""
    return decode(read_json(Path(path)), CostModel, str(path))


def cost_of(folder: Path, cost: str | Path) -> CostModel:
    """Returns the cost table that `cost` names: "flops" for the folder's own count, or the path of a cost.json."""
    return load_cost(folder / "cost.flops.json" if str(cost) == "flops" else cost)
