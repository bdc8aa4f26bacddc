"""The clock of a run: which step, which guidance branch. It is read off the scheduler and the transformers' calls."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ..errors import MismatchError
from ..formats.sites import Sampler
from .recording import Latents, is_halved, latents_of


@dataclass
class Moment:
    """Where the run is: set by the transformer's hook at each call, read by the sites' hooks."""

    step: int = 0
    branch: int = 0
    forward: int = 0  # counts transformer calls, so that a site can tell its first call within one
    tabled: bool = False  # this call is one that the conditioning tables were made for
    executed: Counter[str] = field(default_factory=Counter)  # cells, not calls: counted on branch 0
    served: Counter[str] = field(default_factory=Counter)  # of the run: blocks from tables, sums, sums by the kernel
    programs: int = 0  # traced


class Timesteps(torch.Tensor):
    """A scheduler's timesteps, over which iteration ends once the whole-step loop has taken all steps."""

    clock: Clock
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # all else is a plain tensor's

    def __iter__(self) -> Iterator[torch.Tensor]:
        for timestep in self.unbind(0):
            if self.clock.finished():
                return
            yield timestep


class Clock:
    """Wraps `set_timesteps` and `step` of one scheduler instance while attached.

    `set_timesteps` starts a run (whatever happened before, so that an aborted run harms nothing) and checks the
    timesteps; `step` ends a step. The transformer calls between two `step`s are the guidance branches.
    """

    def __init__(self, scheduler: Any, sampler: Sampler, on_start: Callable[[], None], on_end: Callable[[], None]):
        self.scheduler, self.sampler = scheduler, sampler
        self.on_start, self.on_end = on_start, on_end
        self.step: int | None = None  # None: no run under way
        self.branches = 0  # transformer calls since the last scheduler step
        self.begins = True  # at this step a transformer's turn begins
        self.loop: Any = None  # takes the steps after the first itself: asked here for what they give
        self.update: Any = None  # moves the latents in place of the scheduler's own step
        self.saved: dict[str, Any] = {}

    def attach(self) -> None:
        self.saved = {name: vars(self.scheduler).get(name) for name in ("set_timesteps", "step")}
        set_timesteps, step = self.scheduler.set_timesteps, self.scheduler.step

        @functools.wraps(set_timesteps)
        def start(*args: Any, **kwargs: Any) -> Any:
            self.step = None
            result = set_timesteps(*args, **kwargs)
            self._check_timesteps()
            self.on_start()
            self.step, self.branches, self.begins = 0, 0, True
            if self.loop is not None:
                timesteps = self.scheduler.timesteps.detach().as_subclass(Timesteps)
                timesteps.clock = self
                self.scheduler.timesteps = timesteps
            return result

        @functools.wraps(step)
        def advance(model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.step is not None:
                self._check_step(timestep)
            if self.loop is not None and self.loop.final is not None:
                result = self.loop.last()
            elif self.update is not None and self.step is not None:
                given = model_output, timestep, sample, *args
                result = self.update.step(self.scheduler, self.step, given, kwargs)
            else:
                result = step(model_output, timestep, sample, *args, **kwargs)
            if self.step == 0:
                self._check_index()
            if self.loop is not None:
                self.loop.note(self.step, self.scheduler, model_output, sample, result, kwargs)
            if self.step is not None:
                self.step, self.branches, self.begins = self.step + 1, 0, False
                if self.step == self.sampler.steps:
                    self.step = None
                    self.on_end()
            return result

        self.scheduler.set_timesteps, self.scheduler.step = start, advance
        self.scheduler._sodaprof = self  # so that a second schedule on the same scheduler is refused

    def finished(self) -> bool:
        """Returns whether the whole-step loop has taken all steps; then the run ends here, and not after idle iterations."""
        if self.loop is None or self.loop.final is None or self.branches:
            return False
        if self.step is not None:
            self.loop.rest(self.step)
            self.step = None
            self.on_end()
        return True

    def detach(self) -> None:
        if isinstance(vars(self.scheduler).get("timesteps"), Timesteps):
            self.scheduler.timesteps = self.scheduler.timesteps.as_subclass(torch.Tensor)
        vars(self.scheduler).pop("_sodaprof", None)
        for name, own in self.saved.items():
            if own is None:
                vars(self.scheduler).pop(name, None)
            else:
                setattr(self.scheduler, name, own)

    def _check_timesteps(self) -> None:
        found = tuple(self.scheduler.timesteps.tolist())
        if found != self.sampler.timesteps:
            wanted = self.sampler.timesteps
            how = (
                f"num_inference_steps={len(wanted)}"
                if len(found) != len(wanted)
                else "the sampler it was profiled with"
            )
            raise MismatchError(
                f"The schedule is for {len(wanted)} timesteps {_brief(wanted)}, the pipeline runs {len(found)}: "
                f"{_brief(found)}. Call it with {how}, or profile and compile for these timesteps."
            )

    def _check_step(self, timestep: Any) -> None:
        assert self.step is not None
        wanted = self.sampler.timesteps[self.step]
        on_host = not torch.is_tensor(timestep) or timestep.device.type == "cpu"  # no synchronisation for the check
        counts = hasattr(self.scheduler, "step_index")  # on the host, and looked at after the step
        if (on_host or (self.step == 0 and not counts)) and float(timestep) != float(wanted):
            self._refuse_start(f"at timestep {wanted:g}", f"at {float(timestep):g}")
        if not self.branches:
            step, self.step = self.step, None
            raise MismatchError(
                f"The pipeline took step {step} without calling a transformer, which the schedule has at work there. Run it "
                "without what skips steps, or remove() the schedule."
            )
        if self.begins:
            self._check_guidance()

    def _check_index(self) -> None:
        """After the first step: a scheduler that counts steps itself must have begun at its first."""
        index = getattr(self.scheduler, "step_index", None)
        if isinstance(index, int) and index != 1:
            self._refuse_start("the first of its timesteps", f"at number {index}")

    def _refuse_start(self, wanted: str, found: str) -> None:
        step, self.step = self.step, None
        raise MismatchError(
            f"Step {step} of the schedule is {wanted}, the pipeline is {found}. Run the whole trajectory (no strength "
            "below 1), or remove() the schedule."
        )

    def _check_guidance(self) -> None:
        wanted = self.sampler.guidance_form
        if (self.branches > 1) != (wanted == "passes"):
            self._refuse("passes" if self.branches > 1 else "one network call a step", wanted)

    def enter(self, hidden: Latents) -> tuple[int, int]:
        """Returns (step, branch) of the transformer call that begins; MismatchError outside a run.

        The first call of a run compares the two halves of the batch: one synchronisation, before the loop is under way.
        """
        if self.step is None:
            raise MismatchError(
                "The transformer was called outside a denoising loop (no set_timesteps before, or all steps are done). "
                "Call the pipeline, or take the schedule off: handle.remove()"
            )
        branch = self.branches
        self.branches += 1
        if self.step == 0 and branch == 0 and is_halved(hidden) != (self.sampler.guidance_form == "halves"):
            self._refuse("both branches in one batch" if is_halved(hidden) else "one branch a network call",
                         self.sampler.guidance_form)  # fmt: skip
        return self.step, branch

    def _refuse(self, found: str, wanted: str) -> None:
        self.step = None
        raise MismatchError(
            f"The schedule was made for guidance form {wanted!r} (scale {self.sampler.guidance_scale}), found {found}. "
            "Call the pipeline with guidance on as profiled (guidance_scale above 1), or profile without guidance."
        )


class TransformerHook(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a transformer: sets the moment before each of its calls.

    past: how many steps of its turn go before each step, −1 where another transformer is at work (`sites.turn_ages`).
    on_turn is called before the first call of each turn. rests: steps at which the network is not run; its callers get what
    it returned last, which nobody reads; cells: how many of the picture such a step holds. Raises MismatchError for a call
    out of turn.
    """

    def __init__(
        self,
        clock: Clock,
        moment: Moment,
        check: Callable[[], None],
        name: str,
        past: list[int],
        on_turn: Callable[[], None] = lambda: None,
        rests: Container[int] = (),
        cells: int = 0,
    ) -> None:
        super().__init__()
        self.clock, self.moment, self.check = clock, moment, check
        self.name, self.past, self.on_turn = name, past, on_turn
        self.rests, self.cells = rests, cells
        self.latest: dict[int, Any] = {}  # branch -> what the network returned, where it rests at the next step

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.check()
        self.moment.step, self.moment.branch = self.clock.enter(latents_of(module, args, kwargs))
        past = self.past[self.moment.step]
        if past < 0:
            self._refuse()
        if past == 0 and self.moment.branch == 0:
            self.clock.begins = True
            self.on_turn()
        self.moment.forward += 1
        self.moment.tabled = False
        return args, kwargs

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step, branch = self.moment.step, self.moment.branch
        if step not in self.rests:
            out = self.fn_ref.original_forward(*args, **kwargs)
            if step + 1 in self.rests:
                self.latest[branch] = out
            return out
        if branch not in self.latest:
            self.clock.step = None
            raise MismatchError(
                f"The pipeline calls {self.name} {branch + 1} times at step {step}, where the schedule rests, and less often "
                "before: its guidance changes from step to step. remove() the schedule, or call it with one guidance."
            )
        if branch == 0:
            self.moment.executed["-"] += self.cells
        return self.latest[branch]

    def reset(self) -> None:
        self.latest.clear()

    def _refuse(self) -> None:
        """Raises MismatchError: the pipeline changes transformers elsewhere than profiled."""
        step, self.clock.step = self.moment.step, None
        mine = [t for t, past in enumerate(self.past) if past >= 0]
        raise MismatchError(
            f"The pipeline calls {self.name} at step {step} (timestep {self.clock.sampler.timesteps[step]:g}), where another "
            f"transformer was at work when it was profiled; {self.name} was at work at steps {_brief(tuple(mine))}. Set the "
            "boundary between them back (for Wan pipe.register_to_config(boundary_ratio=...)), or profile and compile anew."
        )


def _brief(values: tuple[float, ...]) -> str:
    shown = [f"{v:g}" for v in values]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], "…", shown[-1]])
