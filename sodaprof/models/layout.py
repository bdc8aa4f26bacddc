"""How a module's output holds tokens and channels: [B, N, D] nearly always; the other layouts, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # name -> [B, N, D] of it; "" is [B, N, D] itself
    "": lambda x: x,
    "channels_last": lambda x: x.flatten(1, -2),  # [B, F, H, W, D]
    "channels_first": lambda x: x.flatten(2).transpose(1, 2),  # [B, D, H, W]
    "heads": lambda x: x.flatten(2),  # [B, N, heads, D / heads]
    "tokens_first": lambda x: x.transpose(0, 1),  # [N, B, D]
}


def as_tokens(out: torch.Tensor, layout: str) -> torch.Tensor:
    """Returns the output as [B, N, D], a view where it can be one."""
    return LAYOUTS[layout](out)


def main_part(out: Any) -> Any:
    """Returns the tensor that a site is measured by: the output, or the first of the tuple that it is."""
    return out[0] if isinstance(out, tuple) else out


def layout_of(
    shape: tuple[int, ...], batch: int, widths: Collection[int], attended: Collection[tuple[int, ...]]
) -> str | None:
    """Returns the name of the layout of an output of this shape, None where it cannot be told.

    batch: of the latents; B of a module may be a multiple of it. widths: channels of the outputs [B, N, D] of the same
    blocks, which tell channels from tokens. attended: (B, N) of the attention in the block of an MLP, to tell [N, B, D].
    """
    if len(shape) == 3:
        if shape[1] == batch > 1 and (shape[0] % batch or (shape[1], shape[0]) in attended):
            return "tokens_first"
        return "" if shape[0] % batch == 0 else None
    if len(shape) < 4 or shape[0] % batch:
        return None
    fits = {
        "channels_last": shape[-1] in widths,
        "channels_first": shape[1] in widths,
        "heads": len(shape) == 4 and shape[2] * shape[3] in widths,
    }
    found = [name for name, holds in fits.items() if holds]
    return found[0] if len(found) == 1 else None
