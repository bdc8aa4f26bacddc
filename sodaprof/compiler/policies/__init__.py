"""The registry of policies: one file and one entry each. Command line, `mix`, messages and docs read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from .toca import ToCaKnobs, compile_duca, compile_toca


@dataclass(frozen=True)
class Policy:
    """A policy: a function from a problem and knobs to a signed schedule, and what others need to know of it."""

    compile: Callable[[Problem, Any], Schedule]
    knobs: type
    help: str  # one line: what happens between full steps
    reads: str = "none"  # tables of the profile
    depth: str = ""  # the knob that says how many outputs are kept; less of it takes less memory
    released: bool = False  # it has released settings, which hold if no budget is given
    mixed: bool = False  # `mix` measures it
    fits_update: bool = False  # its schedules have a fitted update of their own


POLICIES = {
    "solver": Policy(
        compile_solver, SolverKnobs, "the network is not called; the latents move by a fitted update", "products of states",
        depth="history", mixed=True, fits_update=True,
    ),
    "soda": Policy(compile_soda, SodaKnobs, "sites reuse, or recompute some tokens", "errors of reuse and pruning", mixed=True),
    "fora": Policy(compile_fora, ForaKnobs, "sites reuse; full steps at even intervals"),
    "toca": Policy(compile_toca, ToCaKnobs, "attention reuses, other sites recompute some tokens", released=True),
    "duca": Policy(compile_duca, ToCaKnobs, "as toca, or the stack is skipped", released=True),
    "forecast": Policy(
        compile_forecast, ForecastKnobs, "sites are forecast with fitted weights", "products of sites", depth="K", mixed=True
    ),
    "drift": Policy(
        compile_drift, DriftKnobs, "the stack is skipped, its drift forecast with fitted weights", "products of the stack",
        depth="K", mixed=True,
    ),
    "taylor": Policy(
        compile_taylor, TaylorKnobs, "sites are forecast by finite differences", "none; with placement=dp products of sites",
        depth="order",
    ),
    "dpcache": Policy(
        compile_dpcache, DPCacheKnobs, "the stack is skipped, its output extrapolated to first order", "products of the stack"
    ),
    "magcache": Policy(
        compile_magcache, MagCacheKnobs, "the stack is skipped, its newest drift reused", "products of the stack"
    ),
    "smoothcache": Policy(
        compile_smoothcache, SmoothCacheKnobs, "sites reuse, each kind at its own steps", "errors of reuse (L1)"
    ),
}  # fmt: skip
RELEASED = tuple(name for name, policy in POLICIES.items() if policy.released)
RENAMED = {"fit": "forecast"}  # former names, which are still accepted


def current_name(name: str) -> tuple[str, str]:
    """Returns the policy's name of today, and a note if `name` is a former one."""
    if name not in RENAMED:
        return name, ""
    return RENAMED[name], f"Policy {name} is called {RENAMED[name]} now."
