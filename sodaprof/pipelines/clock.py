"""The clock of a run: the current step and guidance branch, read off the scheduler's and the transformers' calls."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from ..errors import MismatchError
from ..formats.sites import Sampler
from .patch import patched
from .recording import Latents, has_null_half, is_halved, refuse_copy
from .runs import Run, begin, end


@dataclass
class Moment:
    """The transformer call that runs now: set by the transformer's hook at each call, read by the sites' hooks."""

    step: int = 0
    branch: int = 0
    forward: int = 0  # counts transformer calls, so that a site can recognise its first call within one
    tabled: bool = False  # the conditioning tables were made for this call
    executed: Counter[str] = field(default_factory=Counter)  # cells, of all guidance branches
    served: Counter[str] = field(default_factory=Counter)  # in the run: blocks from tables, sums, sums by the kernel
    programs: int = 0  # traced


BOTH = "both branches in one batch"
CALLS = {  # advice for each guidance form
    "halves": "with guidance on (guidance_scale above 1) and no call of the network besides the one for both branches",
    "passes": "with guidance on (guidance_scale above 1), one network call a branch",
    "none": "with guidance off (guidance_scale at most 1, no negative prompt)",
}


class StepTaker(Protocol):
    """Takes steps of a run in place of the scheduler, or around it."""

    def take(self, own: Callable[..., Any], scheduler: Any, step: int, *arguments: Any, **options: Any) -> Any:
        """Returns the result of a step in the scheduler's form; own(*arguments, **options) takes the scheduler's.

        arguments: model output, timestep and sample, then whatever the pipeline passes by position; options: by keyword.
        """


class LoopTaker(StepTaker, Protocol):
    """Takes all steps of a run from some step on at once."""

    def finished(self, step: int) -> bool:
        """Whether all steps from this one on are taken."""


class Timesteps(torch.Tensor):
    """A scheduler's timesteps, over which iteration ends once the whole-step loop has taken all steps."""

    run: Run
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # otherwise a plain tensor

    def __iter__(self) -> Iterator[torch.Tensor]:
        for timestep in self.unbind(0):
            clock = self.run.clock
            if clock is not None and clock.run is self.run and clock.finished():
                return
            yield timestep

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


