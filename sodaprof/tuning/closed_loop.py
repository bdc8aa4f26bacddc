"""An update fitted on the model itself, step after step on its own accelerated trajectory, in closed form.

At each step the weights of the state and of the newest outputs are those that bring the calibration generations nearest to the
full run's next state. Forecasts are fitted first: of sites to the outputs of the full run, of the stack to guided outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from ..compiler.fit import RunState, Stepper
from ..compiler.forecasts import DIGITS, ridge
from ..formats.cost import CostModel
from ..formats.profile import Profile
from ..formats.sampler import MAX_HISTORY, RIDGE, rounded
from ..formats.schedule import Forecast, Plan, Schedule, Update
from ..pipelines.replay import Replay, ReplaySpace
from ..runtime.apply import Handle, apply
from ..runtime.hooks.sites import SiteRow
from ..runtime.hooks.stack import StackRow, block_of

SAMPLES = 20  # calibration generations of a fit


class Fit:
    """A closed-loop fit of a schedule's update and of the weights of its F and S cells, which can continue another fit.

    resumable: other fits may continue this one at any step; all sources of stack forecasts are kept for them. Only for
    schedules whose sites keep no cache.
    """

    def __init__(self, replay: Replay, schedule: Schedule, resumable: bool = False) -> None:
        self.replay, self.schedule, self.resumable = replay, schedule, resumable
        self.history = schedule.update.history if schedule.update else MAX_HISTORY
        self.ats: list[RunState[Tensor]] = [RunState(replay.states[0])]  # before each step taken and after the last
        self.rows: list[tuple[float, ...]] = []  # of the update
        self.stack_cells: dict[int, Forecast] = {}  # S step -> its forecast
        self.site_cells: dict[int, dict[str, Forecast]] = {}  # step -> site -> the forecast of its F cell
        self.snapshots: list[Any] = [{}]  # what the stack row keeps, for each of `ats` if resumable

    def resume_from(self, other: Fit, steps: int) -> None:
        """Begins after the first `steps` of a resumable fit whose schedule is the same at these steps."""
        self.ats, self.rows = other.ats[: steps + 1], other.rows[:steps]
        self.snapshots = other.snapshots[: steps + 1]
        self.stack_cells = {step: cell for step, cell in other.stack_cells.items() if step < steps}

    def run(self, on_step: Callable[[], None] = lambda: None) -> np.ndarray:
        """Takes the remaining steps and returns each generation's distance to the full run, dB."""
        actions = plan_of(self.schedule).stack
        stack_targets, site_targets = self._stack_targets(), self._site_targets()
        with attached(self.replay, self.schedule) as handle:
            stack = handle.executor.stacks[0] if handle and handle.executor.stacks else None
            if stack is not None:
                stack.cells |= self.stack_cells
                stack.memory = self.snapshots[-1]
                stack.memory = stack.snapshot()  # a copy: the other fit keeps its own
                if self.resumable:
                    stack.keep_all()

            def fit_forecasts(step: int) -> None:
                if handle and step in site_targets:
                    self.site_cells[step] = self._fit_sites(handle.executor.rows, step, site_targets[step])
                if stack is not None and step in stack_targets:
                    self.stack_cells[step] = self._fit_stack(stack, step, stack_targets[step])

            space = ReplaySpace(self.replay, handle.executor.clock if handle else None, fit_forecasts)
            steps = Stepper(space, self.history).fit_update(lambda t: actions[t] != "-", self.ats[-1], len(self.rows))
            for coefficients, at in steps:
                self.rows.append(coefficients)
                self.ats.append(at)
                self.snapshots.append(stack.snapshot() if stack is not None and self.resumable else {})
                on_step()
        return fidelity_db(self.ats[-1].x, self.replay)

    def fitted(self) -> Schedule:
        """Returns the schedule with the fitted update and weights, marked as closed loop on the replay's generations."""
        ((name, plan),) = self.schedule.transformers.items()
        of_stack = tuple(cell for _, cell in sorted(self.stack_cells.items()))
        of_sites = {
            site: tuple(cells[site] for _, cells in sorted(self.site_cells.items()) if site in cells)
            for site in plan.forecasts
        }
        fitted = {
            "loop": "closed", "guidance_scale": self.schedule.sampler.guidance_scale,
            "seed": self.replay.seeds[0], "samples": len(self.replay.seeds),
        }  # fmt: skip
        update = Update(self.replay.update.basis, self.history, tuple(self.rows), fitted)
        plan = replace(plan, forecasts=of_sites, stack_forecasts=of_stack)
        return replace(self.schedule, transformers={name: plan}, update=update, measured=())

    def _stack_targets(self) -> dict[int, Tensor]:
        """Returns for each remaining S step the guided value of the full run that its forecast is fitted to."""
        plan = plan_of(self.schedule)
        first, *_, last = map(block_of, plan.rows)  # in execution order
        steps = [step for step, action in enumerate(plan.stack) if action == "S"]
        return {
            step: self.replay.through_stack(step, first, last, cell.form)
            for step, cell in zip(steps, plan.stack_forecasts, strict=True)
            if step >= len(self.rows)
        }

    def _site_targets(self) -> dict[int, dict[str, Tensor]]:
        """Returns for each remaining step that has F cells the outputs of their sites in the full run."""
        plan = plan_of(self.schedule)
        layouts = {site: plan.layout(site) for site in plan.rows}
        steps = [step for step, cells in enumerate(zip(*plan.rows.values(), strict=True)) if "F" in cells]
        return {step: self.replay.at_sites(step, layouts) for step in steps if step >= len(self.rows)}

    def _fit_sites(self, rows: Sequence[SiteRow], step: int, targets: dict[str, Tensor]) -> dict[str, Forecast]:
        """Returns the F cells of a step with weights fitted to their targets, and sets them for the step's run."""
        found = {}
        for row in rows:
            if (forecast := row.cells[step].forecast) is None:
                continue
            kept = [row.memory[branch].sources for branch in sorted(row.memory)]
            sources = [
                self.replay.site_values([of_branch[source] for of_branch in kept], row.layout)
                for source in forecast.sources
            ]
            weights = forecast_weights(sources, targets[row.key])
            row.set_weights(step, weights)
            found[row.key] = replace(forecast, weights=weights)
        return found

    def _fit_stack(self, stack: StackRow, step: int, target: Tensor) -> Forecast:
        """Returns the S cell of a step with weights fitted to its target, and sets it for the step's run."""
        sources = [self.replay.guided(step, calls) for calls in stack.sources(step)]
        stack.cells[step] = replace(stack.cells[step], weights=forecast_weights(sources, target))
        return stack.cells[step]


