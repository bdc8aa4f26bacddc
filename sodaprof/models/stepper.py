"""Steps of an accelerated loop on a replay, under given coefficients or under ones fitted on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..updates import RIDGE, own_weights, ridge_solve, rounded
from .clock import Clock
from .replay import Replay


@dataclass(frozen=True)
class At:
    """Where an accelerated run of some generations stands: the latents before a step, the newest outputs and their steps."""

    x: Tensor
    outputs: tuple[Tensor, ...] = ()
    sources: tuple[int, ...] = ()

    def regressors(self) -> Tensor:
        """Latents and outputs, [1 + outputs, B, …]."""
        return torch.stack([self.x, *self.outputs])


class Stepper:
    """Takes the steps of a schedule on a replay's generations, under its update or under one that is fitted on the way."""

    def __init__(self, replay: Replay, history: int, ridge: float = RIDGE) -> None:
        self.replay, self.history, self.ridge = replay, history, ridge

    def start(self) -> At:
        return At(self.replay.states[0])

    def computed(self, at: At, step: int, clock: Clock | None = None) -> At:
        """Returns the run with the network's output at this step as its newest."""
        return self.with_output(at, step, self.replay.output(step, at.x, clock))

    def with_output(self, at: At, step: int, output: Tensor) -> At:
        """Returns the run with a guided output at this step as its newest."""
        of_state, of_output = self.replay.update.data[step]
        value = of_state * at.x + of_output * output if of_state else of_output * output
        return At(at.x, (value, *at.outputs)[: self.history], (step, *at.sources)[: self.history])

    def fitted(self, at: At, step: int) -> tuple[tuple[float, ...], At]:
        """Returns the coefficients [1 + history] of this step and the run after it."""
        regressors = at.regressors()
        target = self.replay.states[step + 1] - self.replay.noise(step)
        flat = torch.stack([*regressors, target]).flatten(1).double()
        products = (flat @ flat.T).cpu().numpy()
        prior = own_weights(self.replay.update, step, at.sources)
        weights = ridge_solve(products[:-1, :-1], products[:-1, -1], prior, self.ridge)
        (row,) = rounded([[*weights, *[0.0] * (1 + self.history - len(weights))]])
        return row, self.moved(at, step, row)

    def moved(self, at: At, step: int, row: tuple[float, ...]) -> At:
        """Returns the run after a step under given coefficients."""
        weights = torch.tensor(row[: 1 + len(at.outputs)], dtype=torch.float32, device=at.x.device)
        x = torch.tensordot(weights, at.regressors(), 1) + self.replay.noise(step)
        return At(x, at.outputs, at.sources)
