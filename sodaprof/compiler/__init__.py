"""Compilers: from a profile and a cost table to a schedule, by arithmetic alone.

One file a policy, one signature: (model, sampler, profile | None, cost, budget, knobs) -> Schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cost import CostModel, load_cost
from ..errors import BudgetError
from ..legal import verify
from ..profiles import load_inspection, load_profile
from ..schedule import Schedule
from .fora import compile_fora
from .soda import compile_soda
from .toca import compile_duca, compile_toca

POLICIES: dict[str, Callable[..., Schedule]] = {
    "soda": compile_soda,
    "fora": compile_fora,
    "toca": compile_toca,
    "duca": compile_duca,
}
RELEASED = ("toca", "duca")  # policies with released settings, which hold where no budget is given


def compile_schedule(
    folder: str | Path,
    budget: str | float | None = None,
    policy: str = "soda",
    cost: str | Path = "flops",
    knobs: dict[str, Any] | None = None,
) -> Schedule:
    """Returns the schedule that `policy` compiles from the profile in `folder` for a speed-up of the denoising loop.

    budget: "2.0x" or 2.0; by default 2.0x, for toca and duca what their released settings give.
    cost: "flops" for the folder's own count, or the path of a cost.json. Raises BudgetError
    where the budget cannot be met, FormatError where a file is broken.
    """
    if policy not in POLICIES:
        raise BudgetError(f"No policy {policy!r}; there are {', '.join(POLICIES)}. Try --policy soda")
    ratio = 0.0 if budget is None and policy in RELEASED else parse_budget(2.0 if budget is None else budget)
    folder = Path(folder)
    has_tables = (folder / "manifest.json").exists() or policy == "soda"
    source = load_profile(folder) if has_tables else load_inspection(folder)
    table = load_cost(folder / "cost.flops.json" if str(cost) == "flops" else cost)
    profile = source if has_tables else None
    compile_with = lambda costs: POLICIES[policy](source.model, source.sampler, profile, costs, ratio, knobs or {})  # noqa: E731
    try:
        schedule = compile_with(table)
    except BudgetError as error:
        if table.unit != "ms" or not _possible(compile_with, load_cost(folder / "cost.flops.json")):
            raise
        raise BudgetError(f"{error} FLOPs alone would allow it: {_overhead(table)}.") from None
    verify(schedule)
    return schedule


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
