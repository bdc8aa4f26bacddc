"""Finds what a network's forward does that a CUDA graph cannot hold. Needs no GPU.

The network computes with its real values on the CPU, but its parameters, its inputs and all results report the meta device,
which represents CUDA. So every transfer between host and device is seen, with the line of code that makes it.
"""

from __future__ import annotations

import copy
import linecache
import re
import sys
import traceback
import warnings
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Call = tuple[tuple[Any, ...], dict[str, Any]]

DEVICE, HOST = torch.device("meta"), torch.device("cpu")
WRAPPED = ("forward", "_old_forward", "_diffusers_hook", "_hf_hook")  # what hooks put on module instances
SHAPES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
BUILDERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)


class Hazard(NamedTuple):
    """One thing that a forward does: `read`, `copy`, `random`, `frozen` or `mask`, explained in `findings.TEXTS`."""

    kind: str
    operator: str
    module: str  # path in the network, "" for its own forward
    source: str  # "diffusers.models.attention_processor:1068"
    code: str  # that line


class OnDevice(torch.Tensor):
    """A tensor that reports the device; its values are in `host`."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnDevice:
        self: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=DEVICE
        )
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} was called after the network was examined.")


def place(tree: Any) -> Any:
    """Returns the same with all tensors on the device."""
    return tree_map(lambda x: OnDevice(x.detach()) if torch.is_tensor(x) else x, tree)


def take_back(tree: Any) -> Any:
    """Returns the same with all tensors on the host."""
    return tree_map(lambda x: x.host if isinstance(x, OnDevice) else x, tree)


class Watch(TorchDispatchMode):
    """Runs every operator on the host's values, and records what it would do on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.hazards: list[Hazard] = []
        self.path = [""]  # of the modules that are running, outermost first

    def note(self, kind: str, operator: str) -> None:
        self.hazards.append(Hazard(kind, operator, self.path[-1], *_line()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        placed = [x for x in tensors if isinstance(x, OnDevice)]
        hosts = [x for x in tensors if not isinstance(x, OnDevice)]
        asked = kwargs.get("device")
        on_device = bool(placed) if asked is None else torch.device(asked).type == DEVICE.type
        if asked is not None:
            kwargs["device"] = HOST
        elif placed and func._schema.is_mutable and any(args[0] is x for x in hosts):
            on_device = False  # the device's values are written to the host
        if kind := _kind(func, args, kwargs, placed, hosts, on_device):
            self.note(kind, func.overloadpacket.__name__.removeprefix("_").replace("local_scalar_dense", "item"))
        out = func(*take_back(args), **take_back(kwargs))
        if not on_device:
            return out
        known = {id(x.host): x for x in placed}  # operators in place return what they were given
        return tree_map(lambda x: known.get(id(x), OnDevice(x)) if torch.is_tensor(x) else x, out)


def _kind(
    func: Any, args: Any, kwargs: Any, placed: list[OnDevice], hosts: list[torch.Tensor], on_device: bool
) -> str | None:
    """Returns the kind of hazard of an operator, None if it is none."""
    name = func.overloadpacket.__name__
    if not placed:
        if on_device and hosts and name == "_to_copy":
            return "copy"
    elif name in ("index", "index_put", "index_put_"):
        masks = [x for x in tree_leaves(args[1]) if torch.is_tensor(x) and x.dtype in (torch.bool, torch.uint8)]
        # one number written at a mask is a masked fill, which reads no values
        if masks and not (name.startswith("index_put") and args[2].numel() == 1):
            return "read"
    elif not on_device or (any(tag in func.tags for tag in SHAPES) and kwargs.get("output_size") is None):
        return "read"
    if on_device and torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name:
        return "random"
    if placed and on_device and hosts:
        return "copy" if any(x.ndim for x in hosts) else "frozen"
    return None


def autocast(own: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
    """Replaces `torch.autocast` by that of the host on the meta device, for which torch has none."""
    return own(HOST.type if device_type == DEVICE.type else device_type, *args, **kwargs)


class Above(TorchFunctionMode):
    """Records what the dispatcher does not see on the meta device: lists to tensors, tensors to lists, masks."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            self.watch.note("read", "tolist")
            return args[0].host.tolist()
        if func is F.scaled_dot_product_attention and isinstance(args[0] if args else kwargs["query"], OnDevice):
            if (args[3] if len(args) > 3 else kwargs.get("attn_mask")) is not None:
                self.watch.note("mask", "scaled_dot_product_attention")
            return OnDevice(func(*take_back(args), **take_back(kwargs)))
        if func in BUILDERS:
            own = func is torch.Tensor.new_tensor
            device = torch.device(kwargs.get("device") or (args[0].device if own else HOST))
            data = next(iter(args[own:]), kwargs.get("data"))
            if device.type == DEVICE.type and not torch.is_tensor(data):
                self.watch.note("copy", func.__name__)
                host = args[0].host if own and isinstance(args[0], OnDevice) else None
                return OnDevice(func(*([host] if own else []), *args[own:], **{**kwargs, "device": HOST}))
        return func(*args, **kwargs)


def _line() -> tuple[str, str]:
    """Returns the running line outside torch and this module as "module:line", and its code."""
    stack = traceback.walk_stack(sys._getframe(1))
    own = re.compile(rf"torch(\..*)?|{re.escape(__name__)}")
    frame, line = next((f, n) for f, n in stack if not own.fullmatch(str(f.f_globals.get("__name__"))))
    return f"{frame.f_globals.get('__name__')}:{line}", linecache.getline(frame.f_code.co_filename, line).strip()


def follow(network: nn.Module, calls: list[Call], blocks: list[str]) -> tuple[list[Hazard], dict[str, Call]]:
    """Returns the hazards of the calls, and what each of the blocks is first called with (on the host).

    The calls run twice, on a copy that shares the weights and has no hooks; the second run counts, since many networks
    upload tables at their first call and keep them. Raises what the network raises if it cannot run this way.
    """
    shell, watch, inputs = _shell(network), Watch(), {}
    for path, module in shell.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            watch.path.append(path)
            if path in blocks and path not in inputs:
                inputs[path] = take_back((args, kwargs))

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(lambda *_: watch.path.pop() and None, always_call=True)
    on_meta = mock.patch.object(torch, "autocast", partial(autocast, torch.autocast))
    with torch.no_grad(), warnings.catch_warnings(), on_meta, watch, Above(watch):
        warnings.simplefilter("ignore")  # the pipeline itself has given the same warnings
        for _ in range(2):
            watch.hazards.clear()
            for args, kwargs in calls:
                shell(*place(args), **place(kwargs))
    return watch.hazards, inputs


def _shell(network: nn.Module) -> nn.Module:
    """Returns a copy of the network without hooks, with the same parameters and buffers as tensors on the device."""
    memo: dict[int, Any] = {id(x): OnDevice(x.detach()) for x in chain(network.parameters(), network.buffers())}
    for module in network.modules():
        memo |= {id(vars(module)[name]): False for name in WRAPPED if name in vars(module)}
    shell = copy.deepcopy(network, memo)
    for module in shell.modules():
        for name in WRAPPED:
            vars(module).pop(name, None)
    return shell.eval()
