"""Records what a pipeline does: hooks on its modules, the first sampling step of a run, what blocks pass to one another."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch._dynamo import OptimizedModule

from ..errors import MismatchError, SodaprofError, UnsupportedModelError
from ..formats.sites import Transformer
from .load import OwnCall, call, transformers_of
from .patch import owner_of, patched
from .probe import Args, Forward, Kwargs, hidden_states

Latents = torch.Tensor | list[torch.Tensor]  # of a network call
Calls = dict[str, list[Any]]  # path of a module -> a value for each of its calls


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
        with uncompiled(module):
            yield
    finally:
        registry.remove_hook(name, recurse=False)


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Runs a module and its parts without what `module.compile()` made of them, which hooks have no place in.

    Hooks act by the step and count calls, so that torch.compile would compile them for each step anew, up to its limit.
    """
    compiled = [(part, part._compiled_call_impl) for part in module.modules() if part._compiled_call_impl is not None]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, own in compiled:
            part._compiled_call_impl = own


def tapped(module: nn.Module, function: Callable[..., Any], name: str) -> AbstractContextManager[None]:
    """Replaces the module's forward by function(original_forward, args, kwargs) while the block runs."""
    return hooked(module, _Tap(function), name)


@contextmanager
def all_tapped(module: nn.Module, paths: Iterable[str], function: Callable[..., Any], name: str) -> Iterator[None]:
    """Replaces the forwards of submodules by function(path, original_forward, args, kwargs) while the block runs."""
    with ExitStack() as taps:
        taps.enter_context(uncompiled(module))
        for path in paths:
            taps.enter_context(tapped(module.get_submodule(path), partial(function, path), name))
        yield