class Clock:
    """The run on one scheduler at a time, which is read off the scheduler's `set_timesteps` and `step`.

    `set_timesteps` starts a run (whatever happened before, so that an aborted run has no effect) and checks the timesteps;
    `step` ends a step. The transformer calls between two `step`s are the guidance branches; every step of a turn has the
    same. The clock keeps no scheduler alive.
    """

    def __init__(self, scheduler: Any, sampler: Sampler, on_start: Callable[[], None], on_end: Callable[[], None]):
        self._scheduler = weakref.ref(scheduler)
        self.sampler = sampler
        self.on_start, self.on_end = on_start, on_end
        self.times: tuple[float, ...] = sampler.timesteps  # that the network receives
        self.times_unchecked = False  # whether no run has compared these with what the network receives
        self.checks_times = False  # whether this run's next call at a fraction has to be compared
        self._kept: tuple[Any, Any] | None = None  # timesteps of the run in the scheduler, and the scheduler's own
        self.run: Run | None = None  # None outside of runs, and after a refusal
        self.update: StepTaker | None = None
        self.loop: LoopTaker | None = None  # around the update
        self.order: StepTaker | None = None  # around both
        self.branches = 0  # network calls a step in the latest run
        self._patches = ExitStack()

    @property
    def scheduler(self) -> Any:
        """The scheduler of the latest run; None once nobody else holds it."""
        return self._scheduler()

    @property
    def step(self) -> int | None:
        """The step of the run, None outside of runs."""
        return None if self.run is None else self.run.step

    def attach(self) -> None:
        """Patches the scheduler, for one pipeline without concurrent runs."""
        for name, wrapper in (("set_timesteps", self.start), ("step", self.advance)):
            one = partial(wrapper, self.scheduler)
            self._patches.enter_context(patched(self.scheduler, name, one, refuse_copy, owner=self))

    def detach(self) -> None:
        self._patches.close()

    def set_step(self, step: int) -> None:
        """Continues a run at the beginning of any step, for networks that are called without the pipeline."""
        if self.run is None:
            self.run, self.checks_times = Run(weakref.ref(self)), self.times_unchecked
            begin(self.run, in_pipeline=False)
        self.run.step, self.run.calls, self.run.turn_begins = step, 0, False

    def finished(self) -> bool:
        """Whether the whole-step loop has taken all steps; the run then ends, without further iterations of the pipeline."""
        run = self.run
        if self.loop is None or run is None or run.calls or not self.loop.finished(run.step):
            return False
        self.stop()
        self.on_end()
        return True

    def refuse(self, message: str) -> NoReturn:
        """Ends the run, so that the pipeline can be called again, and raises MismatchError."""
        self.stop()
        raise MismatchError(message)

    def start(self, scheduler: Any, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the scheduler's `set_timesteps` and starts a run."""
        self.run = run = self.claim(scheduler)
        try:
            result = set_timesteps(*args, **kwargs)
            self._check_timesteps()
            self.on_start()
        except BaseException:
            self.stop()
            raise
        begin(run, in_pipeline=True)
        own = scheduler.timesteps
        if self.times != self.sampler.timesteps:
            dtype = own.dtype if own.is_floating_point() else torch.float32
            scheduler.timesteps = torch.tensor(self.times, dtype=dtype, device=own.device)
            self.times = tuple(torch.tensor(self.times, dtype=dtype).tolist())  # as the pipeline passes them on
        if self.loop is not None:
            timesteps = scheduler.timesteps.detach().as_subclass(Timesteps)
            timesteps.run = run
            scheduler.timesteps = timesteps
        self._kept = scheduler.timesteps, own
        return result

    def advance(
        self,
        scheduler: Any,
        own_step: Callable[..., Any],
        model_output: Any,
        timestep: Any,
        sample: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Takes a step of the run, by the scheduler or by what takes its place; the scheduler's own outside of runs."""
        run, arguments = self.run, (model_output, timestep, sample, *args)
        if run is None:
            return own_step(*arguments, **kwargs)
        self._check_step(run, timestep, sample)
        take = own_step
        for taker in (self.update, self.loop, self.order):
            if taker is not None:
                take = partial(taker.take, take, scheduler, run.step)
        result = take(*arguments, **kwargs)
        index = getattr(scheduler, "step_index", None)  # of a scheduler that counts its steps
        if run.step == 0 and isinstance(index, int) and index != 1:
            self._refuse_start("the first of its timesteps", f"at number {index}")
        run.step, run.calls, run.turn_begins, self.branches = run.step + 1, 0, False, run.calls
        if run.step == self.sampler.steps:
            self.stop()
            self.on_end()
        return result

    def claim(self, scheduler: Any) -> Run:
        """Takes the clock for a run on this scheduler that is about to start, and returns it."""
        self.run, self._scheduler = Run(weakref.ref(self)), weakref.ref(scheduler)
        self.checks_times = self.times_unchecked
        return self.run

    def stop(self) -> None:
        """Ends the run, after which the scheduler has its own timesteps again."""
        if self.run is not None:
            end(self.run)
        if self._kept is not None and self.scheduler is not None and self.scheduler.timesteps is self._kept[0]:
            self.scheduler.timesteps = self._kept[1]
        self.run = self._kept = None

    def _check_timesteps(self) -> None:
        found, wanted = tuple(self.scheduler.timesteps.tolist()), self.sampler.timesteps
        if found != wanted:
            how = f"num_inference_steps={len(wanted)}" if len(found) != len(wanted) else "the profiled sampler"
            raise MismatchError(
                f"The schedule is for {len(wanted)} timesteps {brief(wanted)}, the pipeline runs {len(found)}: "
                f"{brief(found)}. Call it with {how}, or profile and compile for these timesteps."
            )

    def _check_step(self, run: Run, timestep: Any, sample: Any) -> None:
        wanted, form = self.times[run.step], self.sampler.guidance_form
        on_host = not torch.is_tensor(timestep) or timestep.device.type == "cpu"  # no host sync for the check
        counts = hasattr(self.scheduler, "step_index")  # on the host, and checked after the step
        if (on_host or (run.step == 0 and not counts)) and float(timestep) != float(wanted):
            self._refuse_start(f"at timestep {wanted:g}", f"at {float(timestep):g}")
        if not run.calls:
            self.refuse(
                f"The pipeline took step {run.step} without calling a transformer, which the schedule calls at each step. "
                "Run it without what skips steps, in a function of its own if its steps take turns with another run's, or remove "
                "the schedule: sodaprof.remove(pipe)"
            )
        if run.step == 0 and run.halved and form != "halves" and run.batches[0] == 2 * len(sample):
            self._refuse_guidance(BOTH)
        if run.turn_begins and (run.calls > 1) != (form == "passes"):
            self._refuse_guidance(f"{run.calls} network calls a step")
        if run.calls != len(run.batches):
            self._refuse_change(f"{run.calls} network call{'s' * (run.calls > 1)}", len(run.batches))

    def _refuse_change(self, found: str, wanted: int | str) -> NoReturn:
        self.refuse(
            f"Step {self.step} has {found}, the first one had {wanted}: the guidance changes within the run. Every step must "
            "call the network alike: call the pipeline without what changes it (guidance cutoff, interval, skipped layers)."
        )

    def _refuse_start(self, wanted: str, found: str) -> NoReturn:
        self.refuse(
            f"Step {self.step} is {wanted} in the schedule, the pipeline is {found}: it does not run all timesteps in order. "
            "Run the whole trajectory (image to image: strength 1), or remove the schedule: sodaprof.remove(pipe)"
        )

    def _refuse_guidance(self, found: str) -> NoReturn:
        form, scale = self.sampler.guidance_form, self.sampler.guidance_scale
        at = "" if scale is None else f" (scale {scale:g})"
        self.refuse(
            f"The schedule was made for guidance form {form!r}{at}, found {found}. Call the pipeline {CALLS[form]}, or profile "
            "it as it is called now."
        )

    def enter(
        self, hidden: Latents, turn_begins: Callable[[int], bool], call: tuple[nn.Module, dict[str, Any]]
    ) -> tuple[int, int]:
        """Returns (step, branch) of the transformer call that begins; MismatchError outside a run.

        turn_begins: whether the transformer's turn begins at a step; call: the transformer and its arguments by keyword.

        The first call of a run compares the two halves of the batch: one host sync, before the loop's kernels are queued.
        """
        if self.run is None:
            self.refuse(
                "The transformer was called outside a denoising loop (no set_timesteps before, or all steps are done). Sample "
                "with the pipeline's scheduler, whose set_timesteps and step are followed."
            )
        run = self.run
        step, branch = run.step, run.calls
        run.calls += 1
        if branch == 0 and (turn_begins(step) or not run.batches):
            run.turn_begins, run.batches, run.conditioning, run.held = True, [], [], []
        given = [value for value in call[1].values() if torch.is_tensor(value) and value is not hidden]
        addresses = {value.data_ptr() for value in given}
        if run.turn_begins:
            run.batches.append(len(hidden))
            run.conditioning.append(addresses)
            run.held += given
        elif branch >= len(run.batches):
            self._refuse_change(f"network call {branch + 1}", len(run.batches))
        elif len(hidden) != run.batches[branch]:
            self._refuse_change(f"a batch of {len(hidden)}", run.batches[branch])
        elif _is_of_another(addresses, run.conditioning, branch):
            self._refuse_change(f"another branch's arguments in network call {branch + 1}", "its own")
        if step == 0 and branch == 0:
            run.halved, null_half = is_halved(hidden), has_null_half(*call)
            if self.sampler.guidance_form == "halves" and (not run.halved or null_half is False):
                self._refuse_guidance("one branch a network call")
            if self.sampler.guidance_form != "halves" and run.halved and null_half:
                self._refuse_guidance(BOTH)
        return step, branch


def _is_of_another(addresses: set[int], conditioning: list[set[int]], branch: int) -> bool:
    """Whether a call has arguments that another branch alone had at the first step, and none that this branch alone had."""
    alone = [own - set().union(*(o for o in conditioning if o is not own)) for own in conditioning]
    return not addresses & alone[branch] and any(addresses & own for own in alone)


def brief(values: tuple[float, ...]) -> str:
    shown = [f"{v:g}" for v in values]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], "…", shown[-1]])
