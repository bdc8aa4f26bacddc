"""A sampler's own steps as coefficients, in the form of a schedule's update: a fitted update starts from them. solver.json.

A step is linear if it can be written x' = c0 · x + Σ c_j · V_j + noise · n. V_j is the j-th newest guided output of the
network (basis `output`: DDIM, DDPM, Euler, rectified flow), or the data prediction formed from that output and the latents
of the same step (basis `data`: DPM-Solver++ 2M, UniPC).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from .files import Number, Record
from .sites import MAX_STEPS

Basis = Literal["output", "data"]
MAX_HISTORY = 4  # outputs that a policy's update weighs
LONGEST_HISTORY = 8  # outputs that the update of a file may weigh
OUTPUT_BASED = (  # samplers whose own steps weigh outputs
    "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "RectifiedFlowScheduler",
)  # fmt: skip
RIDGE = 1e-4  # of each regressor's energy, towards the sampler's own coefficients
DIGITS = 9  # significant digits of an update's coefficients in a file


class OwnUpdate(Record, frozen=True):
    """x_{t+1} = coefficients[t][0] · x_t + Σ_j coefficients[t][j] · V_j + noise[t] · n; V_t = data[t] · (x_t, v_t).

    v_t is the guided output as the scheduler receives it, n is standard normal.
    """

    FORMAT = "sodaprof.solver", 1
    basis: Basis
    coefficients: Annotated[
        tuple[tuple[Number, ...], ...], Meta(min_length=1, max_length=MAX_STEPS)
    ]  # [T][1 + history]
    data: tuple[tuple[Number, Number], ...]  # [T]; (0, 1) under basis `output`
    noise: tuple[Number, ...]  # [T]

    def __post_init__(self) -> None:
        if not len(self.coefficients) == len(self.data) == len(self.noise):
            raise ValueError("`coefficients`, `data` and `noise` differ in length")
        widths = {len(row) for row in self.coefficients}
        if len(widths) != 1 or not 2 <= min(widths) <= 1 + MAX_HISTORY:
            raise ValueError(f"each step needs the same number of coefficients, 2 to {1 + MAX_HISTORY}")

        if not all(map(any, self.data)):
            raise ValueError("a pair of `data` is zero twice")

    @property
    def history(self) -> int:
        return len(self.coefficients[0]) - 1

    @property
    def steps(self) -> int:
        return len(self.coefficients)

    def padded(self, history: int) -> tuple[tuple[Number, ...], ...]:
        """Returns the coefficients [T][1 + history] with zeros for older outputs; history is at least the sampler's."""
        return tuple((*row, *[0.0] * (history - self.history)) for row in self.coefficients)


def rounded(coefficients: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Returns coefficients with the digits that a file holds."""
    return tuple(tuple(float(f"{c:.{DIGITS}g}") for c in row) for row in coefficients)


def own_weights(own: OwnUpdate, step: int, ring: Sequence[int]) -> np.ndarray:
    """Returns the sampler's own coefficients [1 + outputs] at a step, for the outputs of the steps in `ring`, newest first.

    The weight of an output that was not computed is added to that of the newest computed one before it.
    """
    row = own.coefficients[step]
    weights = np.zeros(1 + len(ring))
    weights[0] = row[0]
    for j, weight in enumerate(row[1:]):
        position = next((i for i, source in enumerate(ring) if source <= step - j), len(ring) - 1)
        weights[1 + position] += weight
    return weights


def ridge_solve(products: np.ndarray, target: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """Returns the weights w [n] that minimise |y − Σ w_i r_i|² + ridge · Σ |r_i|² (w_i − prior_i)².

    products [n, n] of the regressors r, target [n] their products with y.
    """
    energy = ridge * np.diag(products)
    return np.linalg.solve(products + np.diag(energy), target + energy * prior)
