"""The registry of policies: one entry each, and one file, but for DuCa, which shares ToCa's. Command line and docs read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...formats.schedule import Schedule
from ..problem import Problem
from .dpcache import DPCacheKnobs, compile_dpcache
from .drift import DriftKnobs, compile_drift
from .fora import ForaKnobs, compile_fora
from .forecast import ForecastKnobs, compile_forecast
from .magcache import MagCacheKnobs, compile_magcache
from .smoothcache import SmoothCacheKnobs, compile_smoothcache
from .soda import SodaKnobs, compile_soda
from .solver import SolverKnobs, compile_solver
from .taylor import TaylorKnobs, compile_taylor
from .toca import ToCaKnobs, compile_toca

STATES, SITES, STACK = (f"products of {what}" for what in ("states", "sites", "the stack"))


@dataclass(frozen=True)
class Policy:
    """A function from a problem and knobs to a schedule that names its policy, and the description of it."""

    compile: Callable[[Problem, Any], Schedule]
    knobs: type
    help: str  # one line: what happens between full steps
    reads: str = "none"  # tables of the profile
    released: bool = False  # it has released settings, which apply if no budget is given
    mixed: bool = False  # one of the candidates that `mix` measures
    fits_update: bool = False  # its schedules have a fitted update of their own


POLICIES = {
    "solver": Policy(compile_solver, SolverKnobs, "no network, a fitted update", STATES, mixed=True, fits_update=True),
    "soda": Policy(compile_soda, SodaKnobs, "sites reuse or prune", "errors of reuse and pruning", mixed=True),
    "fora": Policy(compile_fora, ForaKnobs, "sites reuse; full steps at even intervals"),
    "toca": Policy(compile_toca, ToCaKnobs, "attention reuses, other sites prune", released=True),
    "duca": Policy(partial(compile_toca, duca=True), ToCaKnobs, "as toca, or the stack is skipped", released=True),
    "forecast": Policy(compile_forecast, ForecastKnobs, "sites are forecast, fitted weights", SITES, mixed=True),
    "drift": Policy(
        compile_drift, DriftKnobs, "the stack is skipped, its drift forecast, fitted weights", STACK, mixed=True
    ),
    "taylor": Policy(compile_taylor, TaylorKnobs, "sites are forecast by finite differences", f"none; or {SITES}"),
    "dpcache": Policy(compile_dpcache, DPCacheKnobs, "the stack is skipped, its output extrapolated", STACK),
    "magcache": Policy(compile_magcache, MagCacheKnobs, "the stack is skipped, its newest drift reused", STACK),
    "smoothcache": Policy(
        compile_smoothcache, SmoothCacheKnobs, "kinds of sites reuse by a threshold", "errors of reuse"
    ),
}
RELEASED = tuple(name for name, policy in POLICIES.items() if policy.released)
RENAMED = {"fit": "forecast"}  # former names, which are still accepted


def current_name(name: str) -> tuple[str, str]:
    """Returns the policy's name of today, and a note if `name` is a former one."""
    if name not in RENAMED:
        return name, ""
    return RENAMED[name], f"Policy {name} is called {RENAMED[name]} now."
