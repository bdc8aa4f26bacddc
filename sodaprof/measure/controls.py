"""The controls of an evaluation: what the same cost buys without a compiled schedule.

FORA at the same cost, and fewer sampler steps: DDIM, DPM-Solver++ 2M and UniPC for discrete diffusions, Euler and the
two-step Adams-Bashforth formula for flows, on subsets of the full run's own timesteps with the same first one (even, and the
schedules' anchors), beside the schedulers' stock spacings.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ..compiler.policies.fora import ForaKnobs, compile_fora
from ..compiler.problem import Problem
from ..errors import BudgetError
from ..formats.cost import CostModel
from ..formats.schedule import Schedule
from ..formats.sites import Model, Sampler

DPM = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
DIFFUSION: dict[str, tuple[Any, dict[str, Any]]] = {  # first-order DPM-Solver++ is DDIM (Lu et al. 2022, 4.1)
    "DDIM": (DPMSolverMultistepScheduler, DPM | {"solver_order": 1}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, DPM | {"solver_order": 2}),
    "UniPC": (UniPCMultistepScheduler, {"solver_order": 2, "final_sigmas_type": "zero"}),
}
FLOW = ("Euler", "Adams-Bashforth")
FLOW_SCHEDULERS = ("RectifiedFlowScheduler", "FlowMatchEulerDiscreteScheduler")


@dataclass(frozen=True)
class FewerSteps:
    """A sampler with fewer steps in place of the pipeline's own. `timesteps` None: the scheduler's stock spacing."""

    solver: str
    spacing: str
    steps: int
    timesteps: tuple[float, ...] | None

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """Puts the sampler in place of the pipeline's scheduler while the block runs."""
        own = pipe.scheduler
        pipe.scheduler = self._scheduler(own)
        try:
            yield
        finally:
            pipe.scheduler = own

    def _scheduler(self, own: Any) -> Any:
        if self.solver in DIFFUSION:
            kind, settings = DIFFUSION[self.solver]
            spacing = {} if self.timesteps else {"timestep_spacing": self.spacing.removeprefix("stock ")}
            scheduler = kind.from_config(own.config, **settings, **spacing)
        else:
            scheduler = type(own).from_config(own.config)
        if self.timesteps is not None:
            _pin(scheduler, self.timesteps)
        if self.solver == "Adams-Bashforth":
            _extrapolate(scheduler)
        return scheduler


def _pin(scheduler: Any, timesteps: tuple[float, ...]) -> None:
    """Makes the scheduler take these timesteps whatever its own spacing is; called with as many steps."""
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines look at its signature
    def pinned(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps.new_tensor(timesteps)
        if hasattr(scheduler, "sigmas"):
            at = np.array(timesteps, dtype=np.float64)
            if hasattr(scheduler, "alphas_cumprod"):
                every = np.array(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5)
                at = np.interp(at, np.arange(len(every)), every)
            else:
                at /= scheduler.config.num_train_timesteps
            scheduler.sigmas = torch.from_numpy(np.append(at, 0.0).astype(np.float32)).to(scheduler.sigmas.device)

    scheduler.set_timesteps = pinned


def _extrapolate(scheduler: Any) -> None:
    """Turns Euler steps of a flow into steps of the two-step Adams-Bashforth formula: v + h / (2 h₋₁) · (v − v₋₁)."""
    euler, before = scheduler.step, list[torch.Tensor]()

    @functools.wraps(euler)
    def step(velocity: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        grid = [*scheduler.timesteps.tolist(), 0.0]
        at = grid.index(float(timestep))
        used = velocity
        if at:
            ratio = (grid[at] - grid[at + 1]) / (grid[at - 1] - grid[at])
            used = velocity + ratio / 2 * (velocity - before[0])
        before[:] = [velocity]
        return euler(used, timestep, sample, *args, **kwargs)

    scheduler.step = step


def fora_at(schedule: Schedule, model: Model, cost: CostModel, speedup: float) -> Schedule | None:
    """Returns FORA at this speed-up; None where the schedule is FORA itself or FORA cannot go there."""
    if schedule.policy["name"] == "fora":
        return None
    try:
        return compile_fora(Problem(model, schedule.sampler, cost, speedup), ForaKnobs())
    except BudgetError:
        return None


def full_steps(steps: int, speedup: float) -> int:
    """Returns how many of `steps` full steps the speed-up leaves."""
    return int(steps / speedup + 1e-9)


def fewer_steps_at(schedule: Schedule, count: int) -> list[FewerSteps]:
    """Returns the candidates of at most `count` steps; none under two, or where `solvers_for` knows no solver."""
    sampler = schedule.sampler
    solvers = solvers_for(sampler) if count >= 2 else ()
    flow = sampler.class_name in FLOW_SCHEDULERS
    own = [t if flow else round(t) for t in sampler.timesteps]
    even = tuple(own[round(i * sampler.steps / count)] for i in range(count)) if solvers else ()
    anchors = tuple(own[t] for t in schedule.anchors())
    stock = ("stock",) if flow else ("stock leading", "stock trailing")
    found = []
    for solver in solvers:
        found.append(FewerSteps(solver, "even", count, even))
        if 2 <= len(anchors) <= count and anchors != even:
            found.append(FewerSteps(solver, "anchors", len(anchors), anchors))
        found += [FewerSteps(solver, spacing, count, None) for spacing in stock]
    return found


def solvers_for(sampler: Sampler) -> tuple[str, ...]:
    """Returns the solvers that can take the sampler's place: none where its configuration is of neither family."""
    config = sampler.config
    if sampler.class_name in FLOW_SCHEDULERS:
        return () if config.get("invert_sigmas") or config.get("stochastic_sampling") else FLOW
    known = config.get("prediction_type", "epsilon") in ("epsilon", "v_prediction", "sample")
    return tuple(DIFFUSION) if known and "beta_schedule" in config else ()