@contextmanager
def recorded_calls(
    module: nn.Module, paths: Iterable[str], received: Collection[str] = ()
) -> Iterator[tuple[Calls, Calls]]:
    """Yields the outputs of submodules and the hidden states that those of `received` get, filled while the block runs."""
    outputs: Calls = {path: [] for path in paths}
    inputs: Calls = {path: [] for path in received}

    def note(path: str, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        if path in received:
            inputs[path].append(hidden_states(args, kwargs))
        outputs[path].append(forward(*args, **kwargs))
        return outputs[path][-1]

    with all_tapped(module, outputs, note, "sodaprof.calls"):
        yield outputs, inputs


@dataclass
class Step:
    """One recorded sampling step: every call of a network, and what the scheduler was set to.

    For networks that take turns (Wan 2.2), the first step of each.
    """

    calls: list[tuple[str, Args, Kwargs]] = field(default_factory=list)
    timesteps: tuple[float, ...] = ()
    latents: tuple[int, ...] = ()  # shape of the scheduler's sample
    called: dict[str, tuple[int, ...]] = field(default_factory=dict)  # network -> its steps, if networks take turns
    folds: dict[tuple[str, str], int] = field(default_factory=dict)  # (network, site) -> B of its output a sample

    @property
    def passes(self) -> int:
        """Calls of one network in a step."""
        return sum(name == self.calls[0][0] for name, *_ in self.calls)

    def call_of(self, name: str) -> tuple[Args, Kwargs]:
        """Returns the arguments of the first recorded call of a network."""
        return next((args, kwargs) for called, args, kwargs in self.calls if called == name)


class _Recorded(Exception):
    """The step is recorded: stop the pipeline."""


class _StepRecorder:
    """Takes the place of a pipeline's networks and of its scheduler's step until the step is recorded."""

    def __init__(self, scheduler: Any, networks: int) -> None:
        self.scheduler, self.networks = scheduler, networks
        self.step = Step()
        self.done = 0  # scheduler steps
        self.outputs: dict[str, Any] = {}  # the latest of each network
        self.called: dict[str, list[int]] = {}  # network -> the steps that called it

    def call(self, name: str, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        """Runs and records a network at its first step; at later steps it returns the same output again."""
        steps = self.called.setdefault(name, [])
        if steps[-1:] != [self.done]:
            steps.append(self.done)
        if steps == [self.done]:
            self.step.calls.append((name, args, kwargs))
            self.outputs[name] = forward(*args, **kwargs)
        return self.outputs[name]

    def advance(
        self, take_step: Any, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Takes a step, unless all networks were called at the first one or it is the last."""
        self.done += 1
        if self.done == 1:
            self.step.timesteps = tuple(self.scheduler.timesteps.tolist())
            self.step.latents = tuple(sample.shape)
        if (self.done == 1 and len(self.called) == self.networks) or self.done == len(self.step.timesteps):
            raise _Recorded
        return take_step(model_output, timestep, sample, *args, **kwargs)


def record_step(
    pipe: Any, entries: list[int | str], steps: int, guidance_scale: float | None, own: OwnCall | None = None
) -> Step:
    """Returns the first step of a run of the pipeline, which is stopped there.

    If a transformer is not called at it, the run goes on to its end, to see which steps call which transformer; those that
    are recorded compute no more. Raises SodaprofError for numbers of steps that the scheduler does not take.
    """
    if steps < 1:
        raise SodaprofError(f"--steps is {steps}; expected at least 1.")
    scheduler, parts = pipe.scheduler, transformers_of(pipe)
    check_no_schedule(pipe)
    for name, network in parts.items():
        refuse_caches(name, network)

    def start(set_timesteps: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return set_timesteps(*args, **kwargs)
        except ValueError as error:
            raise SodaprofError(
                f"{type(scheduler).__name__} does not take {steps} steps: {error} Give another number: --steps N"
            ) from error

    recorder = _StepRecorder(scheduler, len(parts))
    with ExitStack() as patches, suppress(_Recorded):
        for name, module in parts.items():
            patches.enter_context(tapped(module, partial(recorder.call, name), "sodaprof.record"))
        patches.enter_context(patched(scheduler, "step", recorder.advance, refuse_copy))
        patches.enter_context(patched(scheduler, "set_timesteps", start, refuse_copy))
        call(pipe, entries, [0] * len(entries), steps, guidance_scale, own=own)
    step = recorder.step
    if any(len(of_network) < recorder.done for of_network in recorder.called.values()):
        step.called = {name: tuple(of_network) for name, of_network in recorder.called.items()}
    if not step.calls or not step.timesteps:
        raise UnsupportedModelError(f"{type(pipe).__name__} called no transformer before its scheduler's first step.")
    return step


def check_no_schedule(pipe: Any) -> None:
    """Raises MismatchError if a schedule is attached to the pipeline."""
    if owner_of(pipe.scheduler) is not None:
        raise MismatchError(
            "The pipeline carries a schedule; a run is recorded without one. Remove it: sodaprof.remove(pipe)"
        )


def refuse_compiled(name: str, transformer: nn.Module) -> None:
    """Raises MismatchError if the pipeline has what torch.compile made of the transformer in its place."""
    if isinstance(transformer, OptimizedModule):
        raise MismatchError(
            f"{name} was replaced by torch.compile({name}), which sodaprof cannot put hooks into. Put the network itself back: "
            f'pipe.{name} = pipe.{name}._orig_mod, then apply(pipe, schedule, runtime="compiled") compiles its blocks.'
        )


CACHE_HOOK = re.compile(r"cache|^fbc_|broadcast")  # in the names of diffusers' hooks


def refuse_caches(name: str, transformer: nn.Module) -> None:
    """Raises MismatchError if another cache is enabled on the transformer: one of diffusers, or cache-dit."""
    hooks = [hook for m in transformer.modules() for hook in getattr(vars(m).get("_diffusers_hook"), "hooks", ())]
    if found := list(dict.fromkeys(filter(CACHE_HOOK.search, hooks))):
        config = getattr(transformer, "_cache_config", None)
        kind, do = type(config).__name__.removesuffix("Config"), f"pipe.{name}.disable_cache()"
        if config is None:  # put on by a function of diffusers.hooks, which disable_cache() does not know of
            registry = f"diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.{name})"
            kind, do = found[0], "; ".join(f"{registry}.remove_hook({hook!r})" for hook in found)
        raise MismatchError(
            f"{name} carries another cache, {kind} of diffusers, which would run inside the schedule's cells. Disable it: {do}"
        )
    forwards = [vars(m).get("forward") for m in transformer.modules()]
    modules = [getattr(getattr(f, "__func__", f), "__module__", "") or "" for f in forwards]
    modules += [type(m).__module__ for m in transformer.modules()]
    if getattr(transformer, "_is_cached", False) or any(module.startswith("cache_dit") for module in modules):
        raise MismatchError(
            f"{name} carries another cache, cache-dit, which would run inside the schedule's cells. Disable it: "
            "cache_dit.disable_cache(pipe)"
        )


def refuse_copy(scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Raises UnsupportedModelError: the pipeline makes copies of its scheduler and samples with those."""
    raise UnsupportedModelError(
        f"The pipeline samples with copies of its {type(scheduler).__name__} (one for each frame, or for the audio), so one step "
        "of the scheduler is not one step of the run. This release profiles pipelines that sample with one scheduler."
    )


def latents_of(transformer: nn.Module, args: Args, kwargs: Kwargs) -> Latents:
    """Returns the latents that a transformer is called with, its first argument: a tensor, or a list of one a sample.

    Raises UnsupportedModelError if it is something else.
    """
    if args:
        latents = args[0]
    else:
        _, name, *_ = inspect.signature(type(transformer).forward).parameters  # the first is self
        latents = kwargs.get(name)
    if torch.is_tensor(latents) or (isinstance(latents, list) and latents and all(map(torch.is_tensor, latents))):
        return latents
    raise UnsupportedModelError(
        f"{type(transformer).__name__} takes its latents as {type(latents).__name__}; this release runs transformers "
        "whose first argument is one tensor, or a list with a tensor for each sample."
    )


def has_null_half(transformer: Any, kwargs: Kwargs) -> bool | None:
    """Whether half of a batch has the label that means none, as DiT's other branch has; None without labels."""
    labels, null = kwargs.get("class_labels"), dict(transformer.config).get("num_embeds_ada_norm")
    if not torch.is_tensor(labels) or null is None:
        return None
    return any(bool((half == null).all()) for half in labels.chunk(2))


def is_halved(latents: Latents) -> bool:
    """Whether a network input holds the same latents twice, as it does if both guidance branches share a batch."""
    half = len(latents) // 2
    if half == 0 or len(latents) != 2 * half:
        return False
    if torch.is_tensor(latents):  # one host sync
        return torch.equal(latents[:half], latents[half:])
    return all(map(torch.equal, latents[:half], latents[half:]))


@dataclass(frozen=True)
class Stack:
    """The blocks of a transformer, each of which passes one tensor to the next."""

    first: str  # path of the first block in execution order
    last: str
    size: int  # elements of that tensor in the recorded call, all branches included


def stack_of(pipe: Any, name: str, transformer: Transformer, step: Step) -> Stack | None:
    """Returns the transformer's stack; None unless each block returns one tensor, the last of the shape that enters."""
    blocks = list(dict.fromkeys(f"{site.stack}.{site.layer}" for site in transformer.sites))
    args, kwargs = step.call_of(name)
    module = pipe.components[name]
    with recorded_calls(module, blocks, blocks[:1]) as (outputs, inputs), torch.no_grad():
        module(*args, **kwargs)
    passed = [*inputs[blocks[0]], *(out for block in blocks for out in outputs[block])]
    if len(passed) != 1 + len(blocks) or not all(map(torch.is_tensor, passed)):
        return None
    return Stack(blocks[0], blocks[-1], passed[-1].numel()) if passed[0].shape == passed[-1].shape else None
