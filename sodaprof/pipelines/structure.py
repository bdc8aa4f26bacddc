"""Finds the candidate sites of a transformer by structure alone: attention and feed-forward modules. No list of models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import nn

ATTENTION = (Attention, MochiAttention, AttentionModuleMixin)
ATTENTION_CLASS = re.compile(r"attn|attention", re.I)
NO_ATTENTION_CLASS = re.compile(r"norm|processor|block|layer$", re.I)
MLP_NAME = re.compile(r"^(\w+_)?(ff|ffn|feed_?forward|mlp|moe)(_\w+)?\d*$")


class Candidate(NamedTuple):
    """A module that may be a site."""

    stack: str
    layer: int
    name: str  # path within the block
    kind: str  # attn, mlp or fused
    module: nn.Module


Modules = dict[str, Candidate]  # by path in the transformer


def find_modules(transformer: nn.Module) -> Modules:
    """Returns the candidate sites of all stacks of blocks that contain attention."""
    found = {}
    for stack, child in transformer.named_children():
        if not isinstance(child, nn.ModuleList):
            continue
        per_block = [list(_candidates(block)) for block in child]
        if not any(kind == "attn" for block in per_block for _, kind, _ in block):
            continue
        for layer, block in enumerate(per_block):
            if not any(kind == "mlp" for _, kind, _ in block):
                block += _inline(child[layer])
            for path, kind, module in block:
                found[f"{stack}.{layer}.{path}"] = Candidate(stack, layer, path, kind, module)
    return found


def base_of(module: nn.Module) -> nn.Module:
    """Returns the module inside the adapters that wrap it (peft's LoRA, DoRA, LoHa …), or itself."""
    while isinstance(
        inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None), nn.Module
    ):
        module = inner
    return module


def is_linear(module: nn.Module) -> bool:
    """Whether a module, which no adapter wraps, maps features to features: nn.Linear, or a quantised one by its structure."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes)


def _candidates(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    for name, module in block.named_children():
        kind = _kind(name, module)
        if kind:
            yield prefix + name, kind, module
        else:
            yield from _candidates(module, f"{prefix}{name}.")


def _inline(block: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """Returns the last projection of an MLP whose layers are direct children of the block, if there is exactly one.

    It narrows. "fused": its input is the attention's output next to the MLP's; otherwise it is the MLP's alone.
    """
    bases = {name: base_of(part) for name, part in block.named_children()}
    linear: dict[str, Any] = {name: base for name, base in bases.items() if is_linear(base)}
    ends = {name: part for name, part in linear.items() if part.in_features > part.out_features}
    if len(ends) != 1:
        return []
    ((name, end),) = ends.items()
    inner = {part.out_features for part in linear.values() if part is not end}
    alone = end.in_features in inner or 2 * end.in_features in inner  # as wide as what widens, or half: a gated one
    return [(name, "mlp" if alone else "fused", block.get_submodule(name))]


def _kind(name: str, module: nn.Module) -> str | None:
    module = base_of(module)
    cls = type(module).__name__
    weighted = any(is_linear(m) or isinstance(m, nn.Conv1d | nn.Conv2d) for m in module.modules())
    attends = ATTENTION_CLASS.search(cls) and not NO_ATTENTION_CLASS.search(cls) and weighted
    if isinstance(module, ATTENTION) or attends:
        return "attn"
    if isinstance(module, FeedForward):
        return "mlp"
    if MLP_NAME.match(name) and not is_linear(module) and "Norm" not in cls and weighted:
        return "mlp"
    return None
