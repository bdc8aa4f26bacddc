"""The controls of an evaluation: what the same cost buys without a compiled schedule.

FORA at the same cost, and fewer sampler steps: DDIM and DPM-Solver++ 2M on subsets of the full run's own timesteps with
the same first one (even, and the schedule's anchors), beside the schedulers' stock spacings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import DPMSolverMultistepScheduler

from .compiler.fora import compile_fora
from .cost import CostModel
from .errors import BudgetError
from .schedule import Schedule
from .sites import Model, Sampler

SOLVERS = {"DDIM": 1, "DPM++ 2M": 2}  # name -> order; first-order DPM-Solver++ is DDIM (Lu et al. 2022, 4.1)


@dataclass(frozen=True)
class FewerSteps:
    """A sampler with fewer steps in place of the pipeline's own. `timesteps` None: the scheduler's stock spacing."""

    solver: str
    spacing: str
    steps: int
    timesteps: tuple[int, ...] | None

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """Puts the sampler in place of the pipeline's scheduler while the block runs."""
        own = pipe.scheduler
        given = {} if self.timesteps is not None else {"timestep_spacing": self.spacing.removeprefix("stock ")}
        scheduler = DPMSolverMultistepScheduler.from_config(
            own.config,
            algorithm_type="dpmsolver++",
            solver_order=SOLVERS[self.solver],
            final_sigmas_type="zero",
            **given,
        )
        if self.timesteps is not None:
            set_timesteps = scheduler.set_timesteps

            def fixed(num_inference_steps: int | None = None, device: Any = None, **kwargs: Any) -> None:
                set_timesteps(device=device, timesteps=list(self.timesteps or ()))

            scheduler.set_timesteps = fixed
        pipe.scheduler = scheduler
        try:
            yield
        finally:
            pipe.scheduler = own


def fora_at(schedule: Schedule, model: Model, cost: CostModel) -> Schedule | None:
    """Returns FORA at the schedule's predicted cost; None where the schedule is FORA itself or FORA cannot go there."""
    if schedule.policy["name"] == "fora":
        return None
    try:
        return compile_fora(model, schedule.sampler, None, cost, cost.speedup(schedule), {})
    except BudgetError:
        return None


def full_steps(schedule: Schedule, cost: CostModel) -> int:
    """Returns how many full steps the cost of the schedule pays for."""
    return int(schedule.steps / cost.speedup(schedule) + 1e-9)


def fewer_steps_at(schedule: Schedule, cost: CostModel) -> list[FewerSteps]:
    """Returns the candidates at the schedule's cost; none where its scheduler is not of the DDPM family."""
    sampler = schedule.sampler
    if not is_ddpm_family(sampler):
        return []
    count = full_steps(schedule, cost)
    if count < 2:
        return []
    own = [round(t) for t in sampler.timesteps]
    even = tuple(own[round(i * sampler.steps / count)] for i in range(count))
    anchors = tuple(own[t] for t in schedule.anchors())
    found = []
    for solver in SOLVERS:
        found.append(FewerSteps(solver, "even", count, even))
        if len(anchors) >= 2 and anchors != even:
            found.append(FewerSteps(solver, "anchors", len(anchors), anchors))
        found += [FewerSteps(solver, f"stock {spacing}", count, None) for spacing in ("leading", "trailing")]
    return found


def is_ddpm_family(sampler: Sampler) -> bool:
    """Whether the sampler's configuration describes a discrete diffusion that the controls can be built from."""
    return "beta_schedule" in sampler.config and sampler.config.get("prediction_type", "epsilon") in (
        "epsilon",
        "v_prediction",
        "sample",
    )
