"""Compilers: from a profile and a cost table to a schedule, by arithmetic alone.

One file a policy, one signature: (model, sampler, profile | None, cost, budget, knobs) -> Schedule.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import BudgetError, FormatError, UnsupportedModelError
from ..formats.cost import CostModel, check_covers, cost_of, load_cost
from ..formats.profile import load_inspection, load_profile
from ..formats.rules import verify
from ..formats.schedule import Schedule
from .policies.dpcache import compile_dpcache
from .policies.drift import compile_drift
from .policies.fora import compile_fora
from .policies.forecast import compile_fit
from .policies.magcache import compile_magcache
from .policies.smoothcache import compile_smoothcache
from .policies.soda import compile_soda
from .policies.solver import compile_solver
from .policies.taylor import compile_taylor
from .policies.toca import compile_duca, compile_toca
from .problem import beside_update, with_own_update, within_cache

LOG = logging.getLogger(__name__)
POLICIES: dict[str, Callable[..., Schedule]] = {
    "solver": compile_solver,
    "soda": compile_soda,
    "fora": compile_fora,
    "toca": compile_toca,
    "duca": compile_duca,
    "fit": compile_fit,
    "drift": compile_drift,
    "taylor": compile_taylor,
    "dpcache": compile_dpcache,
    "magcache": compile_magcache,
    "smoothcache": compile_smoothcache,
}
RELEASED = ("toca", "duca")  # policies with released settings, which hold where no budget is given
DEPTH = {
    "solver": "history",
    "fit": "K",
    "drift": "K",
    "taylor": "order",
}  # the knob by which a policy keeps more or less


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

    budget: "2.0x" or 2.0; by default 2.0x, for toca and duca what their released settings give. policy: by default
    `default_policy`, whose reason is logged where it is not `solver`.
    cost: "flops" for the folder's own count, or the path of a cost.json. max_cache: bytes that the caches of one generation
    may take; policies that forecast from several outputs are tried with fewer, unless a knob says how many. updated: with an
    update to be fitted closed loop, which budget and bytes leave room for; until then it is the sampler's own steps. Raises
    BudgetError where the budget or the bytes cannot be met, FormatError where a file is broken.
    """
    folder = Path(folder)
    if policy is None:
        policy, why = default_policy(folder)
        if why:
            LOG.warning("Policy %s: %s", policy, why)
    if policy == "mix":
        raise BudgetError(
            "Policy mix measures its candidates on the model. Type: sodaprof compile DIR --policy mix --fit MODEL -o FILE; "
            f"without a model, leave --policy out: {default_policy(folder)[0]} is taken for this profile."
        )
    if policy not in POLICIES:
        raise BudgetError(f"No policy {policy!r}; there are {', '.join(POLICIES)}. Try --policy soda")
    ratio = 0.0 if budget is None and policy in RELEASED else parse_budget(2.0 if budget is None else budget)
    has_tables = (folder / "manifest.json").exists() or policy == "soda"
    source = load_profile(folder) if has_tables else load_inspection(folder)
    table = cost_of(folder, cost)
    check_covers(table, {name: [site.key for site in t.sites] for name, t in source.model.transformers.items()})
    profile = source if has_tables else None
    given = knobs or {}
    with_update = updated and policy != "solver"  # which has one of its own

    def compile_with(costs: CostModel, more: dict[str, Any]) -> Schedule:
        asked = beside_update(source, costs, ratio) if with_update and ratio else ratio
        try:
            found = POLICIES[policy](source.model, source.sampler, profile, costs, asked, given | more)
        except BudgetError as error:
            if asked == ratio:
                raise
            raise BudgetError(f"{error} {asked:.4g}x leaves room for the update at {ratio:.4g}x.") from None
        return with_own_update(found, source, costs) if with_update else found

    try:
        schedule = compile_with(table, {})
    except BudgetError as error:
        if table.unit != "ms" or not _possible(
            lambda costs: compile_with(costs, {}), load_cost(folder / "cost.flops.json")
        ):
            raise
        raise BudgetError(f"{error} FLOPs alone would allow it: {_overhead(table)}.") from None
    if max_cache is not None:
        knob = None if DEPTH.get(policy) in given else DEPTH.get(policy)
        schedule = within_cache(schedule, max_cache, knob, lambda more: compile_with(table, more), source)
    verify(schedule)
    return schedule


def default_policy(folder: str | Path) -> tuple[str, str]:
    """Returns the policy for a profile where none is named, and why it is not `solver`, "" where it is.

    A fitted update is nearest to the full run at every budget that was measured (docs/studies/results.md); it needs a
    profile with inner products, one transformer, and a scheduler whose steps are linear. Raises FormatError where one of them is broken.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        return "soda", ""  # whose error says what is missing
    profile = load_profile(folder)
    if len(profile.model.transformers) > 1:
        return (
            "soda",
            f"a fitted update is for one transformer, {profile.model.name} has {len(profile.model.transformers)}.",
        )
    if "gram" not in profile.manifest["tables"]:
        return "soda", "the profile holds no inner products to fit an update from. Profile again without --no-gram."
    try:
        profile.own_update()
    except UnsupportedModelError as error:
        return "soda", str(error)
    except FormatError as error:
        if (folder / "solver.json").exists():  # broken, which is no reason to take another policy
            raise
        return "soda", str(error)
    return "solver", ""


def _possible(compile_with: Callable[[CostModel], Schedule], costs: CostModel) -> bool:
    try:
        compile_with(costs)
    except BudgetError:
        return False
    return True


def _overhead(cost: CostModel) -> str:
    """Returns what of a step's time no reuse can save."""
    loop = cost.loop_step(False)
    shares = [f"{p.step.all_cached + loop:.3g} ms of {p.full + loop:.3g}" for p in cost.transformers.values()]
    return f"on this device a step that reuses everything takes {' or '.join(shares)}, scheduler and guidance included"


def parse_budget(text: str | float) -> float:
    """Returns the speed-up that `2.0x` (or `2.0`) asks for; BudgetError unless it is a finite number of at least 1."""
    try:
        value = float(str(text).strip().removesuffix("x").removesuffix("X"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 1:
        raise BudgetError(f"The budget is {str(text)!r}; expected a speed-up of at least 1, as in --budget 2.0x")
    return value
