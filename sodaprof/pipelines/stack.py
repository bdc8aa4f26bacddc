"""What the blocks of a transformer pass from one to the next, read off its recorded call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.sites import Transformer
from .recording import Step, all_tapped

Calls = dict[str, list[Any]]  # block -> a value a call


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
    with block_calls(module, blocks) as (inputs, outputs), torch.no_grad():
        module(*args, **kwargs)
    passed = [*inputs[blocks[0]], *(out for block in blocks for out in outputs[block])]
    if len(passed) != 1 + len(blocks) or not all(map(torch.is_tensor, passed)):
        return None
    return Stack(blocks[0], blocks[-1], passed[-1].numel()) if passed[0].shape == passed[-1].shape else None


@contextmanager
def block_calls(module: torch.nn.Module, blocks: Iterable[str]) -> Iterator[tuple[Calls, Calls]]:
    """Yields {block: inputs} and {block: outputs} of the blocks' calls while the block runs."""
    inputs: Calls = {block: [] for block in blocks}
    outputs: Calls = {block: [] for block in inputs}

    def note(block: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs[block].append(block_input(args, kwargs))
        outputs[block].append(forward(*args, **kwargs))
        return outputs[block][-1]

    with all_tapped(module, inputs, note, "sodaprof.stack"):
        yield inputs, outputs


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the hidden states that a block is called with; None if they have another name."""
    return args[0] if args else kwargs.get("hidden_states")
