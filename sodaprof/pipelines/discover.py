"""Finds the sites of a pipeline: by structure, and by recording one sampling step. No list of models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from msgspec.structs import replace
from torch import nn

from ..errors import UnsupportedModelError
from ..formats.sites import Guidance, GuidanceForm, Model, Sampler, Site, SiteKey, Transformer
from .entries import any_entries
from .load import OwnCall, transformers_of
from .probe import Args, Forward, Kwargs, as_tokens, is_prunable, kind_of, layout_of, main_part, with_shorter_text
from .recording import Step, all_tapped, is_halved, latents_of, record_step, refuse_compiled
from .structure import Modules, find_modules

T = TypeVar("T")
CONFIG_KEYS = {  # key of the fingerprint -> keys of a config; the first one found counts
    "layers": ("num_layers", "depth"),
    "heads": ("num_attention_heads", "num_heads"),
    "head_width": ("attention_head_dim",),
    "patch": ("patch_size",),
    "channels": ("in_channels",),
}


def inspect_pipeline(
    pipe: Any,
    name: str,
    steps: int,
    guidance_scale: float | None = None,
    entry: int | str | None = None,
    own: OwnCall | None = None,
) -> tuple[Model, Sampler, Step]:
    """Returns the model's sites, the sampler, and the recorded step they come from (batch 1, no gradient).

    Raises UnsupportedModelError for a model without attention blocks, or with outputs of an unknown layout.
    """
    if entry is None:
        entry = any_entries(pipe)[0] if own is None else 0
    for part, network in transformers_of(pipe).items():
        refuse_compiled(part, network)
    with torch.no_grad():
        step = record_step(pipe, [entry], steps, guidance_scale, own)
        names = dict.fromkeys(name for name, *_ in step.calls)
        transformers = {n: replace(find_sites(pipe, n, step), called=step.called.get(n, ())) for n in names}
    first = next(iter(transformers))
    parameter = next(pipe.components[first].parameters())
    shape = {
        "latent": list(step.latents[1:]),
        "tokens": max(s.tokens for s in transformers[first].sites),
        "batch_profiled": 1,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
    guidance = Guidance(guidance_form(pipe, step), guidance_scale)
    sampler = Sampler(type(pipe.scheduler).__name__, config_of(pipe.scheduler), step.timesteps, guidance)
    return Model(name, type(pipe).__name__, transformers, shape), sampler, step


def guidance_form(pipe: Any, step: Step) -> GuidanceForm:
    """Returns how a step calls the network: "halves" (both branches in one batch), "passes" or "none".

    Raises UnsupportedModelError if networks that take turns are called in different forms.
    """
    forms: dict[str, GuidanceForm] = {}
    for name, args, kwargs in step.calls:
        halved = is_halved(latents_of(pipe.components[name], args, kwargs))
        forms[name] = "passes" if name in forms else "halves" if halved else "none"
    if step.called and len(set(forms.values())) > 1:
        found = ", ".join(f"{name} with {form}" for name, form in forms.items())
        raise UnsupportedModelError(
            f"The pipeline's transformers take turns and are guided differently ({found}); this release needs one guidance "
            "form. Call the pipeline with guidance on, or off, for all of them."
        )
    return next(iter(forms.values()))


def config_of(scheduler: Any) -> dict[str, Any]:
    """Returns the scheduler's configuration, without diffusers' private keys; inf as text, which JSON lacks."""
    return {k: str(v) if v in (math.inf, -math.inf) else v for k, v in sorted(scheduler.config.items()) if k[0] != "_"}


class _SiteCall(NamedTuple):
    """One recorded call of a candidate site."""

    key: SiteKey
    kind: str
    shape: tuple[int, ...]  # of its output, or of the first tensor in it
    prunable: bool

    @property
    def name(self) -> str:
        """Which site of a block it is, whatever the layer."""
        return f"{self.key.stack}.{self.key.name}"


def find_sites(pipe: Any, name: str, step: Step) -> Transformer:
    """Returns the sites of the pipeline's transformer `name`, as its first call of the recorded step runs them."""
    module = pipe.components[name]
    found = find_modules(module)
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no stack of blocks with attention, so there is nothing to schedule. "
            "Give a pipeline with a diffusion transformer."
        )
    args, kwargs = step.call_of(name)
    latents = latents_of(module, args, kwargs)
    calls: Counter[str] = Counter()

    def site_call(path: str, forward: Forward, args: Args, kwargs: Kwargs, out: Any) -> _SiteCall:
        stack, layer, part, kind, _ = found[path]
        key, call = SiteKey(stack, layer, part, calls[path]), (kind, forward, args, kwargs, out)
        calls[path] += 1
        return _SiteCall(key, kind_of(*call), tuple(main_part(out).shape), is_prunable(*call))

    site_calls = _each_call(module, found, site_call, args, kwargs)
    _check_calls_alike(name, module, found, step, [s.key.path for s in site_calls])
    batch = len(latents)  # both guidance halves counted
    text = _holding_text(module, found, (args, kwargs), site_calls)
    sites, layouts = _sites_of(name, site_calls, batch, text)
    for site, (_, _, shape, _) in zip(sites, site_calls, strict=True):
        step.folds[name, site.key] = max(1, math.prod(shape) // (site.tokens * site.width * batch))
    return Transformer(type(module).__name__, fingerprint(module, sites, layouts, list(text)), sites)


def _check_calls_alike(name: str, module: nn.Module, found: Modules, step: Step, paths: list[str]) -> None:
    """Raises UnsupportedModelError if a later call of the network in the step runs other sites, or another batch, than the first.

    As skip-layer guidance does: a site that a branch skips has no output there to reuse.
    """
    calls = [(latents_of(module, args, kwargs), args, kwargs) for n, args, kwargs in step.calls if n == name]
    (first, *_), *others = calls
    for number, (latents, args, kwargs) in enumerate(others, 2):
        differs = f"a batch of {len(latents)} instead of {len(first)}" if len(latents) != len(first) else ""
        if not differs and _each_call(module, found, lambda path, *_: path, args, kwargs) != paths:
            differs = "other layers"
        if differs:
            raise UnsupportedModelError(
                f"Call {number} of {name} in a step runs {differs} than call 1 (skip-layer guidance, say); this release "
                "schedules guidance whose calls of the network in a step are alike. Call the pipeline without that guidance."
            )


def _each_call(
    module: nn.Module, found: Modules, read: Callable[[str, Forward, Args, Kwargs, Any], T], args: Args, kwargs: Kwargs
) -> list[T]:
    """Calls the network and returns read(path, forward, args, kwargs, out) of each call of a candidate site, in order."""
    values = []

    def run(path: str, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        out = forward(*args, **kwargs)
        values.append(read(path, forward, args, kwargs, out))
        return out

    with all_tapped(module, found, run, "sodaprof.inspect"):
        module(*args, **kwargs)
    return values


def _holding_text(
    module: nn.Module, found: Modules, step: tuple[Args, Kwargs], site_calls: list[_SiteCall]
) -> dict[str, bool]:
    """Returns the modules, by stack, module and call, whose outputs are smaller with less text; True: all text."""
    text: dict[str, bool] = {}
    for length, args, kwargs in with_shorter_text(*step, latents_of(module, *step)):
        try:
            shapes = _each_call(
                module, found, lambda path, *call: (path, tuple(main_part(call[-1]).shape)), args, kwargs
            )
        except Exception:  # each network has an error of its own for text of a length that it refuses
            continue
        for s, (path, shape) in zip(site_calls, shapes, strict=False):
            if path == s.key.path and shape != s.shape:
                own = tuple(length // 2 if n == length else n for n in s.shape) == shape
                text[s.name] = text.get(s.name, True) and own
    return text


def _sites_of(
    name: str, site_calls: list[_SiteCall], batch: int, text: dict[str, bool]
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Returns the sites, and the layouts of those modules that do not return [B, N, D], by stack and module.

    A site whose tokens are all text is not pruned, so that a schedule holds for prompts of any length.
    """
    sites, layouts = [], {}
    for s in site_calls:
        plain = [o for o in site_calls if o.key.stack == s.key.stack and len(o.shape) == 3]
        attention = (
            [o for o in plain if o.key.block == s.key.block and o.kind.endswith("attn")] if s.kind == "mlp" else []
        )
        layout = layout_of(s.shape, batch, {o.shape[2] for o in plain}, {o.shape[:2] for o in attention})
        if layout is None:
            raise UnsupportedModelError(
                f"{name}.{s.key.path} returns a tensor of shape {s.shape}; this release schedules modules that return "
                f"[B, N, D], B a multiple of {batch}, or a layout with one axis that can be the channels."
            )
        stack, layer, module, call = s.key
        if layout:
            layouts[f"{stack}.{module}"] = layout
        prunable = s.prunable and not layout and not text.get(s.name, False)
        _, tokens, width = as_tokens(torch.empty(s.shape, device="meta"), layout).shape
        sites.append(Site(stack, layer, module, s.kind, tokens, width, prunable, call))
    return tuple(sites), layouts


def fingerprint(
    module: Any, sites: Sequence[Site], layouts: dict[str, str] | None = None, text: list[str] | None = None
) -> dict[str, Any]:
    """Returns the fingerprint: the config values that decide shapes, and what was recorded of each module of a block.

    That is tokens and kinds; layouts other than [B, N, D]; text: the modules with one token for each token of the prompt.
    """
    config = dict(module.config)
    found = {key: next((config[n] for n in names if n in config), None) for key, names in CONFIG_KEYS.items()}
    if found["heads"] and found["head_width"]:
        found["width"] = found["heads"] * found["head_width"]
    found = {key: list(v) if isinstance(v, list | tuple) else v for key, v in found.items() if v is not None}
    tokens: dict[str, int] = {}
    for site in sites:  # by module, and by site if a layer or a call has another number
        if tokens.setdefault(f"{site.stack}.{site.module}", site.tokens) != site.tokens:
            tokens[site.key] = site.tokens
    found |= {"tokens": tokens, "kinds": {f"{s.stack}.{s.module}": s.kind for s in sites}}
    return found | {key: value for key, value in (("layouts", layouts), ("text", text)) if value}
