"""What each action costs: FLOPs counted from the model, or milliseconds measured on a device. JSON v1.

step.fixed        everything of a step outside its sites
step.all_cached   a whole step in which every site is R
step.stack[K-1]   a whole S step that forecasts from K sources
sites.<key>       C, R, F[K-1], and P as points (k, cost), linear between them; k = 0 costs what R costs;
                  map: attention weights beside the output, for a token rule that needs them (k rows pay k / N of it)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, MismatchError
from .files import checked, exact_keys, header, is_number, of_type, read_json, write_json
from .rules import MAPPED, observed_steps
from .schedule import Plan, Schedule

FORMAT, VERSION = "sodaprof.cost", 1


@dataclass(frozen=True)
class SiteCost:
    """What the cells of a site cost by action, in the unit of the cost model."""

    C: float
    R: float
    F: tuple[float, ...]  # K = 1…4
    P: tuple[tuple[int, float], ...]  # (k, cost), k ascending
    map: float = 0.0

    def prune(self, k: Any) -> Any:
        """Cost of recomputing k tokens; k may be an array."""
        ks, costs = zip(*self.P, strict=True)
        return np.where(np.asarray(k) == 0, self.R, np.interp(k, ks, costs))


@dataclass(frozen=True)
class StepCost:
    fixed: float
    all_cached: float
    stack: tuple[float, ...]  # K = 1…4


@dataclass(frozen=True)
class TransformerCost:
    step: StepCost
    sites: dict[str, SiteCost]

    @property
    def full(self) -> float:
        """A step in which every site is C."""
        return self.step.fixed + sum(site.C for site in self.sites.values())


@dataclass(frozen=True)
class CostModel:
    """What the steps of a denoising loop cost, guidance branches included: in FLOPs, or in a device's milliseconds."""

    unit: str  # "flops" or "ms"
    device: str
    dtype: str
    batch: int
    tokens: int
    transformers: dict[str, TransformerCost]
    loop: dict[str, float]  # scheduler, update, guidance: paid at each step
    outside: dict[str, float | None]  # text_encoder, vae: not part of the loop; None where not counted

    def loop_step(self, updated: bool) -> float:
        """What guidance and scheduler (or the fitted update in its place) cost at a step."""
        return self.loop["guidance"] + self.loop["update" if updated else "scheduler"]

    def schedule(self, schedule: Schedule) -> float:
        """Predicted cost of the denoising loop under `schedule`."""
        check_covers(self, {name: list(plan.rows) for name, plan in schedule.transformers.items()})
        loop = schedule.steps * self.loop_step(schedule.update is not None)
        base = schedule.token_rule.base if schedule.token_rule else ""
        plans = schedule.transformers.items()
        return loop + sum(
            _plan_cost(self.transformers[n], p) + _map_cost(self.transformers[n], p, base) for n, p in plans
        )

    def all_compute(self, schedule: Schedule) -> float:
        """Cost of the same loop with every site C at every step."""
        called = {n: sum(action != "_" for action in p.stack) for n, p in schedule.transformers.items()}
        return schedule.steps * self.loop_step(False) + sum(self.transformers[n].full * c for n, c in called.items())

    def speedup(self, schedule: Schedule) -> float:
        return self.all_compute(schedule) / self.schedule(schedule)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION} | asdict(self)


def check_covers(cost: CostModel, sites: dict[str, list[str]]) -> None:
    """Raises MismatchError unless the cost table is of these sites, by transformer."""
    for name, keys in sites.items():
        known = cost.transformers[name].sites if name in cost.transformers else {}
        if missing := [key for key in keys if key not in known]:
            raise MismatchError(
                f"The cost table has no costs for {name}/{missing[0]} ({len(missing)} sites missing). "
                "Take the cost.flops.json or cost.json of the same model."
            )
        if others := [key for key in known if key not in keys]:
            raise MismatchError(
                f"The cost table has costs for {name}/{others[0]}, which this model has not ({len(others)} such sites). "
                "Take the cost.flops.json or cost.json of the same model."
            )


