"""A fitted state update from the model itself: step after step on the trajectory that the accelerated loop produces.

At each step the weights of the state and of the newest outputs are those that bring the calibration generations nearest to
the full run's state at that step; the next step goes on from where these weights lead. Where sites or the stack are forecast,
the forecasts' weights are fitted first, towards what site or stack gives in the full run; the stack's guided, for that is
what an error weighs in the picture. Closed form, one run of the accelerated loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ..formats.schedule import Forecast, Schedule, Update
from ..measure.metrics import worst_decile
from ..pipelines.clock import Clock
from ..pipelines.replay import Replay, ReplaySpace
from ..runtime.apply import Handle, apply
from ..runtime.checks import check_fits
from ..runtime.hooks.sites import SiteRow
from ..runtime.hooks.stack import StackRow, block_of

SAMPLES = 20  # calibration generations of a fit


class Fit:
    """A closed-loop fit of a schedule's update and of the weights of its F and S cells, which can begin where another one stood.

    resumable: others are to begin in the midst of this one, for which everything that the stack may be forecast from is kept;
    not where sites keep anything.
    """

    def __init__(
        self,
        replay: Replay,
        schedule: Schedule,
        history: int,
        strength: float = RIDGE,
        resumable: bool = False,
    ) -> None:
        self.replay, self.schedule, self.history, self.strength = replay, schedule, history, strength
        self.resumable = resumable
        self.ats: list[RunState[Tensor]] = [RunState(replay.states[0])]  # before each step taken and after the last
        self.rows: list[tuple[float, ...]] = []  # of the update
        self.cells: dict[int, Forecast] = {}  # S step -> its forecast
        self.at_sites: dict[int, dict[str, Forecast]] = {}  # step -> site -> the forecast of its F cell
        self.kept: list[Any] = [{}]  # beside `ats`, where resumable: what the stack row remembers

    def follow(self, other: Fit, steps: int) -> None:
        """Begins after the first `steps` of a resumable fit whose schedule does the same at them."""
        self.ats, self.rows, self.kept = other.ats[: steps + 1], other.rows[:steps], other.kept[: steps + 1]
        self.cells = {step: cell for step, cell in other.cells.items() if step < steps}

    def run(self, on_step: Callable[[], None] = lambda: None) -> np.ndarray:
        """Takes the steps that are left and returns each generation's distance to the full run, dB."""
        row = network_row(self.schedule)
        targets, site_targets = self._targets(), self._site_targets()
        attached = played(self.replay, self.schedule)
        with attached as clock:
            skips = attached.handle.stacks[0] if attached.handle and attached.handle.stacks else None
            if skips is not None:
                skips.cells |= self.cells
                skips.memory = self.kept[-1]
                skips.memory = skips.snapshot()  # what is kept from now on is not the former fit's
                if self.resumable:
                    skips.keep_all()
            rows = attached.handle.rows if attached.handle else []

            def fit_forecasts(step: int) -> None:
                if step in site_targets:
                    self.at_sites[step] = self._weighed_sites(rows, step, site_targets[step])
                if skips is not None and row[step] == "S":
                    self.cells[step] = self._weighed_stack(skips, step, targets[step])

            stepper = Stepper(ReplaySpace(self.replay, clock, fit_forecasts), self.history, self.strength)
            for coefficients, at in stepper.fit_update(lambda step: row[step] != "-", self.ats[-1], len(self.rows)):
                self.rows.append(coefficients)
                self.ats.append(at)
                self.kept.append(skips.snapshot() if skips is not None and self.resumable else {})
                on_step()
        return fidelity_db(self.ats[-1].x, self.replay)

    def fitted(self) -> Schedule:
        """Returns the schedule with what was fitted, said to be closed loop on the replay's generations."""
        ((name, plan),) = self.schedule.transformers.items()
        cells = tuple(self.cells[step] for step in sorted(self.cells))
        at_sites = {
            site: tuple(self.at_sites[step][site] for step in sorted(self.at_sites) if site in self.at_sites[step])
            for site in plan.forecasts
        }
        fitted = {
            "loop": "closed", "guidance_scale": self.schedule.sampler.guidance_scale,
            "seed": self.replay.seeds[0], "samples": len(self.replay.seeds),
        }  # fmt: skip
        update = Update(self.replay.update.basis, self.history, tuple(self.rows), fitted)
        return replace(
            self.schedule,
            transformers={name: replace(plan, forecasts=at_sites, stack_forecasts=cells)},
            update=update,
            measured=(),
        )

    def _targets(self) -> dict[int, Tensor]:
        """Returns for each S step to come what its forecast is to equal, guidance included."""
        ((_, plan),) = self.schedule.transformers.items()
        blocks = [block_of(site) for site in plan.rows]  # in execution order
        steps = [step for step, action in enumerate(plan.stack) if action == "S"]
        forms = zip(steps, (cell.form for cell in plan.stack_forecasts), strict=True)
        return {
            step: self.replay.through_stack(step, blocks[0], blocks[-1], form)
            for step, form in forms
            if step >= len(self.rows)
        }

    def _site_targets(self) -> dict[int, dict[str, Tensor]]:
        """Returns for each step to come that has F cells what their sites give in the full run."""
        ((_, plan),) = self.schedule.transformers.items()
        layouts = {site: plan.layout(site) for site in plan.rows}
        steps = [step for step, cells in enumerate(zip(*plan.rows.values(), strict=True)) if "F" in cells]
        return {step: self.replay.at_sites(step, layouts) for step in steps if step >= len(self.rows)}

    def _weighed_sites(self, rows: Sequence[SiteRow], step: int, targets: dict[str, Tensor]) -> dict[str, Forecast]:
        """Returns the F cells of a step with weights fitted to their targets, under which it is about to run."""
        found = {}
        for row in rows:
            forecast = row.cells[step].forecast
            if forecast is None:
                continue
            sources = [
                self.replay.site_values([row.memory[n].sources[source] for n in sorted(row.memory)], row.layout)
                for source in forecast.sources
            ]
            weights = forecast_weights(sources, targets[row.key], self.strength)
            row.set_weights(step, weights)
            found[row.key] = replace(forecast, weights=weights)
        return found

    def _weighed_stack(self, skips: StackRow, step: int, target: Tensor) -> Forecast:
        """Returns the S cell of a step with weights fitted to its target, under which it is about to run."""
        sources = [self.replay.guided(step, calls) for calls in skips.sources(step)]
        weights = forecast_weights(sources, target, self.strength)
        skips.cells[step] = replace(skips.cells[step], weights=weights)
        return skips.cells[step]


