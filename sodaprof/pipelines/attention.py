"""Listens to the attention that a module computes, whatever its processor: what it hands to the attention function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..opensora.layers import attend

FUNCTIONS = (torch.nn.functional.scaled_dot_product_attention, attend)


class Heard(NamedTuple):
    """One attention: q [B, H, N, d], k and v [B, H, M, d], the mask (boolean or added) and the scale, if any."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None

    def map_flops(self) -> float:
        """FLOPs of the attention weights alone."""
        return 2.0 * self.q.numel() * self.k.shape[2]


class _Listener(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Heard] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            q, k, v = given["query"], given["key"], given["value"]
            self.heard.append(Heard(q, k, v, given.get("attn_mask"), given.get("scale")))
        return func(*args, **kwargs)


def listen(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Heard]]:
    """Returns forward(*args, **kwargs), which is as without listening, and every attention it computed."""
    with _Listener() as listener:
        out = forward(*args, **kwargs)
    return out, listener.heard
