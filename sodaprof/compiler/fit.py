"""The fit of a sampler update: least squares of its coefficients, one step after another along the accelerated run.

At each step the weights of the state and of the newest outputs are those that bring the run nearest to the full run's next
state; the next step begins at the state that these weights, rounded as a file holds them, give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ..formats.sampler import RIDGE, OwnUpdate, own_weights, ridge_solve, rounded

Row = tuple[float, ...]  # coefficients of a step: of the state, then of the outputs, newest first
V = TypeVar("V", bound=Any)  # an array or a tensor


class StateSpace(ABC, Generic[V]):
    """What a fit needs to know of the full run and of the network. Outputs are in the basis of the update."""

    own: OwnUpdate  # the sampler's own steps

    @abstractmethod
    def state(self, step: int) -> V:
        """Returns the state of the full run before a step; `steps` for its last."""

    @abstractmethod
    def full_output(self, step: int) -> V:
        """Returns the output of the full run at a step."""

    @abstractmethod
    def output(self, step: int, x: V) -> V:
        """Returns the output at a step for a state x of the accelerated run."""

    @abstractmethod
    def inner(self, vectors: Sequence[V], target: V) -> tuple[np.ndarray, np.ndarray]:
        """Returns the inner products of the vectors with each other [n, n] and with the target [n]."""

    @abstractmethod
    def weighted(self, weights: Sequence[float], vectors: Sequence[V]) -> V:
        """Returns the weighted sum of the vectors."""

    @property
    def steps(self) -> int:
        return self.own.steps

    def noise(self, step: int) -> V | float:
        """Returns what the scheduler's own noise added to the full run at a step; 0 if it draws none."""
        if not self.own.noise[step]:
            return 0.0
        row = self.own.coefficients[step]
        outputs = [self.full_output(step - j) for j in range(min(step + 1, self.own.history))]
        moved = row[0] * self.state(step) + sum(c * v for c, v in zip(row[1:], outputs, strict=False))
        return self.state(step + 1) - moved


@dataclass(frozen=True)
class RunState(Generic[V]):
    """An accelerated run before a step: the state, the newest outputs and the steps that they are from."""

    x: V
    outputs: tuple[V, ...] = ()
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stepper(Generic[V]):
    """Takes the steps of accelerated runs, under given coefficients or under those that it fits."""

    space: StateSpace[V]
    history: int  # outputs that the update weighs
    ridge: float = RIDGE

    def start(self) -> RunState[V]:
        return RunState(self.space.state(0))

    def computed(self, run: RunState[V], step: int) -> RunState[V]:
        """Returns the run with the network's output at this step as its newest."""
        return self.with_output(run, step, self.space.output(step, run.x))

    def with_output(self, run: RunState[V], step: int, output: V) -> RunState[V]:
        """Returns the run with this output, in the basis of the update, as its newest."""
        outputs, sources = (output, *run.outputs), (step, *run.sources)
        return RunState(run.x, outputs[: self.history], sources[: self.history])

    def moved(self, run: RunState[V], step: int, row: Sequence[float]) -> RunState[V]:
        """Returns the run after a step under these coefficients."""
        vectors = (run.x, *run.outputs)
        x = self.space.weighted(row[: len(vectors)], vectors) + self.space.noise(step)
        return RunState(x, run.outputs, run.sources)

    def fitted(self, run: RunState[V], step: int) -> tuple[Row, RunState[V]]:
        """Returns the fitted coefficients [1 + history] of a step and the run after it."""
        target = self.space.state(step + 1) - self.space.noise(step)
        products, across = self.space.inner((run.x, *run.outputs), target)
        weights = ridge_solve(products, across, own_weights(self.space.own, step, run.sources), self.ridge)
        (row,) = rounded([[*weights, *[0.0] * (1 + self.history - len(weights))]])
        return row, self.moved(run, step, row)

    def fit_update(
        self, calls: Callable[[int], bool], run: RunState[V] | None = None, first: int = 0
    ) -> Iterator[tuple[Row, RunState[V]]]:
        """Yields for each step from `first` on the fitted coefficients and the run after it.

        calls: whether the network is called at a step. run: before the first step, by default the start.
        """
        run = run or self.start()
        for step in range(first, self.space.steps):
            if calls(step):
                run = self.computed(run, step)
            row, run = self.fitted(run, step)
            yield row, run


# ---- open loop -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span(StateSpace[np.ndarray]):
    """States and outputs of a profile as vectors of coefficients over its 2 T + 1 recorded ones, for a fit without the model.

    products [2T + 1, 2T + 1] are the mean inner products of the recorded ones. Each new state is a weighted sum of those before.
    The network's output at a state off the full run is not in the profile: it is taken to move along with the state by the
    measured response [T]; None: it does not move.
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


def single_jump_misses(span: Span) -> np.ndarray:
    """Returns what the sampler's own jumps miss, [T, T + 1], relative to the last state: entry [a, n] of a jump of n steps.

    A jump is the sampler's own steps from the full run's state x_a with its output V_a in place of all later ones, as GITS
    measures it (arXiv 2405.11326). Inf beyond the last step.
    """
    steps, missed = span.steps, np.full((span.steps, span.steps + 1), np.inf)
    scale = span.length(span.state(steps))
    for a in range(steps):
        at, output, reached = span.state(a), span.full_output(a), []
        for step in range(a, steps):
            row = own_weights(span.own, step, [a])
            at = row[0] * at + row[1] * output + span.noise(step)
            reached.append(at - span.state(step + 1))
        apart = np.stack(reached)
        missed[a, 1 : 1 + len(apart)] = np.sqrt(((apart @ span.products) * apart).sum(1).clip(0)) / scale
    return missed


def jump_costs(span: Span) -> np.ndarray:
    """Returns the energy that a jump misses, [T, T + 1, T + 1], relative to the last state's.

    Entry [a, g, n]: the full run's x_{a + n} minus its best weighted sum of x_a, V_a and V_{a − g} (g = 0: no such output).
    Inf beyond the last step.
    """
    steps, recorded = span.steps, np.eye(len(span.products))
    missed = np.full((steps, steps + 1, steps + 1), np.inf)
    outputs = np.stack([span.full_output(t) for t in range(steps)])
    scale = span.length(span.state(steps)) ** 2
    for a in range(steps):
        lengths, gaps = np.arange(1, steps - a + 1), np.arange(1, a + 1)
        targets, drawn = recorded[a + lengths], np.zeros(len(recorded))
        for step in range(a, steps):
            drawn = span.own.coefficients[step][0] * drawn + span.noise(step)
            targets[step - a] -= drawn  # the sampler's own noise is no miss
        newest = np.stack([span.state(a), outputs[a]])[None]
        with_older = np.concatenate([np.repeat(newest, a, axis=0), outputs[a - gaps, None]], axis=1)
        for some, regressors in ((np.zeros(1, dtype=int), newest), (gaps, with_older)):
            reach = regressors @ span.products  # [gaps, number, size]
            between, across = reach @ regressors.transpose(0, 2, 1), reach @ targets.T
            energy = 1e-6 * np.diagonal(between, axis1=1, axis2=2)[..., None] * np.eye(regressors.shape[1])
            weights = np.linalg.solve(between + energy, across)
            whole = ((targets @ span.products) * targets).sum(1)
            rest = whole + (weights * (between @ weights - 2 * across)).sum(1)
            missed[a, some[:, None], lengths] = np.maximum(rest, 0.0) / scale
    return missed
