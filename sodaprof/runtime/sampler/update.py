"""A schedule's update takes the scheduler's steps: x ← c0 · x + Σ c_j · V_j + the scheduler's own noise."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...errors import MismatchError, UnsupportedModelError
from ...formats.sampler import OwnUpdate
from ...formats.schedule import Schedule
from ...pipelines.sampler_steps import WIDENING, basis_of, own_update, refuse_settings

KNOWN_OPTIONS = ("generator", "return_dict")  # arguments of a scheduler's step that an update takes


@dataclass(frozen=True)
class Jump:
    """The updates from one step that calls the network to the next, composed into one."""

    start: int  # the step that calls the network
    coefficients: tuple[float, ...]  # c0, then of the V, newest (that of `start`) first
    noise: tuple[float, ...]  # weights of the draws, one a step that draws, in their order
    initial: float = 0.0  # of the run's first latents


def at_own_timesteps(
    add_noise: Callable[..., Any], times: Sequence[float], own: Sequence[float], *args: Any, **kwargs: Any
) -> Any:
    """Calls a scheduler's `add_noise` or the like with the sampler's own timesteps in place of network times."""
    bound = inspect.signature(add_noise).bind(*args, **kwargs)
    for name in {"timestep", "timesteps"} & {*bound.arguments}:
        given = bound.arguments[name]
        dtype = given.dtype if given.is_floating_point() else torch.float64
        known = dict(zip(torch.tensor(times, dtype=dtype).tolist(), own, strict=True))
        found = [known.get(t, t) for t in given.reshape(-1).tolist()]
        bound.arguments[name] = torch.tensor(found, device=given.device).reshape(given.shape)
    return add_noise(*bound.args, **bound.kwargs)


def called_steps(schedule: Schedule) -> list[bool]:
    """Returns for each step whether a network is called at it."""
    stacks = [plan.stack for plan in schedule.transformers.values()]
    return [any(action in ".S" for action in column) for column in zip(*stacks, strict=True)]


def jumps(
    coefficients: Sequence[Sequence[float]],
    noise: Sequence[float],
    called: Sequence[bool],
    initial: Sequence[float] | None = None,
) -> list[Jump]:
    """Returns the updates [T][1 + K] composed from one called step to the next; exact, in float64.

    initial: the weights of the run's first latents [T], 0 by default.
    """
    starts = [step for step, calls in enumerate(called) if calls]
    found = []
    for start, end in zip(starts, [*starts[1:], len(called)], strict=True):
        whole, draws, first = [1.0] + [0.0] * (len(coefficients[start]) - 1), list[float](), 0.0
        for step in range(start, end):
            own, *others = coefficients[step]
            whole = [own * whole[0], *(own * c + other for c, other in zip(whole[1:], others, strict=True))]
            draws = [own * weight for weight in draws] + ([noise[step]] if noise[step] else [])
            first = own * first + (initial[step] if initial else 0.0)
        found.append(Jump(start, tuple(whole), tuple(draws), first))
    return found


def drawn(weights: Sequence[float], output: Tensor, generator: Any) -> Tensor | None:
    """Returns the weighted sum of a draw for each weight, as a scheduler draws noise for this output; None of no draws."""
    total = None
    for weight in weights:
        noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        weighted = noise.to(wide(output)) * weight
        total = weighted if total is None else total + weighted
    return total


def next_dtype(scheduler_class: str, sample: Tensor) -> torch.dtype:
    """Returns the dtype of the next latents."""
    return wide(sample) if scheduler_class in WIDENING else sample.dtype


def wide(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which updates are computed: fp32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


class Ring:
    """The newest V and the run's first latents, and their weighted sum with the latents."""

    def __init__(self, history: int, keeps_first: bool = False) -> None:
        self.history, self.keeps_first = history, keeps_first
        self.newest: list[Tensor] = []  # newest first
        self.first: Tensor | None = None

    def reset(self) -> None:
        self.newest, self.first = [], None

    def add(self, pair: tuple[float, float], sample: Tensor, output: Tensor) -> None:
        """Adds the V of a step: pair[0] · sample + pair[1] · guided output."""
        of_sample, of_output = pair
        if self.keeps_first and not self.newest:
            self.first = sample.to(wide(sample), copy=True)
        value = output.to(wide(output), copy=True) if of_output == 1 else output.to(wide(output)) * of_output
        if of_sample:
            value = value.add_(sample.to(value.dtype), alpha=of_sample)
        self.newest = [value, *self.newest[: self.history - 1]]

    def moved(
        self,
        coefficients: Sequence[float],
        sample: Tensor,
        noise: Tensor | None,
        dtype: torch.dtype,
        initial: float = 0.0,
    ) -> Tensor:
        """Returns the next latents in this dtype: one sum in fp32 or wider, rounded once."""
        own, *weights = coefficients
        total = sample.to(wide(sample)) * own
        for weight, value in zip(weights, self.newest, strict=False):
            if weight:
                total.add_(value, alpha=weight)
        if initial:
            assert self.first is not None  # kept since the first step
            total.add_(self.first, alpha=initial)
        if noise is not None:
            total.add_(noise)
        return total.to(dtype)


