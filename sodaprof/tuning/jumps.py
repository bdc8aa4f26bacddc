"""Schedules of full steps alone as jumps: one weighted sum from each call of the network to the next, and their fit.

`fit_jumps` is closed loop: each jump's weights are those that bring the accelerated run nearest to the full run's state at its
end, relative to each generation's own length, with a weak ridge towards a sampler that is consistent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from ..errors import UnsupportedModelError
from ..formats.data_basis import FLOWS, in_data_basis, noise_levels, second_order_weights
from ..formats.sampler import RIDGE, OwnUpdate, own_weights, ridge_solve, rounded
from ..formats.schedule import Schedule, Update
from ..measure.metrics import worst_decile
from ..pipelines.replay import Replay, ReplaySpace
from ..runtime.sampler.update import called_steps, jumps

PERCENTILE = 25  # of the gain over the resamplings: above 0 it replaces the incumbent
RESAMPLINGS = 1000
Decode = Callable[[Tensor], Tensor]  # final latents [B, …] -> what is compared, [B, …]


@dataclass(frozen=True)
class Form:
    """What a jump's sum weighs: the last `history` outputs in a basis."""

    basis: str
    history: int


FORMS = (Form("data", 4), Form("data", 3), Form("data", 2), Form("output", 4), Form("output", 3))


@dataclass(frozen=True)
class Jumps:
    """Full steps, the weights [1 + outputs] of the jump from each to the next, and the times that the network receives."""

    basis: str
    starts: tuple[int, ...]
    weights: tuple[np.ndarray, ...]
    times: np.ndarray  # [calls]

    def written_to(self, schedule: Schedule, fitted: dict[str, Any]) -> Schedule:
        """Returns the schedule with these jumps as its update: a jump's first step moves the latents, the others do not."""
        history, timesteps = max(map(len, self.weights)) - 1, schedule.sampler.timesteps
        rows, times = [[1.0] + [0.0] * history for _ in timesteps], list(timesteps)
        for start, weights, time in zip(self.starts, self.weights, self.times.tolist(), strict=True):
            rows[start][: len(weights)] = weights.tolist()
            times[start] = time
        own = None if list(timesteps) == times else tuple(times)
        update = Update(self.basis, history, rounded(rows), fitted, times=own)
        return replace(schedule, update=update, measured=())


def jumps_of(schedule: Schedule) -> Jumps:
    """Returns the jumps of a schedule of full and skipped steps with an update."""
    update, sampler = schedule.update, schedule.sampler
    assert update is not None
    composed = jumps(update.coefficients, [0.0] * sampler.steps, called_steps(schedule))
    times = update.times or sampler.timesteps
    weights = [np.array(j.coefficients)[: 2 + number] for number, j in enumerate(composed)]
    starts = tuple(jump.start for jump in composed)
    return Jumps(update.basis, starts, tuple(weights), np.array([float(times[start]) for start in starts]))