def forecast_weights(sources: Sequence[Tensor], target: Tensor) -> tuple[float, ...]:
    """Returns the weights [K] that bring Σ w · source nearest to the target, of 6 significant digits.

    sources: newest first. Least squares with the ridge of policy `drift`, towards reuse.
    """
    flat = torch.stack([*sources, target]).flatten(1).double()
    products, count = (flat @ flat.T).cpu().numpy(), len(sources)
    weights = ridge(RIDGE)(products[None], np.arange(count), np.array([count]))[0, :, 0]
    return tuple(float(f"{weight:.{DIGITS}g}") for weight in weights)


def fit_update(
    replay: Replay, schedule: Schedule, on_step: Callable[[], None] = lambda: None
) -> tuple[Schedule, np.ndarray]:
    """Returns the schedule with its update fitted on the replay's generations, and each one's distance to the full run, dB.

    Steps that call the network do so under the schedule (caches, forecasts); the weights of F and S cells are fitted, too.
    Steps `-` only move the latents. A schedule without an update gets one of MAX_HISTORY outputs.
    """
    fit = Fit(replay, schedule)
    distances = fit.run(on_step)
    return fit.fitted(), distances


def with_predicted_cost(schedule: Schedule, cost: CostModel) -> Schedule:
    """Returns the schedule with speed-up and cost predicted anew: an update costs other than the scheduler's step."""
    before = schedule.predicted or {"error": None, "cache_bytes": 0}
    speed = {"unit": cost.unit, "speedup": cost.speedup(schedule), "cost": cost.schedule(schedule)}
    return replace(schedule, predicted=before | speed | {"error": None})


def calibration_replay(
    pipe: Any, profile: Profile, samples: int = SAMPLES, on_step: Callable[[], None] = lambda: None
) -> Replay:
    """Returns the full run of the profile's first calibration generations, all at once; several fits can share it."""
    request = profile.manifest
    seeds = range(request["seed"], request["seed"] + min(samples, request["samples"]))
    entries = [request["prompts"][i % len(request["prompts"])] for i in range(len(seeds))]
    return Replay(pipe, profile.sampler, entries, seeds, on_step)


def counted(total: int, on_progress: Callable[[int, int], None]) -> Callable[[], None]:
    """Returns a function that calls on_progress with the number of its calls so far and `total`."""
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    return on_step


def sampled_distances(replay: Replay, schedule: Schedule, on_step: Callable[[], None] = lambda: None) -> np.ndarray:
    """Returns each generation's distance to the full run, dB, sampled under a schedule; the sampler's own steps if no update."""
    update, actions = schedule.update or _own(replay), plan_of(schedule).stack
    with attached(replay, schedule) as handle:
        stepper = Stepper(ReplaySpace(replay, handle.executor.clock if handle else None), update.history)
        at = stepper.start()
        for step in range(replay.steps):
            if actions[step] != "-":
                at = stepper.computed(at, step)
            at = stepper.moved(at, step, update.coefficients[step])
            on_step()
    return fidelity_db(at.x, replay)


@contextmanager
def attached(replay: Replay, schedule: Schedule) -> Iterator[Handle | None]:
    """Attaches a schedule to the replay's pipeline while the block runs; yields None if it has full and skipped steps only."""
    if set(schedule.counts()) <= set("C-") and "S" not in plan_of(schedule).stack:
        yield None
        return
    with apply(replay.pipe, replace(schedule, update=_own(replay))) as handle:
        yield handle


def _own(replay: Replay) -> Update:
    """Returns the sampler's own steps as an update."""
    return Update(replay.update.basis, replay.update.history, rounded(replay.update.coefficients), {})


def plan_of(schedule: Schedule) -> Plan:
    """Returns the plan of the schedule's only transformer."""
    (plan,) = schedule.transformers.values()
    return plan


def fidelity_db(x: Tensor, replay: Replay) -> np.ndarray:
    """Returns −10 log10 of each generation's mean squared error of the last latents x, relative to the full run's; [B]."""
    full = replay.states[-1]
    error = (x - full).flatten(1).double().square().mean(1)
    ratio: np.ndarray = (full.double().square().mean() / error.clamp_min(1e-20)).cpu().numpy()
    return 10 * np.log10(ratio)
