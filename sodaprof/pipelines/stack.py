"""What the blocks of a transformer hand from one to the next, read off its recorded call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.sites import Transformer
from .recording import Step, tapped


@dataclass(frozen=True)
class Stack:
    """The blocks of a transformer, which hand on one tensor: first and last in execution order, and its elements."""

    first: str  # path of the module
    last: str
    size: int  # elements of the recorded call's, all branches in it


def stack_of(pipe: Any, name: str, transformer: Transformer, step: Step) -> Stack | None:
    """Returns the transformer's stack, None where a block returns something else, or the last not what the first is given."""
    blocks = list(dict.fromkeys(f"{site.stack}.{site.layer}" for site in transformer.sites))
    entries: list[Any] = []
    outs: list[Any] = []

    def see(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entries.append(handed(args, kwargs))
        outs.append(forward(*args, **kwargs))
        return outs[-1]

    args, kwargs = next((a, k) for called, a, k in step.calls if called == name)
    module = pipe.components[name]
    with ExitStack() as taps, torch.no_grad():
        for block in blocks:
            taps.enter_context(tapped(module.get_submodule(block), see, "sodaprof.stack"))
        module(*args, **kwargs)
    if len(outs) != len(blocks) or not all(map(torch.is_tensor, [entries[0], *outs])):
        return None
    return Stack(blocks[0], blocks[-1], outs[-1].numel()) if entries[0].shape == outs[-1].shape else None


def handed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns what a block is given to work on, None where it cannot be told."""
    return args[0] if args else kwargs.get("hidden_states")
