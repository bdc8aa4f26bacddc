"""A replacement for CUDA graphs on a CPU: records operators with the tensors that they read and write, and runs them again.

Like a graph it keeps the values that Python read, and the branches that it took, while it was recorded. Unlike a capture it
computes while it records, so it restores the tensors that it wrote to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sodaprof.runtime.compiled.engine import Compiled

RUNTIMES = ("hooks", "compiled", "graphs", "whole-steps")  # "graphs": compiled, with a tape in place of CUDA graphs


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.own: dict[int, torch.Tensor] = {}  # made while recording
        self.before: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # tensors from outside that were written to, their values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = {id(leaf): leaf for leaf in tensors((args, kwargs))}
        if func._schema.is_mutable:
            self.before += [(leaf, leaf.clone()) for key, leaf in given.items() if key not in self.own]
        out = func(*args, **kwargs)
        self.own |= {id(leaf): leaf for leaf in tensors(out) if id(leaf) not in given}
        self.ops.append((func, args, kwargs, out))
        return out


class Tapes:
    """Records tapes and counts them and their replays."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.made, self.played, self.fail = 0, 0, fail

    def forget(self) -> None:
        """Does nothing: tapes share nothing."""

    def missing(self, device: torch.device) -> str | None:
        return None

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.fail is not None:
            raise self.fail
        with _Recording() as tape:
            result = run()
        for tensor, value in reversed(tape.before):
            tensor.copy_(value)
        static = [leaf.detach().clone() for leaf in tensors(result)]
        self.made += 1

        def replay() -> None:
            self.played += 1
            now: dict[int, torch.Tensor] = {}

            def current(x: Any) -> Any:
                return now.get(id(x), x) if torch.is_tensor(x) else x

            with torch.no_grad():
                for func, args, kwargs, out in tape.ops:
                    new = func(*tree_map(current, args), **tree_map(current, kwargs))
                    for old, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
                        if torch.is_tensor(old) and id(old) in tape.own:
                            now[id(old)] = fresh
                for place, leaf in zip(static, tensors(result), strict=True):
                    place.copy_(current(leaf))

        places = iter(static)
        return replay, tree_map(lambda x: next(places) if torch.is_tensor(x) else x, result)


def runtime(name: str) -> str | Compiled:
    """Returns what `apply` takes as its runtime for a name of RUNTIMES."""
    if name in ("hooks", "compiled"):
        return name
    return Compiled(graphs=Tapes(), whole_steps=name == "whole-steps")
