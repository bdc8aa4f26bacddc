"""What a module does with its tokens, tried on one recorded call: its kind, its output's layout, whether it can be pruned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Forward = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # name -> its view as [B, N, D]
    "": lambda x: x,
    "channels_last": lambda x: x.flatten(1, -2),  # [B, F, H, W, D]
    "channels_first": lambda x: x.flatten(2).transpose(1, 2),  # [B, D, H, W]
    "heads": lambda x: x.flatten(2),  # [B, N, heads, D / heads]
    "tokens_first": lambda x: x.transpose(0, 1),  # [N, B, D]
}


def hidden_states(args: Args, kwargs: Kwargs) -> Any:
    """Returns what a module is called with: its first argument, or the one of this name; None if there is none."""
    return args[0] if args else kwargs.get("hidden_states")


def other_states(args: Args, kwargs: Kwargs) -> Tensor | None:
    """Returns the states that an attention takes its keys and values from, None if they are its own."""
    other = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return other if torch.is_tensor(other) and other is not hidden_states(args, kwargs) else None


def main_part(out: Any) -> Any:
    """Returns the tensor that a site is measured by: its output, or the first one of a tuple."""
    return out[0] if isinstance(out, tuple) else out


def as_tokens(out: Tensor, layout: str) -> Tensor:
    """Returns the output as [B, N, D], a view if possible."""
    return LAYOUTS[layout](out)


def layout_of(
    shape: tuple[int, ...], batch: int, widths: Collection[int], attended: Collection[tuple[int, ...]]
) -> str | None:
    """Returns the name of the layout of an output of this shape, None if it is ambiguous.

    batch: of the latents; B of a module may be a multiple of it. widths: channels of the outputs [B, N, D] of the same
    blocks, by which channels are recognised. attended: (B, N) of the attention in the block of an MLP, for [N, B, D].
    """
    if len(shape) == 3:
        if shape[1] == batch > 1 and (shape[0] % batch or (shape[1], shape[0]) in attended):
            return "tokens_first"
        return "" if shape[0] % batch == 0 else None
    if len(shape) < 4 or shape[0] % batch:
        return None
    possible = {
        "channels_last": shape[-1] in widths,
        "channels_first": shape[1] in widths,
        "heads": len(shape) == 4 and shape[2] * shape[3] in widths,
    }
    found = [name for name, holds in possible.items() if holds]
    return found[0] if len(found) == 1 else None


def with_states(args: Args, kwargs: Kwargs, states: Tensor) -> tuple[Args, Kwargs]:
    """Returns the module's arguments with other hidden states."""
    return ((states, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "hidden_states": states})


def with_rows(attends: bool, args: Args, kwargs: Kwargs, index: Tensor) -> tuple[Args, Kwargs]:
    """Returns the module's arguments for the tokens `index` [B, k] alone; attention keeps all keys and values."""
    own_keys = attends and other_states(args, kwargs) is None
    x = hidden_states(args, kwargs)
    args, kwargs = with_states(args, kwargs, x.gather(1, index[..., None].expand(-1, -1, x.shape[2])))
    if own_keys:
        kwargs["encoder_hidden_states"] = x
    return args, kwargs


def kind_of(kind: str, forward: Forward, args: Args, kwargs: Kwargs, out: Any) -> str:
    """Returns the kind of a site: for attention, whether tokens attend to each other, to other states, or to both."""
    if kind != "attn":
        return kind
    if isinstance(out, tuple):
        return "joint_attn"
    others = other_states(args, kwargs) is not None
    mixes = _mixes(forward, args, kwargs, out)
    if mixes is None:  # cannot be tried: the arguments decide
        return "cross_attn" if others else "attn"
    return "cross_attn" if not mixes else "joint_attn" if others else "attn"


def _mixes(forward: Forward, args: Args, kwargs: Kwargs, out: Any) -> bool | None:
    """Whether the even tokens' output depends on the odd tokens, tried by negating these; None: cannot be tried."""
    x = _tokens_in(args, kwargs, out)
    if x is None or x.is_meta:
        return None
    negated = x.clone()
    negated[:, 1::2] *= -1
    some_args, some_kwargs = with_states(args, kwargs, negated)
    states = {name: negated if value is x else value for name, value in some_kwargs.items()}  # its own keys, by name
    again = forward(*(negated if value is x else value for value in some_args), **states)
    kept, size = out[:, ::2].float(), float(out[:, ::2].float().norm())
    return float((again[:, ::2].float() - kept).norm()) > 0.02 * size if size else None


def is_prunable(kind: str, forward: Forward, args: Args, kwargs: Kwargs, out: Any) -> bool:
    """Whether half of the tokens in give the same rows of the full output: tried, not assumed (on meta: their shape)."""
    x = _tokens_in(args, kwargs, out)
    if x is None:
        return False
    index = torch.arange(1, x.shape[1], 2, device=x.device).expand(x.shape[0], -1)
    try:
        some_args, some_kwargs = with_rows(kind == "attn", args, kwargs, index)
        rows = forward(*some_args, **some_kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # the module cannot take fewer tokens; its site is reused, never pruned
    wanted = out.gather(1, index[..., None].expand(-1, -1, out.shape[2]))
    tolerance = 1e-4 if out.dtype == torch.float32 else 3e-2
    return rows.shape == wanted.shape and (out.is_meta or torch.allclose(rows, wanted, tolerance, tolerance))


def _tokens_in(args: Args, kwargs: Kwargs, out: Any) -> Tensor | None:
    """Returns the module's hidden states [B, N, D'], None unless they and the output have the same N of at least 2."""
    x = hidden_states(args, kwargs)
    if not torch.is_tensor(out) or not torch.is_tensor(x) or out.ndim != 3 or x.ndim != 3:
        return None
    return x if x.shape[:2] == out.shape[:2] and x.shape[1] > 1 else None


def with_shorter_text(args: Args, kwargs: Kwargs, latents: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yields (L, args, kwargs): the arguments of a network with L // 2 of the L tokens of a text [B, L, D] in them.

    Whatever else has the same length is cut, too: masks and positions. The network may refuse that.
    """
    of_latents = {id(leaf) for leaf in tree_leaves(latents)}
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf) and id(leaf) not in of_latents]
    texts = [leaf for leaf in leaves if leaf.ndim == 3 and leaf.is_floating_point()]
    for length in dict.fromkeys(leaf.shape[1] for leaf in texts):
        if length < 2 or length == len(latents):
            continue

        def cut(leaf: Any, length: int = length) -> Any:
            if not torch.is_tensor(leaf) or id(leaf) in of_latents:
                return leaf
            if leaf.ndim == 3 and leaf.is_floating_point():
                return leaf[:, : length // 2] if leaf.shape[1] == length else leaf
            for axis, size in enumerate(leaf.shape):
                leaf = leaf.narrow(axis, 0, length // 2) if size == length else leaf
            return leaf

        yield length, *tree_map(cut, (args, kwargs))
