"""A fitted state update from a profile's inner products alone, without the model.

States and outputs of the calibration generations span a space whose inner products the profile holds. The accelerated
trajectory stays in it: each new state is a weighted sum of what was there. What the network would answer to a state that is
off the trajectory is not in the profile; its answer is taken to move along with the state by the response that the profile
measured, a number a step (0 where it holds none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..formats.sampler import RIDGE, OwnUpdate, own_weights, ridge_solve, rounded


@dataclass(frozen=True)
class Span:
    """States and outputs of a profile as vectors of coefficients over its 2 T + 1 recorded ones.

    products [2T + 1, 2T + 1] are their mean inner products. response [T]: what the guided output moves by with the state.
    """

    products: np.ndarray
    own: OwnUpdate
    response: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return self.own.steps

    def state(self, step: int) -> np.ndarray:
        """x_step of the full run, [2T + 1]."""
        vector = np.zeros(len(self.products))
        vector[step] = 1.0
        return vector

    def output(self, step: int, state: np.ndarray | None = None) -> np.ndarray:
        """V_step of the full run, or its estimate at another state; in the basis of the update."""
        of_state, of_output = self.own.data[step]
        vector = of_state * self.state(step)
        vector[self.steps + 1 + step] += of_output
        if state is not None and self.response is not None:
            vector += (of_state + of_output * self.response[step]) * (state - self.state(step))
        return vector

    def noise(self, step: int) -> np.ndarray:
        """What the scheduler's own noise added at a step of the full run."""
        if not self.own.noise[step]:
            return np.zeros(len(self.products))
        row = self.own.coefficients[step]
        known = [self.output(step - j) for j in range(min(step + 1, self.own.history))]
        moved = row[0] * self.state(step) + sum(c * v for c, v in zip(row[1:], known, strict=False))
        return self.state(step + 1) - moved

    def length(self, vector: np.ndarray) -> float:
        return float(np.sqrt(max(vector @ self.products @ vector, 0.0)))


def fit_open_loop(
    span: Span, anchors: Sequence[int], history: int, ridge: float = RIDGE
) -> tuple[tuple[tuple[float, ...], ...], float]:
    """Returns the update's coefficients [T][1 + history] for full steps at `anchors`, and the relative error of the last state.

    At each step the weights of state and outputs are those that come nearest to the full run's next state.
    """
    rows, ring = [], list[int]()
    x, outputs = span.state(0), list[np.ndarray]()
    for step in range(span.steps):
        if step in anchors:
            ring = [step, *ring][:history]
            outputs = [span.output(step, x), *outputs][:history]
        regressors = np.stack([x, *outputs])
        noise = span.noise(step)
        reach = regressors @ span.products
        weights = ridge_solve(
            reach @ regressors.T, reach @ (span.state(step + 1) - noise), own_weights(span.own, step, ring), ridge
        )
        (row,) = rounded([[*weights, *[0.0] * (history - len(ring))]])
        rows.append(row)
        x = np.array(row[: 1 + len(ring)]) @ regressors + noise
    final = span.state(span.steps)
    return tuple(rows), span.length(x - final) / span.length(final)


def jump_costs(span: Span, longest: int) -> np.ndarray:
    """Returns the energy that a jump misses, [T, longest + 1, longest + 1], relative to the last state's.

    Entry [a, g, n]: the full run's x_{a + n} less its best weighted sum of x_a, V_a and V_{a − g} (g = 0: no such output).
    Inf where it runs beyond the end.
    """
    steps, size = span.steps, len(span.products)
    missed = np.full((steps, longest + 1, longest + 1), np.inf)
    outputs = np.stack([span.output(t) for t in range(steps)])
    scale = span.length(span.state(steps)) ** 2
    drift = _noises(span)
    for a in range(steps):
        lengths = np.arange(1, min(longest, steps - a) + 1)
        targets = np.zeros((len(lengths), size))
        targets[np.arange(len(lengths)), a + lengths] = 1.0
        if drift is not None:
            targets -= drift[a, lengths]
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
    """Returns what the noise of n steps from a adds up to, [T, T + 1, 2T + 1]; None where the sampler draws none."""
    steps = span.steps
    if not any(span.own.noise):
        return None
    total = np.zeros((steps, steps + 1, len(span.products)))
    for a in range(steps):
        for n in range(1, steps - a + 1):
            total[a, n] = span.own.coefficients[a + n - 1][0] * total[a, n - 1] + span.noise(a + n - 1)
    return total
