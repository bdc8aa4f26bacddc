"""The runs that a thread or task is in: from `set_timesteps` to the last step, or until the call of the pipeline is aborted."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .clock import Clock


@dataclass(eq=False)
class Run:
    """A run between `set_timesteps` and its last step."""

    _clock: weakref.ref[Clock]  # what a thread remembers of its runs keeps no network alive
    step: int = 0
    calls: int = 0  # of transformers since the last scheduler step: one a guidance branch, or one for both halves
    turn_begins: bool = True  # at this step a transformer's turn begins
    batches: list[int] = field(default_factory=list)  # of each call at the first step of the turn
    halved: bool = False  # the first call holds the same latents twice: two branches, or two generations from one seed
    ended: bool = False

    @property
    def clock(self) -> Clock | None:
        """The clock of the run; None once its schedule is gone."""
        return self._clock()

    @property
    def is_live(self) -> bool:
        """Whether the clock runs it: False after its end, after a refusal, and once another run has taken its place."""
        clock = self._clock()
        return clock is not None and clock.run is self


@dataclass(eq=False)
class Begun:
    """A run that the calling thread or task has begun, and where. The frames keep a pipeline alive that was aborted."""

    run: Run
    frames: list[
        FrameType
    ]  # the stack of `set_timesteps`, innermost first; then its innermost one that calls the network

    def calls_now(self) -> bool:
        """Whether the code that began the run is what runs now: False once its call of the pipeline was aborted."""
        if not self.frames:
            return True
        stack = set(_stack())
        self.frames = [next((frame for frame in self.frames if frame in stack), self.frames[0])]
        return self.frames[0] in stack


# of this thread or task, the latest last; some may have ended
_RUNS: ContextVar[tuple[Begun, ...]] = ContextVar("sodaprof_runs", default=())


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def begin(run: Run, in_pipeline: bool) -> None:
    """Puts the calling thread or task into a run; in_pipeline: the run is aborted if the call that begins it is."""
    others = (b for b in _RUNS.get() if not b.run.ended and b.run.clock is not None and b.calls_now())
    _RUNS.set((*others, Begun(run, list(_stack()) if in_pipeline else [])))


def end(run: Run) -> None:
    """Marks a run as ended; the calling thread or task forgets it."""
    run.ended = True
    _RUNS.set(tuple(begun for begun in _RUNS.get() if not begun.run.ended))


def current_clock(clocks: Collection[Clock], *, ending_aborted: bool = False) -> Clock | None:
    """Returns the clock, one of these, of the latest run that the calling thread or task has begun and not ended.

    ending_aborted: runs whose call of the pipeline was aborted are ended.
    """
    for begun in reversed(_RUNS.get()):
        clock = begun.run.clock
        if clock is None or clock.run is not begun.run or clock not in clocks:
            continue
        if not ending_aborted or begun.calls_now():
            return clock
        clock.stop()
    return None


def was_replaced(clocks: Collection[Clock]) -> bool:
    """Whether another call took over the scheduler of a run that the calling thread or task is in."""
    kept = [(begun.run, begun.run.clock) for begun in _RUNS.get() if not begun.run.ended and begun.calls_now()]
    return any(clock in clocks and clock.run is not run for run, clock in kept if clock is not None)
