"""The second part of `refine`, for schedules of full steps alone: weights and network times fitted jointly to the pictures.

It begins with the best of the schedule's own jumps and of closed-loop fits in several forms, and keeps what is best on the
validation generations, which the fit does not see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import torch

from ..errors import UnsupportedModelError
from ..formats.files import Number
from ..formats.schedule import Schedule
from ..pipelines.replay import Replay
from .joint_fit import AdamState, JointFit, begin_adam, continue_adam, gauss_newton
from .jumps import Batch, Jumps, decoder_of, distances, fit_jumps, forms_of, frozen, jumps_of, score_db

LOG = logging.getLogger(__name__)
METHODS = ("auto", "adam", "gauss-newton", "none")
ITERATIONS = 100  # of Adam
ROUNDS = 3  # of Gauss-Newton
EVERY = 5  # iterations of Adam from one validation to the next
PATIENCE = 6  # validations in a row without a better one, then the fit ends


class JointProgress(msgspec.Struct, forbid_unknown_fields=True):
    """How far a joint fit is. best: parameters of the best so far on the validation generations, None for the start."""

    best_score: Number
    best: list[Number] | None = None
    misses: int = 0
    validated: int = 0  # iterations at the latest validation
    adam: AdamState | None = None  # None under Gauss-Newton
    done: bool = False


class JumpRefinement:
    """A joint fit under way."""

    def __init__(
        self, pipe: Any, schedule: Schedule, given: Schedule, replays: list[list[Replay]], method: str, seed: int
    ) -> None:
        """given: what `refine` was given; replays: of the search generations and of the validation generations, in batches."""
        self.schedule, self.given, self.method, self.seed = schedule, given, method, seed
        decode = decoder_of(pipe)
        self.compares = "pictures" if decode else "latents"
        self.searched, self.validated = ([Batch(r, decode or torch.Tensor.float) for r in part] for part in replays)
        self.modules = [replays[0][0].module, getattr(pipe, "vae", None)]
        self.start, self.start_score = self._start()
        self.fit = JointFit(self.start, self.searched)

    def _start(self) -> tuple[Jumps, float]:
        """Returns the start and its score on the validation generations."""
        own = jumps_of(self.schedule)
        forms = forms_of(self.searched[0].replay, max(map(len, own.weights)) - 1)
        known = [jumps_of(self.given)] if self.given.update and not self.given.update.initial else []
        tried = [
            own,
            *(jumps for jumps in known if jumps.starts == own.starts),
            *(fit_jumps(self.searched, own.starts, form)[0] for form in forms),
        ]
        scores = [self.score(jumps) for jumps in tried]
        best = int(np.argmax(scores))
        return tried[best], scores[best]

    def score(self, jumps: Jumps) -> float:
        """Returns the score on the validation generations, dB."""
        return score_db(distances(jumps, self.validated))

    def run(
        self, progress: JointProgress | None, iterations: int, in_time: Callable[[], bool]
    ) -> Iterator[JointProgress]:
        """Yields the progress after each validation; ends after so many iterations, out of time, or without a better one."""
        now = progress or JointProgress(self.start_score)
        if now.done:
            return
        with frozen(*self.modules):
            for done, parameters in self._parameters(now, iterations):
                if done > now.validated and (done % EVERY == 0 or done == iterations or self.method == "gauss-newton"):
                    score, now.validated = self.score(self.fit.jumps(parameters)), done
                    now.misses += 1
                    if score > now.best_score:
                        now.best, now.best_score, now.misses = parameters.tolist(), score, 0
                    yield now
                if now.misses >= PATIENCE or not in_time():
                    break
        now.done = True
        yield now

    def _parameters(self, now: JointProgress, iterations: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the number and the parameters of each iteration."""
        if self.method != "gauss-newton":
            try:
                now.adam = now.adam or begin_adam(self.fit, iterations, self.seed)
            except (torch.OutOfMemoryError, NotImplementedError) as error:
                if self.method == "adam":
                    raise UnsupportedModelError(
                        f"No backward pass through this network ({error}). Take --method gauss-newton."
                    ) from error
                LOG.warning("No backward pass through this network (%s): Gauss-Newton is taken.", error)
                self.method = "gauss-newton"
        if self.method == "gauss-newton":
            yield from enumerate(gauss_newton(self.fit, ROUNDS), 1)
        elif now.adam is not None:
            for state in continue_adam(self.fit, now.adam, iterations, self.seed):
                yield state.iterations, np.array(state.at)

    def best(self, now: JointProgress) -> Schedule:
        """Returns the schedule with the best jumps so far."""
        jumps = self.start if now.best is None else self.fit.jumps(np.array(now.best))
        fitted = {
            "loop": "joint", "guidance_scale": self.schedule.sampler.guidance_scale,
            "seed": self.searched[0].replay.seeds[0], "samples": sum(len(b.replay.seeds) for b in self.searched),
            "error": self.compares,
        }  # fmt: skip
        return jumps.written_to(self.schedule, fitted)
