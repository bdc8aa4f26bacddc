"""The controls of an evaluation, baselines at equal cost: FORA, and fewer steps of a plain sampler.

DDIM, DPM-Solver++ 2M and UniPC for discrete diffusions, Euler and two-step Adams-Bashforth for flows, at evenly spaced
timesteps of the full run, at those of the schedule's full steps, or in the scheduler's stock spacing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
from ..pipelines.patch import patched

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
    """A sampler with fewer steps instead of the pipeline's own. `timesteps` None: the scheduler's stock spacing."""

    solver: str
    spacing: str
    steps: int
    timesteps: tuple[float, ...] | None

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """Replaces the pipeline's scheduler by this sampler while the block runs."""
        with ExitStack() as changes:
            changes.callback(setattr, pipe, "scheduler", pipe.scheduler)
            pipe.scheduler = scheduler = self._scheduler(pipe.scheduler)
            if self.timesteps is not None:
                changes.enter_context(_pinned(scheduler, self.timesteps))
            if self.solver == "Adams-Bashforth":
                changes.enter_context(_extrapolated(scheduler))
            yield

    def _scheduler(self, own: Any) -> Any:
        if self.solver in DIFFUSION:
            kind, settings = DIFFUSION[self.solver]
            spacing = {} if self.timesteps else {"timestep_spacing": self.spacing.removeprefix("stock ")}
            return kind.from_config(own.config, **settings, **spacing)
        return type(own).from_config(own.config)


def _pinned(scheduler: Any, timesteps: tuple[float, ...]) -> AbstractContextManager[None]:
    """Makes `set_timesteps`, called with as many steps, set these timesteps instead of the scheduler's own spacing."""

    def pinned(set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps.new_tensor(timesteps)
        if hasattr(scheduler, "sigmas"):
            sigmas = np.array(timesteps, dtype=np.float64)
            if hasattr(scheduler, "alphas_cumprod"):
                every = np.array(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5)
                sigmas = np.interp(sigmas, np.arange(len(every)), every)
            else:
                sigmas /= scheduler.config.num_train_timesteps
            scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32)).to(scheduler.sigmas.device)

    return patched(scheduler, "set_timesteps", pinned)


def _extrapolated(scheduler: Any) -> AbstractContextManager[None]:
    """Makes the scheduler's Euler steps follow the two-step Adams-Bashforth formula: v + h / (2 h₋₁) · (v − v₋₁)."""
    before: list[torch.Tensor] = []

    def step(euler: Callable[..., Any], velocity: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        grid = [*scheduler.timesteps.tolist(), 0.0]
        i = grid.index(float(timestep))
        used = velocity
        if i:
            ratio = (grid[i] - grid[i + 1]) / (grid[i - 1] - grid[i])
            used = velocity + ratio / 2 * (velocity - before[0])
        before[:] = [velocity]
        return euler(used, timestep, *args, **kwargs)

    return patched(scheduler, "step", step)


def fora_at(schedule: Schedule, model: Model, cost: CostModel, speedup: float) -> Schedule | None:
    """Returns FORA at this speed-up; None if the schedule is FORA itself or FORA cannot meet it."""
    if schedule.policy["name"] == "fora":
        return None
    try:
        return compile_fora(Problem(model, schedule.sampler, cost, speedup), ForaKnobs())
    except BudgetError:
        return None


def full_steps(steps: int, speedup: float) -> int:
    """Returns how many of `steps` full steps the speed-up allows."""
    return int(steps / speedup + 1e-9)


def fewer_steps_at(schedule: Schedule, count: int) -> list[FewerSteps]:
    """Returns the candidates of at most `count` steps; none under two, or if `solvers_for` has no solver."""
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
    """Returns the solvers that can replace the sampler; none if its configuration is of neither family."""
    config = sampler.config
    if sampler.class_name in FLOW_SCHEDULERS:
        return () if config.get("invert_sigmas") or config.get("stochastic_sampling") else FLOW
    known = config.get("prediction_type", "epsilon") in ("epsilon", "v_prediction", "sample")
    return tuple(DIFFUSION) if known and "beta_schedule" in config else ()
