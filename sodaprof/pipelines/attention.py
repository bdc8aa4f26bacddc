"""Records the attention that a module computes, whatever its processor: the arguments of the attention function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..opensora.layers import attend
from .probe import Args, Forward, Kwargs

FUNCTIONS = (torch.nn.functional.scaled_dot_product_attention, attend)


class AttentionCall(NamedTuple):
    """One attention: q [B, H, N, d], k and v [B, H, M, d], the mask (boolean or added) and the scale, if any."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []

    def __torch_function__(self, func: Forward, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            q, k, v = named["query"], named["key"], named["value"]
            self.calls.append(AttentionCall(q, k, v, named.get("attn_mask"), named.get("scale")))
        return func(*args, **kwargs)


def record_attention(forward: Forward, args: Args, kwargs: Kwargs) -> tuple[Any, list[AttentionCall]]:
    """Returns forward(*args, **kwargs), unchanged, and every attention that it computed."""
    with _Recorder() as recorder:
        out = forward(*args, **kwargs)
    return out, recorder.calls
