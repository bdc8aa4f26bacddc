"""The fit of a sampler update: least squares of its coefficients, one step after another along the accelerated run.

At each step the weights of the state and of the newest outputs are those that bring the run nearest to the full run's next
state; the next step begins at the state that these weights, rounded as a file holds them, give. The fit is the same open loop,
on vectors of coefficients over a profile (`open_loop.Span`), and closed loop, on the latents of a model (`ReplaySpace`).
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

    def noise(self, step: int) -> V:
        """Returns what the scheduler's own noise added to the full run at a step; zeros if it draws none."""
        if not self.own.noise[step]:
            return 0.0 * self.state(step)  # type: ignore[return-value]
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
        x = self.space.weighted(row[: len(vectors)], vectors)
        return RunState(x + self.space.noise(step) if self.space.own.noise[step] else x, run.outputs, run.sources)

    def fitted(self, run: RunState[V], step: int) -> tuple[Row, RunState[V]]:
        """Returns the fitted coefficients [1 + history] of a step and the run after it."""
        target = self.space.state(step + 1)
        if self.space.own.noise[step]:
            target = target - self.space.noise(step)
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