def _plan_cost(cost: TransformerCost, plan: Plan) -> float:
    total = 0.0
    used = {site: {"P": 0, "F": 0} for site in plan.rows}
    stack_cells = iter(plan.stack_forecasts)
    for step, stack in enumerate(plan.stack):
        if stack in "-_":
            continue
        column = {site: row[step] for site, row in plan.rows.items()}
        if stack == "S":
            total += cost.step.stack[len(next(stack_cells).sources) - 1]
        elif set(column.values()) == {"R"}:
            total += cost.step.all_cached
            continue
        else:
            total += cost.step.fixed
        for site, action in column.items():
            table = cost.sites[site]
            if action == "C":
                total += table.C
            elif action == "R":
                total += table.R
            elif action == "P":
                total += float(table.prune(plan.k[site][used[site]["P"]]))
                used[site]["P"] += 1
            elif action == "F":
                total += table.F[len(plan.forecasts[site][used[site]["F"]].sources) - 1]
                used[site]["F"] += 1
    return total


def _map_cost(cost: TransformerCost, plan: Plan, base: str) -> float:
    """Cost of the attention weights that a token rule of this base has computed: none for value norms."""
    total = 0.0
    for site, steps in observed_steps(plan, base).items() if base in MAPPED else ():
        for step in steps:
            computed = plan.tokens(site)
            if plan.rows[site][step] == "P":
                computed = plan.k[site][plan.cell(site, step, "P")]
            total += cost.sites[site].map * computed / plan.tokens(site)
    return total


def save_cost(cost: CostModel, path: Path, *, force: bool = False) -> None:
    write_json(path, cost.to_json(), force=force)


def load_cost(path: str | Path) -> CostModel:
    """Returns the cost table in `path`. Raises FormatError where it is broken, negative or incomplete."""
    where = str(path)
    data = header(read_json(Path(path)), FORMAT, VERSION, where)
    return checked(lambda: _from_json(data, where), where)


def cost_of(folder: Path, cost: str | Path) -> CostModel:
    """Returns the cost table that `cost` names: "flops" for the folder's own count, or the path of a cost.json."""
    return load_cost(folder / "cost.flops.json" if str(cost) == "flops" else cost)


def _from_json(data: dict[str, Any], where: str) -> CostModel:
    fields = {"unit", "device", "dtype", "batch", "tokens", "transformers", "loop", "outside"}
    exact_keys(data, fields | {"format", "version"}, where)
    if data["unit"] not in ("flops", "ms"):
        raise FormatError(f"{where}: unit {data['unit']!r}; expected flops or ms. Write the file again.")
    exact_keys(data["loop"], {"scheduler", "update", "guidance"}, f"{where}: loop")
    exact_keys(data["outside"], {"text_encoder", "vae"}, f"{where}: outside")

    def amount(value: Any) -> float:
        if not is_number(value) or value < 0:
            raise FormatError(
                f"{where}: found the cost {value!r}; expected a number of at least 0. Write the file again."
            )
        return float(value)

    def amounts(values: Any, make: Callable[[Any], Any] = amount) -> tuple[Any, ...]:
        return tuple(make(v) for v in values)

    def point(pair: Any) -> tuple[int, float]:
        k, value = pair
        return of_type(k, int, f"{where}: k"), amount(value)

    transformers = {}
    for name, entry in data["transformers"].items():
        exact_keys(entry, {"step", "sites"}, f"{where}: {name}")
        step = exact_keys(entry["step"], {"fixed", "all_cached", "stack"}, f"{where}: {name}: step")
        sites = {}
        for key, site in entry["sites"].items():
            exact_keys(site, {"C", "R", "F", "P", "map"}, f"{where}: {name}: {key}")
            points = amounts(site["P"], point)
            if not points or list(points) != sorted(points) or len(site["F"]) != 4:
                raise FormatError(
                    f"{where}: {name}: {key}: P needs points in order of k, and F four costs. Write the file again."
                )
            costs = amount(site["C"]), amount(site["R"]), amounts(site["F"]), points, amount(site["map"])
            sites[key] = SiteCost(*costs)
        stack = amounts(step["stack"])
        if len(stack) != 4:
            raise FormatError(
                f"{where}: {name}: step: stack needs four costs, found {len(stack)}. Write the file again."
            )
        known = TransformerCost(StepCost(amount(step["fixed"]), amount(step["all_cached"]), stack), sites)
        if not known.full > 0:
            raise FormatError(
                f"{where}: {name}: a full step costs nothing; expected more than 0. Write the file again."
            )
        transformers[name] = known
    return CostModel(
        unit=data["unit"],
        device=str(data["device"]),
        dtype=str(data["dtype"]),
        batch=int(data["batch"]),
        tokens=int(data["tokens"]),
        transformers=transformers,
        loop={k: amount(v) for k, v in data["loop"].items()},
        outside={k: None if v is None else amount(v) for k, v in data["outside"].items()},
    )
