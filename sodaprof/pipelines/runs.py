"""The runs that a thread or task is in: from `set_timesteps` to the last step, or until the call of the pipeline is aborted."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

import torch

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
    conditioning: list[set[int]] = field(default_factory=list)  # of each of these calls, the addresses of `held`
    held: list[torch.Tensor] = field(default_factory=list)  # so that no other tensor gets their addresses
    halved: bool = False  # the first call holds the same latents twice: two branches, or two generations from one seed
    ended: bool = False

    @property
    def clock(self) -> Clock | None:
        """The clock of the run; None once its schedule is gone."""
        return self._clock()


class Caller:
    """The code that begins a run here and now. Its frames, and with them its pipeline, live as long as this object."""

    def __init__(self) -> None:
        self.frames = list(
            _stack()
        )  # innermost first; from the next question on, the innermost one that still ran then

    def runs_now(self) -> bool:
        """Whether the calling code is that which began the run: False for any other, once that was aborted."""
        stack = set(_stack())
        self.frames = [next((frame for frame in self.frames if frame in stack), self.frames[0])]
        return self.frames[0] in stack


@dataclass(eq=False)
class Begun:
    """A run that the calling thread or task has begun. Without a caller, it lasts until it is ended."""

    run: Run
    caller: Caller | None

    def calls_now(self) -> bool:
        """Whether the calling code is in the run: False once the call of the pipeline that began it was aborted."""
        return self.caller is None or self.caller.runs_now()


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
    _RUNS.set((*others, Begun(run, Caller() if in_pipeline else None)))


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
