"""A sampler update fitted from a profile's inner products alone, without the model.

States and outputs of the calibration generations span a space whose inner products the profile holds. The accelerated
trajectory stays in it: each new state is a weighted sum of those before. The network's output at a state off the full run is
not in the profile; it is taken to move along with the state by the response that the profile measured, a number a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..formats.sampler import RIDGE, OwnUpdate
from .fit import Row, StateSpace, Stepper


@dataclass(frozen=True)
class Span(StateSpace[np.ndarray]):
    """States and outputs of a profile as vectors of coefficients over its 2 T + 1 recorded ones.

    products [2T + 1, 2T + 1] are their mean inner products. response [T]: how much the guided output moves with the state;
    None: it does not.
    """

    products: np.ndarray
    own: OwnUpdate
    response: np.ndarray | None = None

    def state(self, step: int) -> np.ndarray:
        vector = np.zeros(len(self.products))
        vector[step] = 1.0
        return vector

    def full_output(self, step: int) -> np.ndarray:
        of_state, of_output = self.own.data[step]
        vector = of_state * self.state(step)
        vector[self.steps + 1 + step] += of_output
        return vector

    def output(self, step: int, x: np.ndarray) -> np.ndarray:
        vector = self.full_output(step)
        if self.response is not None:
            of_state, of_output = self.own.data[step]
            vector += (of_state + of_output * self.response[step]) * (x - self.state(step))
        return vector

    def inner(self, vectors: Sequence[np.ndarray], target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stacked = np.stack(vectors)
        reach = stacked @ self.products
        return reach @ stacked.T, reach @ target

    def weighted(self, weights: Sequence[float], vectors: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(weights) @ np.stack(vectors)

    def length(self, vector: np.ndarray) -> float:
        return float(np.sqrt(max(vector @ self.products @ vector, 0.0)))


def fit_open_loop(
    span: Span, anchors: Sequence[int], history: int, ridge: float = RIDGE
) -> tuple[tuple[Row, ...], float]:
    """Returns the coefficients [T][1 + history] for full steps at `anchors`, and the relative error of the last state."""
    fitted = list(Stepper(span, history, ridge).fit_update(lambda step: step in anchors))
    final = span.state(span.steps)
    return tuple(row for row, _ in fitted), span.length(fitted[-1][1].x - final) / span.length(final)


def jump_costs(span: Span, longest: int) -> np.ndarray:
    """Returns the energy that a jump misses, [T, longest + 1, longest + 1], relative to the last state's.

    Entry [a, g, n]: the full run's x_{a + n} minus its best weighted sum of x_a, V_a and V_{a − g} (g = 0: no such output).
    Inf beyond the last step.
    """
    steps, size = span.steps, len(span.products)
    missed = np.full((steps, longest + 1, longest + 1), np.inf)
    outputs = np.stack([span.full_output(t) for t in range(steps)])
    scale = span.length(span.state(steps)) ** 2
    noise = _noises(span)
    for a in range(steps):
        lengths = np.arange(1, min(longest, steps - a) + 1)
        targets = np.zeros((len(lengths), size))
        targets[np.arange(len(lengths)), a + lengths] = 1.0
        if noise is not None:
            targets -= noise[a, lengths]
        gaps = np.arange(1, min(longest, a) + 1)
        for number, some in ((2, np.zeros(1, dtype=int)), (3, gaps)):
            if not len(some):
                continue
            base = np.stack([span.state(a), outputs[a]])
            regressors = np.stack([base if number == 2 else np.stack([*base, outputs[a - g]]) for g in some])
            reach = regressors @ span.products  # [gaps, number, size]
            between, across = reach @ regressors.transpose(0, 2, 1), reach @ targets.T
            energy = 1e-6 * np.diagonal(between, axis1=1, axis2=2)[..., None] * np.eye(number)
            weights = np.linalg.solve(between + energy, across)
            whole = ((targets @ span.products) * targets).sum(1)
            rest = whole + (weights * (between @ weights - 2 * across)).sum(1)
            missed[a, some[:, None], lengths] = np.maximum(rest, 0.0) / scale
    return missed


def _noises(span: Span) -> np.ndarray | None:
    """Returns the sum of the noise of n steps from a on, [T, T + 1, 2T + 1]; None if the sampler draws none."""
    steps = span.steps
    if not any(span.own.noise):
        return None
    total = np.zeros((steps, steps + 1, len(span.products)))
    for a in range(steps):
        for n in range(1, steps - a + 1):
            total[a, n] = span.own.coefficients[a + n - 1][0] * total[a, n - 1] + span.noise(a + n - 1)
    return total
