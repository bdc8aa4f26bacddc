"""Finds the sites of a pipeline: by structure, and by recording what one sampling step does. No list of models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import nn

from ..errors import UnsupportedModelError
from ..sites import Model, Sampler, Site, Transformer
from .load import call, default_prompts, transformers_of

ATTENTION = (Attention, MochiAttention, AttentionModuleMixin)
ATTENTION_CLASS = re.compile(r"attn|attention", re.I)
NO_ATTENTION_CLASS = re.compile(r"norm|processor|block|layer$", re.I)
MLP_NAME = re.compile(r"^(\w+_)?(ff|ffn|feed_?forward|mlp|moe)(_\w+)?\d*$")
CONFIG_KEYS = {  # fingerprint -> the config keys that hold it, first one found
    "layers": ("num_layers", "depth"),
    "heads": ("num_attention_heads", "num_heads"),
    "head_width": ("attention_head_dim",),
    "patch": ("patch_size",),
    "channels": ("in_channels",),
}


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


@dataclass
class Step:
    """One recorded sampling step: every call of a network, and what the scheduler was set to."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    timesteps: tuple[float, ...] = ()
    latents: tuple[int, ...] = ()  # shape of the scheduler's sample


class _Enough(Exception):
    """The step is recorded: stop the pipeline."""


