"""The runs that a thread or task is in: from `set_timesteps` to the last step, or until the call of the pipeline is aborted."""

from __future__ import annotations

import gc
import inspect
import math
import sys
import weakref
from collections.abc import Collection, Coroutine, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .clock import Clock

GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


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
        self.frames = list(_stack())  # innermost first; once the code was found again, the frame in which it was

    def running(self, stack: Collection[FrameType]) -> FrameType | None:
        """The innermost of its frames that is in the stack of the calling code; None if none is: the code was aborted."""
        return next((frame for frame in self.frames if frame in stack), None)

    def runs_now(self) -> bool:
        """Whether the calling code is that which began the run: False for any other, once that was aborted."""
        frame = self.running(set(_stack()))
        self.frames = [frame or self.frames[0]]
        return frame is not None


@dataclass(eq=False)
class Begun:
    """A run that the calling thread or task has begun. Without a caller, it lasts until it is ended."""

    run: Run
    caller: Caller | None

    def stop(self) -> None:
        """Ends the run, unless another took its place."""
        if (clock := self.run.clock) is not None and clock.run is self.run:
            clock.stop()

    def depth(self, depths: dict[FrameType, int]) -> float:
        """How far from the calling code the frame is that began the run; infinite outside of that."""
        if self.caller is None:
            return -1
        frame = self.caller.running(depths)
        return math.inf if frame is None else depths[frame]

    def waits(self, exactly: bool) -> bool:
        """Whether a generator began the run, which may go on later; exactly: the generator was not aborted (a slow test)."""
        frames = [] if self.caller is None else self.caller.frames[:1]
        if not any(frame.f_code.co_flags & GENERATORS for frame in frames):
            return False
        return not exactly or any(isinstance(owner, Generator | Coroutine) for owner in gc.get_referrers(*frames))


# of this thread or task, the latest last; some may have ended
_RUNS: ContextVar[tuple[Begun, ...]] = ContextVar("sodaprof_runs", default=())


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _depths() -> dict[FrameType, int]:
    return {frame: depth for depth, frame in enumerate(_stack())}


def begin(run: Run, in_pipeline: bool) -> None:
    """Puts the calling thread or task into a run; in_pipeline: the run is aborted if the call that begins it is."""
    depths = _depths()
    others = (
        begun
        for begun in _RUNS.get()
        if not begun.run.ended
        and begun.run.clock is not None
        and (begun.depth(depths) < math.inf or begun.waits(exactly=True))
    )
    _RUNS.set((*others, Begun(run, Caller() if in_pipeline else None)))


def end(run: Run) -> None:
    """Marks a run as ended; the calling thread or task forgets it."""
    run.ended = True
    _RUNS.set(tuple(begun for begun in _RUNS.get() if not begun.run.ended))


def current_clock(clocks: Collection[Clock], *, entering: bool = False) -> Clock | None:
    """Returns the clock, one of these, of the run that the calling code is in; None outside of runs, and if it was replaced.

    entering: the code calls a network: its run is that whose beginning is the nearest to it, the latest of equally near ones
    (generators may take turns), and runs after it whose call of the pipeline was aborted are ended. Otherwise the code is in
    the call of the network that was entered last.
    """
    found = [begun for begun in _RUNS.get() if not begun.run.ended and begun.run.clock in clocks]
    if entering:
        depths = _depths()
        chosen = min(reversed(found), key=lambda begun: begun.depth(depths), default=None)
        if chosen is not None and chosen.depth(depths) == math.inf:
            chosen = None
        for begun in found[0 if chosen is None else found.index(chosen) + 1 :]:
            if begun.depth(depths) == math.inf and not begun.waits(exactly=False):
                begun.stop()
        found = [] if chosen is None else [chosen]
        if chosen is not None and chosen.caller is not None:
            chosen.caller.runs_now()
        _RUNS.set((*(begun for begun in _RUNS.get() if begun is not chosen), *found))
    clock = found[-1].run.clock if found else None
    return clock if clock is not None and clock.run is found[-1].run else None


def was_replaced(clocks: Collection[Clock]) -> bool:
    """Whether another call took over the scheduler of a run that the calling thread or task is in."""
    depths = _depths()
    kept = [(b.run, b.run.clock) for b in _RUNS.get() if not b.run.ended and b.depth(depths) < math.inf]
    return any(clock in clocks and clock.run is not run for run, clock in kept if clock is not None)