def forecast_weights(sources: Sequence[Tensor], target: Tensor, strength: float = RIDGE) -> tuple[float, ...]:
    """Returns the weights [K] that bring Σ w · source nearest to the target, of 6 significant digits.

    sources: newest first. Least squares with the ridge of policy `drift`, towards reuse.
    """
    flat = torch.stack([*sources, target]).flatten(1).double()
    products, count = (flat @ flat.T).cpu().numpy(), len(sources)
    weights = ridge(strength)(products[None], np.arange(count), np.array([count]))[0, :, 0]
    return tuple(float(f"{weight:.{DIGITS}g}") for weight in weights)


def fit_update(
    replay: Replay,
    schedule: Schedule,
    history: int,
    strength: float = RIDGE,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Schedule, np.ndarray]:
    """Returns the schedule with its update fitted on the replay's generations, and each one's distance to the full run, dB.

    Steps that call the network do so under the schedule (caches, forecasts), the weights of S cells fitted, too; steps `-`
    move the state alone.
    """
    fit = Fit(replay, schedule, history, strength)
    distances = fit.run(on_step)
    return fit.fitted(), distances


def priced(schedule: Schedule, cost: CostModel) -> Schedule:
    """Returns the schedule with its predicted speed and cost counted anew: an update is paid in place of the scheduler's step."""
    before = schedule.predicted or {"error": None, "cache_bytes": 0}
    speed = {"unit": cost.unit, "speedup": cost.speedup(schedule), "cost": cost.schedule(schedule)}
    return replace(schedule, predicted=before | speed | {"error": None})