def record_step(pipe: Any, entries: list[int | str], steps: int, guidance_scale: float | None) -> Step:
    """Returns the first step of a run of the pipeline, which is stopped there."""
    step = Step()
    scheduler = pipe.scheduler

    def stop(model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        step.timesteps = tuple(scheduler.timesteps.tolist())
        step.latents = tuple(sample.shape)
        raise _Enough

    def record(name: str) -> Callable[..., Any]:
        def tap(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            step.calls.append((name, args, kwargs))
            return forward(*args, **kwargs)

        return tap

    with ExitStack() as stack:
        for name, module in transformers_of(pipe).items():
            stack.enter_context(tapped(module, record(name), "sodaprof.record"))
        scheduler.step = stop
        try:
            call(pipe, entries, [0] * len(entries), steps, guidance_scale)
        except _Enough:
            pass
        finally:
            del scheduler.step
    if not step.calls or not step.timesteps:
        raise UnsupportedModelError(f"{type(pipe).__name__} called no transformer before its scheduler's first step.")
    return step


def inspect_pipeline(
    pipe: Any, name: str, steps: int, guidance_scale: float | None = None, entry: int | str | None = None
) -> tuple[Model, Sampler, Step]:
    """Returns the model's sites, the sampler, and the recorded step they come from (batch 1, no gradient).

    Raises UnsupportedModelError for a model without attention blocks or whose sites cannot be told apart.
    """
    if entry is None:
        entry = default_prompts(pipe)[0]
    with torch.no_grad():
        step = record_step(pipe, [entry], steps, guidance_scale)
        transformers = {n: find_sites(pipe, n, step) for n in dict.fromkeys(c[0] for c in step.calls)}
    first = next(iter(transformers))
    parameter = next(pipe.components[first].parameters())
    shape = {
        "latent": list(step.latents[1:]),
        "tokens": max(s.tokens for s in transformers[first].sites),
        "batch_profiled": 1,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
    form = _guidance_form(step)
    model = Model(name, type(pipe).__name__, transformers, shape)
    sampler = Sampler(type(pipe.scheduler).__name__, config_of(pipe.scheduler), step.timesteps, form, guidance_scale)
    return model, sampler, step


def _guidance_form(step: Step) -> str:
    """Returns how a step calls the network: "halves" (both branches in one batch), "passes" or "none"."""
    if len(step.calls) > 1:
        return "passes"
    return "halves" if is_halved(hidden_states(*step.calls[0][1:])) else "none"


def is_halved(hidden: torch.Tensor) -> bool:
    """Whether a network input holds the same latents twice, as it does where both guidance branches share a batch."""
    half = hidden.shape[0] // 2
    return hidden.shape[0] == 2 * half and half > 0 and torch.equal(hidden[:half], hidden[half:])


def config_of(scheduler: Any) -> dict[str, Any]:
    """Returns the scheduler's configuration, without diffusers' private keys; inf as text, for JSON has none."""
    return {k: str(v) if v in (math.inf, -math.inf) else v for k, v in sorted(scheduler.config.items()) if k[0] != "_"}


def find_modules(transformer: nn.Module) -> dict[str, tuple[str, int, str, str, nn.Module]]:
    """Returns {path: (stack, layer, module, kind, module)} of every candidate site, by structure alone."""
    found = {}
    for stack, child in transformer.named_children():
        if not isinstance(child, nn.ModuleList):
            continue
        per_block = [list(_candidates(block)) for block in child]
        if not any(kind == "attn" for block in per_block for _, kind, _ in block):
            continue
        for layer, block in enumerate(per_block):
            if not any(kind == "mlp" for _, kind, _ in block):
                out = getattr(child[layer], "proj_out", None)
                if isinstance(out, nn.Linear):  # a parallel block: attention and MLP meet in one projection
                    block.append(("proj_out", "fused", out))
            for path, kind, module in block:
                found[f"{stack}.{layer}.{path}"] = (stack, layer, path, kind, module)
    return found


def _candidates(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    for name, module in block.named_children():
        kind = _kind(name, module)
        if kind:
            yield prefix + name, kind, module
        else:
            yield from _candidates(module, f"{prefix}{name}.")


def _kind(name: str, module: nn.Module) -> str | None:
    cls = type(module).__name__
    weighs = any(isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d) for m in module.modules())
    if isinstance(module, ATTENTION) or (ATTENTION_CLASS.search(cls) and not NO_ATTENTION_CLASS.search(cls) and weighs):
        return "attn"
    if isinstance(module, FeedForward):
        return "mlp"
    if MLP_NAME.match(name) and not isinstance(module, nn.Linear) and "Norm" not in cls and weighs:
        return "mlp"
    return None


def find_sites(pipe: Any, name: str, step: Step) -> Transformer:
    """Returns the sites of the pipeline's transformer `name`, as its first call of the recorded step runs them."""
    module = pipe.components[name]
    found = find_modules(module)
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no stack of blocks with attention, so there is nothing to schedule."
        )
    sites: dict[str, Site] = {}
    calls: dict[str, int] = {}
    args, kwargs = next((a, k) for n, a, k in step.calls if n == name)
    latents = hidden_states(args, kwargs) if args or "hidden_states" in kwargs else None
    if not torch.is_tensor(latents):
        raise UnsupportedModelError(
            f"{type(module).__name__} takes its latents as {type(latents).__name__}; this release drives transformers "
            "that are called with hidden_states, one tensor."
        )
    batch = latents.shape[0]

    def tap(path: str) -> Callable[..., Any]:
        stack, layer, part, kind, _ = found[path]

        def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = forward(*args, **kwargs)
            index = calls[path] = calls.get(path, -1) + 1
            first = out[0] if isinstance(out, tuple) else out
            if first.ndim != 3 or first.shape[0] % batch:
                raise UnsupportedModelError(
                    f"{name}.{path} returns a tensor of shape {tuple(first.shape)}; this release schedules modules "
                    f"that return [B, N, D], B a multiple of {batch}."
                )
            site = Site(
                stack, layer, part, _refine(kind, out, args, kwargs), first.shape[1], first.shape[2],
                _is_prunable(kind, forward, args, kwargs, out), index,
            )  # fmt: skip
            sites[site.key] = site
            return out

        return run

    with ExitStack() as stack:
        for path, (*_, part) in found.items():
            stack.enter_context(tapped(part, tap(path), "sodaprof.inspect"))
        module(*args, **kwargs)
    return Transformer(type(module).__name__, fingerprint(module, sites.values()), tuple(sites.values()))


def fingerprint(module: Any, sites: Any) -> dict[str, Any]:
    """Returns the readable fingerprint: what of the config decides shapes, tokens and kind of each module of a block."""
    config = dict(module.config)
    values = {key: next((config[n] for n in names if n in config), None) for key, names in CONFIG_KEYS.items()}
    if values["heads"] and values["head_width"]:
        values["width"] = values["heads"] * values["head_width"]
    plain = {k: list(v) if isinstance(v, list | tuple) else v for k, v in values.items() if v is not None}
    sites = tuple(sites)
    tokens: dict[str, int] = {}
    for site in sites:  # by module, and by site where a layer or a call has another number
        if tokens.setdefault(f"{site.stack}.{site.module}", site.tokens) != site.tokens:
            tokens[site.key] = site.tokens
    return plain | {"tokens": tokens, "kinds": {f"{s.stack}.{s.module}": s.kind for s in sites}}


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def with_rows(
    attends: bool, args: tuple[Any, ...], kwargs: dict[str, Any], index: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the module's arguments for the tokens `index` [B, k] alone; attention keeps all keys and values."""
    own_keys = attends and other_states(args, kwargs) is None
    x = hidden_states(args, kwargs)
    rows = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    args, kwargs = ((rows, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "hidden_states": rows})
    if own_keys:
        kwargs["encoder_hidden_states"] = x
    return args, kwargs


def other_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Returns the states that an attention takes its keys and values from, None where they are its own."""
    other = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return other if torch.is_tensor(other) and other is not hidden_states(args, kwargs) else None


def _refine(kind: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if kind != "attn":
        return kind
    if isinstance(out, tuple):
        return "joint_attn"
    return "attn" if other_states(args, kwargs) is None else "cross_attn"


def _is_prunable(
    kind: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> bool:
    """Whether half of the tokens in give the same rows of the full output: tried, not assumed (on meta: their shape)."""
    x = hidden_states(args, kwargs) if args or "hidden_states" in kwargs else None
    if not torch.is_tensor(out) or x is None or x.ndim != 3 or x.shape[1] != out.shape[1] or x.shape[1] < 2:
        return False
    index = torch.arange(1, x.shape[1], 2, device=x.device).expand(x.shape[0], -1)
    try:
        some_args, some_kwargs = with_rows(kind == "attn", args, kwargs, index)
        rows = forward(*some_args, **some_kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # the module cannot take fewer tokens; its site is reused, never pruned
    wanted = out.gather(1, index[..., None].expand(-1, -1, out.shape[2]))
    if out.is_meta:
        return rows.shape == wanted.shape
    tolerance = 1e-4 if out.dtype == torch.float32 else 3e-2
    return rows.shape == wanted.shape and bool(torch.allclose(rows, wanted, rtol=tolerance, atol=tolerance))
