"""Listens to a pipeline: hooks on its modules, and the first sampling step of a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ..errors import MismatchError, SodaprofError, UnsupportedModelError
from .load import OwnCall, call, transformers_of

Latents = torch.Tensor | list[torch.Tensor]  # of a network call


class _Tap(ModelHook):  # type: ignore[misc]
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.fn_ref.original_forward, args, kwargs)


@contextmanager
def hooked(module: nn.Module, hook: ModelHook, name: str) -> Iterator[None]:
    """Attaches a diffusers hook to a module while the block runs."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    try:
        yield
    finally:
        registry.remove_hook(name, recurse=False)


def tapped(module: nn.Module, function: Callable[..., Any], name: str) -> AbstractContextManager[None]:
    """Replaces the module's forward by function(original_forward, args, kwargs) while the block runs."""
    return hooked(module, _Tap(function), name)


@contextmanager
def stepping(scheduler: Any, step: Callable[..., Any]) -> Iterator[None]:
    """Replaces the scheduler's step while the block runs; afterwards it is what it was, be it the user's own."""
    own = vars(scheduler).get("step")
    scheduler.step = step
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


@contextmanager
def _starting(scheduler: Any, steps: int) -> Iterator[None]:
    """Tells of a scheduler that refuses so many steps as one of sodaprof's errors, while the block runs."""
    own, set_timesteps = vars(scheduler).get("set_timesteps"), scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines look at what it can be given
    def start(*args: Any, **kwargs: Any) -> Any:
        try:
            return set_timesteps(*args, **kwargs)
        except ValueError as error:
            raise SodaprofError(
                f"{type(scheduler).__name__} does not take {steps} steps: {error} Give another number: --steps N"
            ) from error

    scheduler.set_timesteps = start
    try:
        yield
    finally:
        if own is None:
            del scheduler.set_timesteps
        else:
            scheduler.set_timesteps = own


@dataclass
class Step:
    """One recorded sampling step: every call of a network, and what the scheduler was set to.

    Of networks that take turns (Wan 2.2), each one's first step.
    """

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    timesteps: tuple[float, ...] = ()
    latents: tuple[int, ...] = ()  # shape of the scheduler's sample
    called: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # of networks that take turns: network -> its steps
    folds: dict[tuple[str, str], int] = field(default_factory=dict)  # (network, site) -> B of its output a sample

    @property
    def passes(self) -> int:
        """Calls of one network in a step."""
        return sum(name == self.calls[0][0] for name, *_ in self.calls)


class _Enough(Exception):
    """The step is recorded: stop the pipeline."""


def record_step(
    pipe: Any, entries: list[int | str], steps: int, guidance_scale: float | None, own: OwnCall | None = None
) -> Step:
    """Returns the first step of a run of the pipeline, which is stopped there.

    Where not all transformers are called at it, the run goes on to its end, to see which steps are whose; those that were
    recorded compute no more. Raises SodaprofError for numbers of steps that the scheduler does not take.
    """
    if steps < 1:
        raise SodaprofError(f"--steps is {steps}; expected at least 1.")
    step = Step()
    scheduler, parts = pipe.scheduler, transformers_of(pipe)
    if "_sodaprof" in vars(scheduler):
        raise MismatchError("The pipeline carries a schedule; it is looked at plain. Take it off: handle.remove()")
    take_step = scheduler.step
    outputs: dict[str, Any] = {}  # the latest of each transformer
    called: dict[str, list[int]] = {}  # transformer -> the steps that called it
    done = 0

    def advance(model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if not step.timesteps:
            step.timesteps = tuple(scheduler.timesteps.tolist())
            step.latents = tuple(sample.shape)
        if (done == 1 and len(called) == len(parts)) or done == len(step.timesteps):
            raise _Enough
        return take_step(model_output, timestep, sample, *args, **kwargs)

    def record(name: str) -> Callable[..., Any]:
        def tap(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            steps = called.setdefault(name, [])
            if steps[-1:] != [done]:
                steps.append(done)
            if steps == [done]:
                step.calls.append((name, args, kwargs))
                outputs[name] = forward(*args, **kwargs)
            return outputs[name]

        return tap

    with ExitStack() as stack:
        for name, module in parts.items():
            stack.enter_context(tapped(module, record(name), "sodaprof.record"))
        stack.enter_context(stepping(scheduler, advance))
        stack.enter_context(_starting(scheduler, steps))
        with suppress(_Enough):
            call(pipe, entries, [0] * len(entries), steps, guidance_scale, own=own)
    if any(len(steps) < done for steps in called.values()):
        step.called = {name: tuple(steps) for name, steps in called.items()}
    if not step.calls or not step.timesteps:
        raise UnsupportedModelError(f"{type(pipe).__name__} called no transformer before its scheduler's first step.")
    return step


def latents_of(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Latents:
    """Returns the latents that a transformer is called with, its first argument: a tensor, or a list of one a sample.

    Raises UnsupportedModelError where it is something else.
    """
    if args:
        latents = args[0]
    else:
        _, name, *_ = inspect.signature(type(transformer).forward).parameters  # the first is self
        latents = kwargs.get(name)
    if torch.is_tensor(latents) or (isinstance(latents, list) and latents and all(map(torch.is_tensor, latents))):
        return latents
    raise UnsupportedModelError(
        f"{type(transformer).__name__} takes its latents as {type(latents).__name__}; this release drives transformers "
        "whose first argument is one tensor, or a list with a tensor for each sample."
    )


def is_halved(latents: Latents) -> bool:
    """Whether a network input holds the same latents twice, as it does where both guidance branches share a batch."""
    half = len(latents) // 2
    if half == 0 or len(latents) != 2 * half:
        return False
    if torch.is_tensor(latents):
        return torch.equal(latents[:half], latents[half:])
    return all(map(torch.equal, latents[:half], latents[half:]))
