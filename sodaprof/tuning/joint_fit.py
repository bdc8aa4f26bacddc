"""A joint fit of an update and of the times that the network receives, on the error of the final pictures.

The weights of all jumps and one network time a call are fitted together, as in S4S (arXiv 2502.17423) and Bespoke non-stationary
solvers (2403.01329), from a closed-loop fit on: by Adam through the network, or by Gauss-Newton with Jacobians from forward
calls alone. Weights are fitted in the basis in which a jump's regressors are orthonormal over the generations.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta

from ..formats.files import WHOLE, Number
from .jumps import Batch, Jumps, distances, regressors

TIME_SCALE = 0.1  # of the timesteps' range: one unit of a time's parameter
SOFT = 1e-9  # relative: keeps the whitening of nearly dependent regressors finite
SIZES = (1e-2, 3e-3, 1e-3, 3e-4)  # Adam's step sizes that are tried
TRIAL = 5  # iterations of a trial of a step size
DIFFERENCE = -3e-3  # of a parameter, for the Jacobian; downwards, for the first time cannot rise
FLAT = 0.01  # of the mean diagonal: keeps moves small in directions that hardly matter
DAMPINGS = (10.0, 1.0, 0.1, 0.01, 1e-3)  # of Gauss-Newton, relative to the diagonal


class JointFit:
    """Jumps as parameters: whitened differences of the weights, then of the times, from a start."""

    def __init__(self, start: Jumps, batches: Sequence[Batch]) -> None:
        replay = batches[0].replay
        self.start, self.batches = start, batches
        self.times = 0.0 if replay.time_maps is None else TIME_SCALE * float(np.ptp(replay.sampler.timesteps))
        products, generations = [np.zeros((len(w), len(w))) for w in start.weights], 0
        for batch in batches:
            states, values = batch.run(start)
            generations += states[0].numel()
            for jump, total in enumerate(products):
                flat = regressors(states, values, jump, len(total)).flatten(1).double()
                total += (flat @ flat.T).cpu().numpy()
        self.whitening = [whitening(total / generations) for total in products]
        self.ends = np.cumsum([len(w) for w in start.weights])  # of each jump's parameters

    @property
    def zero(self) -> np.ndarray:
        return np.zeros(self.ends[-1] + len(self.ends))

    def jumps(self, parameters: np.ndarray) -> Jumps:
        """Returns the jumps at these parameters."""
        *moves, shifts = np.split(parameters, self.ends)
        weights = [w + move @ t for w, move, t in zip(self.start.weights, moves, self.whitening, strict=True)]
        times = within_reach(self.start.times + self.times * shifts, self.start.times)
        return replace(self.start, weights=tuple(weights), times=times)

    def gradient(self, batch: Batch, parameters: np.ndarray) -> np.ndarray:
        """Returns the gradient of a batch's mean log error by the parameters."""
        _, of_weights, of_times = batch.gradient(self.jumps(parameters))
        parts = [t @ of for t, of in zip(self.whitening, of_weights, strict=True)]
        return np.concatenate([*parts, self.times * of_times])

    def loss(self, parameters: np.ndarray) -> float:
        """Returns the mean log error over all batches."""
        return -float(distances(self.jumps(parameters), self.batches).mean()) * math.log(10) / 10


def whitening(products: np.ndarray) -> np.ndarray:
    """Returns T [n, n] so that the rows of T · regressors are orthonormal, for mean products of the regressors."""
    lengths = np.sqrt(np.diag(products)).clip(1e-30)
    correlation = products / np.outer(lengths, lengths) + SOFT * np.eye(len(products))
    found: np.ndarray = np.linalg.inv(np.linalg.cholesky(correlation)) / lengths
    return found