class Batch:
    """Some generations under jumps: their run, how far its end is from the full run's, and the gradient of that."""

    def __init__(self, replay: Replay, decode: Decode) -> None:
        self.replay, self.decode = replay, decode
        with torch.no_grad():
            self.wanted = decode(replay.states[-1])

    def space(self, basis: str) -> ReplaySpace:
        return ReplaySpace(self.replay, basis=basis)

    @torch.no_grad()
    def run(
        self, jumps: Jumps, first: int = 0, states: Sequence[Tensor] = (), values: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the states [calls + 1] and values [calls] of the run.

        first: the jump from which on it is computed, states and values: known ones up to there; if the value of `first` is
        among them, its call is spared.
        """
        states, values, space = (
            list(states[: first + 1]) or [self.replay.states[0]],
            list(values),
            self.space(jumps.basis),
        )
        for jump in range(first, len(jumps.starts)):
            if len(values) == jump:
                values.append(space.output(jumps.starts[jump], states[jump], self.time(jumps, jump)))
            weights = torch.from_numpy(jumps.weights[jump]).to(states[jump])
            states.append(torch.tensordot(weights, regressors(states, values, jump, len(weights)), 1))
        return states, values

    def time(self, jumps: Jumps, jump: int) -> float | None:
        """Returns the network's time at a jump, None if it is the sampler's own."""
        time = float(jumps.times[jump])
        return None if time == self.replay.sampler.timesteps[jumps.starts[jump]] else time

    def errors(self, final: Tensor) -> Tensor:
        """Returns each generation's mean squared error [B]."""
        return (self.decode(final) - self.wanted).flatten(1).square().mean(1).clamp_min(1e-12)

    def distances(self, final: Tensor) -> np.ndarray:
        """Returns each generation's distance to the full run, dB [B]: −10 log10 of its mean squared error."""
        with torch.no_grad():
            found: np.ndarray = -10 * self.errors(final).double().log10().cpu().numpy()
        return found

    def gradient(self, jumps: Jumps) -> tuple[float, list[np.ndarray], np.ndarray]:
        """Returns the mean log error and its derivatives by weights and times; keeps the graph of one network call at a time."""
        (states, values), space = self.run(jumps), self.space(jumps.basis)
        final = states[-1].detach().requires_grad_()
        with torch.enable_grad():
            loss = self.errors(final).log().mean()
            (of_state,) = torch.autograd.grad(loss, final)
        of_values, of_weights, of_times = [torch.zeros_like(v) for v in values], [], np.zeros(len(values))
        for jump in reversed(range(len(values))):
            weights = jumps.weights[jump]
            of = regressors(states, values, jump, len(weights)).double() * of_state.double()
            of_weights.append(of.flatten(1).sum(1).cpu().numpy())
            for older, weight in enumerate(weights[1:].tolist()):
                of_values[jump - older] += weight * of_state
            x = states[jump].detach().requires_grad_()
            time = torch.tensor(float(jumps.times[jump]), device=x.device, requires_grad=True)
            with torch.enable_grad():
                value = space.output(jumps.starts[jump], x, time if self.replay.time_maps else None)
                of_x, of_time = torch.autograd.grad(value, (x, time), of_values[jump], allow_unused=True)
            of_state = weights[0] * of_state + of_x
            of_times[jump] = 0.0 if of_time is None else float(of_time)
        return loss.item(), of_weights[::-1], of_times


def regressors(states: Sequence[Tensor], values: Sequence[Tensor], jump: int, count: int) -> Tensor:
    """Returns the regressors [count, B, …] of a jump: the state, then the newest values."""
    return torch.stack([states[jump], *values[jump::-1][: count - 1]])


def distances(jumps: Jumps, batches: Sequence[Batch]) -> np.ndarray:
    """Returns each generation's distance to the full run under jumps, dB."""
    return np.concatenate([batch.distances(batch.run(jumps)[0][-1]) for batch in batches])


def score_db(values: np.ndarray) -> float:
    """Returns the score of a candidate: the mean of the mean and of the worst tenth of its distances, dB."""
    return float(values.mean() + worst_decile(values)) / 2


def sure_gain(candidate: np.ndarray, incumbent: np.ndarray) -> float:
    """Returns the gain of a candidate over the incumbent that three of four resamplings of the generations exceed, dB.

    candidate, incumbent: each generation's distance to the full run, dB. Resampled with repetition.
    """
    draws = np.random.default_rng(0).integers(len(candidate), size=(RESAMPLINGS, len(candidate)))
    gains = [score_db(candidate[some]) - score_db(incumbent[some]) for some in draws]
    return float(np.percentile(gains, PERCENTILE))


@torch.no_grad()
def fit_jumps(batches: Sequence[Batch], starts: Sequence[int], form: Form) -> tuple[Jumps, np.ndarray]:
    """Returns jumps fitted closed loop on all batches, and each generation's distance to the full run, dB."""
    sampler, own = batches[0].replay.sampler, batches[0].space(form.basis).own
    prior = _prior(own, sampler.class_name in FLOWS)
    runs: list[tuple[list[Tensor], list[Tensor]]] = [([batch.replay.states[0]], []) for batch in batches]
    weights: list[np.ndarray] = []
    for jump, (start, end) in enumerate(zip(starts, [*starts[1:], sampler.steps], strict=True)):
        count, sums = 2 + min(jump, form.history - 1), []
        for batch, (states, values) in zip(batches, runs, strict=True):
            values.append(batch.space(form.basis).output(start, states[jump]))
            target = batch.replay.states[end]
            rows = torch.cat([regressors(states, values, jump, count), target[None]]).flatten(2).double()
            rows = rows / rows[-1].norm(dim=1, keepdim=True).clamp_min(1e-12)
            sums.append((rows.flatten(1) @ rows.flatten(1).T).cpu().numpy())
        products, sources = np.sum(sums, axis=0), [*starts[jump::-1][: count - 1]]
        solved = ridge_solve(products[:-1, :-1], products[:-1, -1], prior(start, end, sources), RIDGE)
        (row,) = rounded([solved.tolist()])
        weights.append(np.array(row))
        for states, values in runs:
            of = torch.from_numpy(weights[-1]).to(states[jump])
            states.append(torch.tensordot(of, regressors(states, values, jump, count), 1))
    times = np.array([float(sampler.timesteps[start]) for start in starts])
    found = Jumps(form.basis, tuple(starts), tuple(weights), times)
    finals = [states[-1] for states, _ in runs]
    return found, np.concatenate([b.distances(x) for b, x in zip(batches, finals, strict=True)])


def _prior(own: OwnUpdate, flow: bool) -> Callable[[int, int, Sequence[int]], np.ndarray]:
    """Returns a function of a jump's start, end and sources, newest first: the weights that the ridge pulls towards.

    In the data basis those of DPM-Solver++ 2M, else the sampler's own, composed.
    """
    levels = noise_levels(own, flow) if own.basis == "data" else None
    if levels is not None:
        return lambda start, end, sources: second_order_weights(levels, start, end, sources)

    def composed(start: int, end: int, sources: Sequence[int]) -> np.ndarray:
        whole = np.eye(1 + len(sources))[0]
        for step in range(start, end):
            row = own_weights(own, step, sources)
            whole = row[0] * whole
            whole[1:] += row[1:]
        return whole

    return composed


def forms_of(replay: Replay, most: int) -> list[Form]:
    """Returns the forms that compete, of histories of at most `most`; those in the data basis only if the sampler has one."""
    sampler = replay.sampler
    try:
        in_data_basis(replay.update, sampler.class_name in FLOWS)
        known = list(FORMS)
    except UnsupportedModelError:
        known = [form for form in FORMS if form.basis == "output"]
    return [form for form in known if form.history <= most] or [Form(known[0].basis, most)]


def is_jumps_alone(schedule: Schedule, own: OwnUpdate) -> bool:
    """Whether a schedule's run is jumps alone: full and skipped steps of one transformer, no noise drawn."""
    stacks = {cell for plan in schedule.transformers.values() for cell in plan.stack}
    return (
        len(schedule.transformers) == 1
        and set(schedule.counts()) <= set("C-")
        and stacks <= set(".-")
        and not any(own.noise)
    )


def decoder_of(pipe: Any) -> Decode | None:
    """Returns what makes pictures of final latents as the pipeline does, for the plain image autoencoders; None for others."""
    vae: Any = getattr(pipe, "vae", None)
    if type(vae).__name__ not in ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny") or hasattr(
        pipe, "_unpack_latents"
    ):
        return None
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0

    def decode(latents: Tensor) -> Tensor:
        pictures: Tensor = vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    return decode


def in_batches(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Returns the values in parts of at most `size`."""
    return [values[i : i + size] for i in range(0, len(values), size)]


@contextmanager
def frozen(*modules: Any) -> Iterator[None]:
    """Switches gradients of the modules' weights off while the block runs: only states and times are differentiated."""
    weights = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