def calibration_replay(
    pipe: Any, profile: Profile, samples: int = SAMPLES, on_step: Callable[[], None] = lambda: None
) -> Replay:
    """Returns the plain run of the profile's first calibration generations, all at once; several fits can share it."""
    request = profile.manifest
    seeds = range(request["seed"], request["seed"] + min(samples, request["samples"]))
    entries = [request["prompts"][i % len(request["prompts"])] for i in range(len(seeds))]
    return Replay(pipe, profile.sampler, entries, seeds, on_step)


def fit_to_model(
    pipe: Any,
    profile: Profile,
    schedule: Schedule,
    cost: CostModel,
    *,
    samples: int = SAMPLES,
    history: int = MAX_HISTORY,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Schedule, np.ndarray]:
    """Returns the schedule with its update fitted closed loop on the profile's first calibration generations, all at once.

    Beside it each generation's distance to the full run, dB. Costs one plain run of these generations and one accelerated.
    Raises MismatchError where schedule and pipeline do not belong together.
    """
    check_fits(pipe, schedule)
    on_step = counting(2 * profile.sampler.steps, on_progress)
    replay = calibration_replay(pipe, profile, samples, on_step)
    kept = schedule.update.history if schedule.update else history
    fitted, distances = fit_update(replay, schedule, kept, on_step=on_step)
    return priced(fitted, cost), distances


def counting(total: int, on_progress: Callable[[int, int], None]) -> Callable[[], None]:
    """Returns a function that tells on_progress how often it was called, of `total` times."""
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    return on_step


def play(replay: Replay, schedule: Schedule, on_step: Callable[[], None] = lambda: None) -> np.ndarray:
    """Returns each generation's distance to the full run under a schedule, dB; without an update the sampler's own steps."""
    own, update, stack = replay.update, schedule.update, network_row(schedule)
    history, rows = (update.history, update.coefficients) if update else (own.history, rounded(own.coefficients))
    with played(replay, schedule) as clock:
        stepper = Stepper(ReplaySpace(replay, clock), history)
        at = stepper.start()
        for step in range(replay.steps):
            if stack[step] != "-":
                at = stepper.computed(at, step)
            at = stepper.moved(at, step, rows[step])
            on_step()
    return fidelity_db(at.x, replay)


def joint(distances: np.ndarray) -> float:
    """Returns what candidates are judged by: the mean of the mean and of the worst decile, dB."""
    return float(distances.mean() + worst_decile(distances)) / 2


class played:
    """Attaches a schedule to the replay's pipeline while the block runs, where its steps do more than compute or nothing."""

    def __init__(self, replay: Replay, schedule: Schedule) -> None:
        letters = set("".join(row for plan in schedule.transformers.values() for row in plan.rows.values()))
        self.handle: Handle | None = None
        if letters - set("C-") or "S" in network_row(schedule):
            own = Update(replay.update.basis, replay.update.history, rounded(replay.update.coefficients), {})
            self.handle = apply(replay.pipe, replace(schedule, update=own))

    def __enter__(self) -> Clock | None:
        return None if self.handle is None else self.handle.clock

    def __exit__(self, *exception: Any) -> None:
        if self.handle is not None:
            self.handle.remove()


def network_row(schedule: Schedule) -> str:
    """Returns the stack row of the schedule's only transformer."""
    (plan,) = schedule.transformers.values()
    return plan.stack


def fidelity_db(x: Tensor, replay: Replay) -> np.ndarray:
    """Returns −10 log10 of each generation's mean squared error of the last latents, relative to their size; [B]."""
    full = replay.states[-1]
    error = (x - full).flatten(1).double().square().mean(1)
    ratio: np.ndarray = (full.double().square().mean() / error.clamp_min(1e-20)).cpu().numpy()
    return 10 * np.log10(ratio)