class StateUpdate:
    """The update of a schedule, called by the clock at every step of a run."""

    def __init__(self, schedule: Schedule) -> None:
        assert schedule.update is not None
        self.update, self.called = schedule.update, called_steps(schedule)
        self.initial = self.update.initial or (0.0,) * schedule.steps
        self.ring = Ring(self.update.history, any(self.initial))
        self.own: OwnUpdate | None = None  # the scheduler's own, whose data predictions and noise are kept
        self.sigmas: Any = None  # those that `own` was measured with
        self.defaults: dict[str, Any] = {}  # of the arguments after output, timestep and sample

    def begin(self, scheduler: Any) -> None:
        """Begins a run with the scheduler as `set_timesteps` left it. UnsupportedModelError if it is not linear."""
        self.reset()
        sigmas = getattr(scheduler, "sigmas", None)
        sigmas = sigmas.tolist() if torch.is_tensor(sigmas) else None
        if self.own is None or sigmas != self.sigmas:
            self.own, self.sigmas = own_update(scheduler, scheduler.timesteps, self.update.basis), sigmas
            self.defaults = defaults_of(scheduler)

    def reset(self) -> None:
        self.ring.reset()

    def take(self, own: Callable[..., Any], scheduler: Any, step: int, *arguments: Any, **options: Any) -> Any:
        """Returns the next latents in the form of the scheduler's step, and increments its index (`clock.StepTaker`)."""
        assert self.own is not None
        output, timestep, sample, *others = arguments
        options = dict(zip(self.defaults, others, strict=False)) | options
        refuse_options(scheduler, self.defaults, options)
        if output.shape != sample.shape:
            raise MismatchError(
                f"The scheduler is given an output {list(output.shape)} for latents {list(sample.shape)}; a fitted update "
                "weighs outputs of their shape. Compile without an update for this pipeline."
            )
        if "_step_index" in vars(scheduler):
            if scheduler._step_index is None:
                scheduler._init_step_index(timestep)
            scheduler._step_index += 1
        if self.called[step]:
            self.ring.add(self.own.data[step], sample, output)
        draws = [self.own.noise[step]] if self.own.noise[step] else []
        noise, dtype = drawn(draws, output, options.get("generator")), next_dtype(type(scheduler).__name__, sample)
        moved = self.ring.moved(self.update.coefficients[step], sample, noise, dtype, self.initial[step])
        return step_result(scheduler, moved, options.get("return_dict", True))


def check_linear(scheduler: Any, basis: str) -> None:
    """Raises UnsupportedModelError if the scheduler's steps are no weighted sums, MismatchError if they have no such basis."""
    refuse_settings(scheduler)
    if basis == "output" != basis_of(scheduler):
        raise MismatchError(
            f"The schedule's update is of basis {basis!r}, the steps of {type(scheduler).__name__} are of basis "
            f"{basis_of(scheduler)!r}. Compile again, from a profile of this scheduler."
        )


def defaults_of(scheduler: Any) -> dict[str, Any]:
    """Returns the arguments of the scheduler's step after output, timestep and sample, with their defaults, in order."""
    return {name: p.default for name, p in list(inspect.signature(type(scheduler).step).parameters.items())[4:]}


def refuse_options(scheduler: Any, defaults: dict[str, Any], options: dict[str, Any]) -> None:
    """Raises UnsupportedModelError with the name of an argument that changes what the step does."""
    for name, value in options.items():
        default = defaults.get(name)
        if name in KNOWN_OPTIONS or value is default or (not torch.is_tensor(value) and value == default):
            continue
        shown = "a tensor" if torch.is_tensor(value) else repr(value)
        raise UnsupportedModelError(
            f"The pipeline calls the step of {type(scheduler).__name__} with {name}={shown}, which a fitted update does not "
            f"take. Leave {name} at {default!r}, or compile without an update."
        )


def step_result(scheduler: Any, moved: Tensor, return_dict: bool) -> Any:
    """Returns the latents as this scheduler's step returns them; other fields (`pred_original_sample`) are None."""
    cls = type(scheduler)
    kind = getattr(sys.modules.get(cls.__module__), f"{cls.__name__}Output", SchedulerOutput)
    if return_dict:
        return kind(prev_sample=moved)
    return (moved, *(None for field in dataclasses.fields(kind) if field.name != "prev_sample"))