def within_reach(times: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Returns each time between the middles to its neighbours on the grid, so that their order stays."""
    middles = (grid[1:] + grid[:-1]) / 2
    bounds = np.stack([np.concatenate([grid[:1], middles]), np.concatenate([middles, np.minimum(grid[-1:], 0)])])
    return times.clip(bounds.min(0), bounds.max(0))


class AdamState(msgspec.Struct, forbid_unknown_fields=True):
    """Where Adam is: the parameters, the running means of the gradient and of its square, its step size, iterations done."""

    at: list[Number]
    mean: list[Number]
    square: list[Number]
    size: Number
    iterations: Annotated[int, Meta(ge=0, le=WHOLE)] = 0

    def step(self, gradient: np.ndarray, total: int) -> None:
        """Takes a step; its size falls as a cosine over `total` iterations, after a few smaller ones at the beginning."""
        cosine = 0.52 + 0.5 * math.cos(math.pi * self.iterations / total)
        self.iterations += 1
        mean = 0.9 * np.array(self.mean) + 0.1 * gradient
        square = 0.95 * np.array(self.square) + 0.05 * gradient**2
        unbiased = mean / (1 - 0.9**self.iterations), square / (1 - 0.95**self.iterations)
        move = self.size * cosine * min(1, self.iterations / 5) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-12)
        self.at, self.mean, self.square = (np.array(self.at) - move).tolist(), mean.tolist(), square.tolist()


def batches_in_turn(fit: JointFit, seed: int, done: int) -> Iterator[Batch]:
    """Yields the batches in a random order without end, each once a round; the first `done` are left out."""
    source, number = random.Random(seed), 0
    while True:
        for batch in source.sample(list(fit.batches), len(fit.batches)):
            if (number := number + 1) > done:
                yield batch


def begin_adam(fit: JointFit, total: int, seed: int) -> AdamState | None:
    """Returns Adam's state after its first iterations, with the step size of SIZES that lowers the loss most.

    None if none lowers it.
    """
    trials, least, zero = [], fit.loss(fit.zero), fit.zero.tolist()
    for size in SIZES:
        state, batches = AdamState(zero, zero, zero, size), batches_in_turn(fit, seed, 0)
        for _ in range(TRIAL):
            state.step(fit.gradient(next(batches), np.array(state.at)), total)
        trials.append((fit.loss(np.array(state.at)), state))
        if len(trials) > 1 and trials[-2][0] < min(least, trials[-1][0]):
            break  # smaller ones are only slower
    loss, state = min(trials, key=lambda trial: trial[0])
    return state if loss < least else None


def continue_adam(fit: JointFit, state: AdamState, total: int, seed: int) -> Iterator[AdamState]:
    """Yields the state, then that after each further iteration, a batch at a time, up to `total` iterations."""
    batches = batches_in_turn(fit, seed, state.iterations)
    yield state
    while state.iterations < total:
        state.step(fit.gradient(next(batches), np.array(state.at)), total)
        yield state


def gauss_newton(fit: JointFit, rounds: int) -> Iterator[np.ndarray]:
    """Yields the parameters after each round of Gauss-Newton on relative errors; ends once no damping lowers the loss."""
    at, least = fit.zero, fit.loss(fit.zero)
    for _ in range(rounds):
        matrix, vector = normal_equations(fit, at)
        scale = np.diag(np.diag(matrix) + FLAT * np.diag(matrix).mean())
        tried = [at - np.linalg.solve(matrix + damping * scale, vector) for damping in DAMPINGS]
        losses = [fit.loss(parameters) for parameters in tried]
        if min(losses) >= least:
            return
        at, least = tried[int(np.argmin(losses))], min(losses)
        yield at


@torch.no_grad()
def normal_equations(fit: JointFit, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns JᵀJ and Jᵀr of the pictures' errors, each generation's divided by its own mean square.

    Jacobians by finite differences: a parameter of a jump changes what comes after it, so the run continues from there.
    """
    jumps, size = fit.jumps(at), len(at)
    matrix, vector = np.zeros((size, size)), np.zeros(size)
    used = [number for number in range(size) if number < fit.ends[-1] or fit.times]
    for batch in fit.batches:
        states, values = batch.run(jumps)
        base = batch.decode(states[-1])
        error = (base - batch.wanted).flatten(1).double()
        weight = error.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()
        columns = []
        for number in used:
            moved = at.copy()
            moved[number] += DIFFERENCE
            of_time = number >= fit.ends[-1]
            jump = int(number - fit.ends[-1]) if of_time else int(np.searchsorted(fit.ends, number, side="right"))
            known = values[:jump] if of_time else values[: jump + 1]
            final = batch.run(fit.jumps(moved), jump, states, known)[0][-1]
            columns.append(((batch.decode(final) - base).flatten(1).double() * weight / DIFFERENCE).flatten())
        jacobian, residual = torch.stack(columns), (error * weight).flatten()
        matrix[np.ix_(used, used)] += (jacobian @ jacobian.T).cpu().numpy()
        vector[used] += (jacobian @ residual).cpu().numpy()
    matrix += np.diag((np.diag(matrix) == 0).astype(float))
    return matrix, vector
