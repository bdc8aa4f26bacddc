"""What the blocks of a transformer pass from one to the next, read off its recorded call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.sites import Transformer
from .recording import Step, all_tapped


@dataclass(frozen=True)
class Stack:
    """The blocks of a transformer, each of which passes one tensor to the next."""

    first: str  # path of the first block in execution order
    last: str
    size: int  # elements of that tensor in the recorded call, all branches included


def stack_of(pipe: Any, name: str, transformer: Transformer, step: Step) -> Stack | None:
    """Returns the transformer's stack; None unless each block returns one tensor, the last of the shape that enters."""
    blocks = list(dict.fromkeys(f"{site.stack}.{site.layer}" for site in transformer.sites))
    inputs: list[Any] = []
    outputs: list[Any] = []

    def note(path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs.append(block_input(args, kwargs))
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    args, kwargs = step.call_of(name)
    module = pipe.components[name]
    with all_tapped(module, blocks, note, "sodaprof.stack"), torch.no_grad():
        module(*args, **kwargs)
    if len(outputs) != len(blocks) or not all(map(torch.is_tensor, [inputs[0], *outputs])):
        return None
    return Stack(blocks[0], blocks[-1], outputs[-1].numel()) if inputs[0].shape == outputs[-1].shape else None


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the hidden states that a block is called with; None if they have another name."""
    return args[0] if args else kwargs.get("hidden_states")
