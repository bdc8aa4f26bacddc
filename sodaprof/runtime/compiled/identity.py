"""What a traced program or a graph is bound to: signatures of arguments, the structure of a call, the build of a module."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ...errors import UnsupportedModelError
from ..hooks.cells import CellInputs
from ..hooks.registry import Forward

PLAIN = (bool, int, float, str, type(None))
LEAVES = {*PLAIN, torch.Tensor, nn.Parameter}
CONTAINERS = {tuple, list, dict, CellInputs}
MODULES_OWN = {*vars(nn.Module()), "_diffusers_hook"} - {"training"}  # attributes that say nothing about the build

Stored = list[tuple[str, dict[str, Any], str]]  # (path, dictionary, name) of tensors: dictionary[name] is the tensor


def signature_of(leaf: Any) -> Any:
    """Returns the signature of an argument: a plain value itself; shape, dtype, device and strides of a tensor."""
    if torch.is_tensor(leaf):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    if not isinstance(leaf, Hashable):
        raise UnsupportedModelError(
            f'A block is called with a {type(leaf).__name__}. Run the schedule with runtime="hooks".'
        )
    return leaf


def tensor_places(leaves: Sequence[Any]) -> list[int]:
    """Returns the numbers of the leaves that are tensors."""
    return [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]


def with_tensors(leaves: Sequence[Any], places: Sequence[int], tensors: Sequence[Any]) -> list[Any]:
    """Returns the leaves with other tensors in these places."""
    filled = list(leaves)
    for place, tensor in zip(places, tensors, strict=True):
        filled[place] = tensor
    return filled


def stored_tensors(modules: Iterable[tuple[str, nn.Module]]) -> Stored:
    """Returns where all parameters and buffers of (path, module) pairs are stored; `tensors_now` reads them there."""
    return [
        (f"{prefix}.{name}" if prefix else name, found, name)
        for prefix, module in modules
        for found in (module._parameters, module._buffers)
        for name, value in found.items()
        if value is not None
    ]


def refuse_subclasses(path: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises UnsupportedModelError if a weight is of a class that replaces operators: a program would not have these.

    A layer with a forward of its own may have a weight that only replaces functions, of which that forward knows.
    """
    for inner, module in modules:
        for name, weight in module._parameters.items():
            own = {method for cls in type(weight).__mro__ if cls not in nn.Parameter.__mro__ for method in vars(cls)}
            replaces = "__torch_function__" in own and type(module).__module__.startswith("torch.nn.")
            if replaces or "__torch_dispatch__" in own:
                raise UnsupportedModelError(
                    f"{path}.{inner} has a {name} of class {type(weight).__name__}, whose operators are its own and cannot be "
                    'traced (quantised, say). Run the schedule with runtime="hooks".'
                )


def tensors_now(stored: Stored) -> list[torch.Tensor]:
    """Returns the parameters and buffers as they are now."""
    return [found[name] for _, found, name in stored]


def leaves_of(tree: Any, into: list[Any]) -> list[Any]:
    """Returns the leaves of a call in the order of `tree_flatten`, added to `into`; faster than `tree_flatten`."""
    for value in tree.values() if type(tree) is dict else tree:
        kind = type(value)
        if kind in LEAVES:
            into.append(value)
        elif kind in CONTAINERS:
            leaves_of(value, into)
        else:
            into += tree_flatten(value)[0]
    return into


def form_of(tree: Any) -> Any:
    """Returns the structure of a call, to compare with another's; faster than that of `tree_flatten`."""
    parts = [
        form_of(v) if (kind := type(v)) in CONTAINERS else None if kind in LEAVES else tree_flatten(v)[1]
        for v in (tree.values() if type(tree) is dict else tree)
    ]
    return type(tree), tuple(tree) if type(tree) is dict else None, *parts


def build_of(modules: Iterable[tuple[str, nn.Module]]) -> tuple[Any, ...]:
    """Returns how (path, module) pairs are built: classes and settings.

    It holds whatever a trace would make a constant (an adapter's scale, a processor's), so that a change is noticed.
    """
    return tuple((path, type(module), *_settings_of(vars(module), 0)) for path, module in modules)


def _settings_of(attributes: dict[str, Any], depth: int) -> list[Any]:
    return [
        (name, value if type(value) in PLAIN else setting_of(value, depth + 1))
        for name, value in attributes.items()
        if name not in MODULES_OWN
    ]


def setting_of(value: Any, depth: int = 0) -> Any:
    """Returns what a trace would make a constant from an attribute of a module, to compare with a later one."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Forward):  # ours: the module's own counts
        return setting_of(value.original, depth)
    if isinstance(value, tuple | list):
        return tuple(setting_of(v, depth + 1) for v in value)
    if isinstance(value, set | frozenset):
        return frozenset(setting_of(v, depth + 1) for v in value)
    if isinstance(value, dict):
        return tuple(_settings_of(value, depth))
    if isinstance(value, torch.Tensor):  # a constant of the trace, which keeps it alive
        return id(value), value._version
    if isinstance(value, FunctionType | BuiltinFunctionType | type | torch.dtype | torch.device):
        return value
    if not isinstance(value, nn.Module) and hasattr(value, "__dict__") and depth < 3:
        return type(value), *_settings_of(vars(value), depth + 1)
    return type(value)


def same(a: Any, b: Any) -> bool:
    """Returns whether two values are equal, tensors in all their elements."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    return a is b or (not torch.is_tensor(a) and not torch.is_tensor(b) and bool(a == b))
