"""What a policy leaves open, settled on the model itself: compile several schedules, keep the one nearest to the full run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..compiler import compile_schedule
from ..compiler.policies import RELEASED
from ..errors import BudgetError, FormatError
from ..formats.schedule import Schedule
from ..measure.contenders import Contender, Run, nearness_db

PERIODS = range(2, 9)  # N of ToCa and DuCa
SAMPLES = 16  # calibration seeds that decide
BATCH = 16


def fit_schedule(
    pipe: Any,
    folder: str | Path,
    budget: str | float,
    policy: str,
    cost: str | Path = "flops",
    knobs: dict[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    max_cache: int | None = None,
    updated: bool = False,
) -> tuple[Schedule, list[dict[str, Any]]]:
    """Returns, for toca and duca, the schedule of the N in 2…8 that comes nearest to the full run, and all that were tried.

    At each N the policy chooses R for the budget; the mean PSNR over the first calibration seeds of the profile decides.
    max_cache, updated: as for `compile_schedule`.
    Raises BudgetError where the policy leaves nothing open or no N meets the budget, FormatError where `folder` holds
    no calibration seeds.
    """
    from ..formats.profile import load_profile

    knobs = knobs or {}
    if policy not in RELEASED or "N" in knobs:
        raise BudgetError(f"--fit chooses N for {' and '.join(RELEASED)}. Leave it out, or leave N out of the knobs.")
    if not (Path(folder) / "manifest.json").exists():
        raise FormatError(
            f"{folder}: no manifest.json, so no calibration seeds. Type: sodaprof profile MODEL -o {folder}"
        )
    profile = load_profile(folder)
    schedules, last = [], None
    for period in PERIODS:
        try:
            schedules.append(compile_schedule(folder, budget, policy, cost, knobs | {"N": period}, max_cache, updated))
        except BudgetError as error:
            last = error
    if not schedules:
        assert last is not None
        raise last
    request = profile.manifest
    full = Contender("full", "", profile.sampler.steps, 1.0)
    contenders = [Contender(policy, f"N={s.policy['knobs']['N']}", s.steps, 1.0, s) for s in schedules]
    seeds = range(request["seed"], request["seed"] + min(SAMPLES, request["samples"]))
    run = Run(pipe, request["prompts"], BATCH, profile.sampler.guidance_scale, None, on_progress)
    run.total = len(seeds) * (1 + len(contenders))
    run.all([full, *contenders], seeds)
    tried = [{"N": s.policy["knobs"]["N"], "R": s.policy["knobs"]["R"], "psnr_db": round(nearness_db(c, full), 3)}
             for s, c in zip(schedules, contenders, strict=True)]  # fmt: skip
    best = max(range(len(tried)), key=lambda i: tried[i]["psnr_db"])
    return schedules[best], tried
