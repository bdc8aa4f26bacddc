"""Our hooks on modules: each module's `forward` is replaced, and restored when the schedule is removed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

from diffusers.hooks import ModelHook
from torch import nn

from ...errors import MismatchError
from ...pipelines.recording import uncompiled

GROUP_OFFLOADING = "group_offloading"  # the name of diffusers' own hooks


class Forward:
    """The `forward` of a module that carries hooks: calls run(path, original, args, kwargs) until it is removed.

    What others put around it since then stays when it is removed; it then only passes calls on. Copies of the module, and
    pickled ones, have the original.
    """

    def __init__(self, module: nn.Module, path: str, run: Callable[..., Any], owner: Any) -> None:
        self.module, self.path, self.run, self.owner, self.original = module, path, run, owner, module.forward
        self.replaced = vars(module).get("forward")  # None: the class's
        self.active = True
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.original(*args, **kwargs)
        return self.run(self.path, self.original, args, kwargs)

    @property
    def __wrapped__(self) -> Any:  # for `inspect.signature`
        return self.original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self.original,)

    def remove(self) -> None:
        """Restores the module's own `forward`, unless others have put theirs around this one."""
        self.active = False
        held = vars(self.module)
        if held.get("_old_forward") is self:  # accelerate's is around ours
            self.module._old_forward = self.original
        elif held.get("forward") is not self:
            return
        elif self.replaced is None:
            del self.module.forward
        else:
            self.module.forward = self.replaced

    def is_lost(self) -> bool:
        """Whether accelerate restored the `forward` that the module had before, so that this one is not called."""
        held = vars(self.module)
        now = held.get("forward")
        if now is self or held.get("_old_forward") is self:
            return False
        accelerated = getattr(getattr(now, "func", None), "__module__", None) == "accelerate.hooks"
        return now is None or accelerated or getattr(now, "__func__", None) is type(self.module).forward


def _same(value: Any) -> Any:
    return value


class Hooks:
    """The replaced `forward`s of a transformer's submodules, by path."""

    def __init__(self, transformer: nn.Module, run: Callable[..., Any], owner: Any) -> None:
        """run(path, original, args, kwargs) takes the place of each module's `forward`. owner: found by `hook_owners`."""
        self.transformer, self.run, self.owner = transformer, run, owner
        self.forwards: dict[str, Forward] = {}
        self.compiled = ExitStack()

    def attach(self, paths: list[str]) -> None:
        """Replaces the `forward`s of the submodules at these paths, `""` being the transformer itself."""
        self.compiled.enter_context(uncompiled(self.transformer))
        for path in paths:
            self.forwards[path] = Forward(self.transformer.get_submodule(path), path, self.run, self.owner)

    def remove(self) -> None:
        """Restores all `forward`s."""
        self.compiled.close()
        while self.forwards:
            self.forwards.popitem()[1].remove()

    def keep(self) -> None:
        """Replaces `forward`s again if accelerate restored older ones, or if an adapter wraps the module at the path now."""
        self.compiled.enter_context(uncompiled(self.transformer))  # what was compiled since
        for path, forward in list(self.forwards.items()):
            try:
                module = self.transformer.get_submodule(path)
            except AttributeError:
                raise MismatchError(
                    f"{type(self.transformer).__name__} has no module {path} any more: it was changed after the schedule was "
                    "applied. Undo that, or remove the schedule first: sodaprof.remove(pipe)"
                ) from None
            if module is not forward.module or forward.is_lost():
                forward.remove()
                self.forwards[path] = Forward(module, path, self.run, self.owner)


def chain(hooks: list[ModelHook], module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls the hooks of a module around its own `forward`, the first one innermost."""
    inner = original
    for hook in hooks:
        hook.fn_ref = SimpleNamespace(original_forward=inner)
        inner = partial(_call, hook, inner, module)
    return inner


def _call(hook: ModelHook, inner: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.new_forward(module, *args, **kwargs) if hasattr(hook, "new_forward") else inner(*args, **kwargs)


def hook_owners(transformer: nn.Module) -> list[Any]:
    """Returns the owners of the hooks on the transformer: one if a schedule is attached, else none."""
    forwards = (vars(module).get("forward") for module in transformer.modules())
    return list({f.owner: None for f in forwards if isinstance(f, Forward) and f.active})


def refuse_group_offload(name: str, transformer: nn.Module) -> None:
    """Raises MismatchError if diffusers offloads the transformer in groups, which moves weights between our hooks."""
    for module in transformer.modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and registry.get_hook(GROUP_OFFLOADING) is not None:
            raise MismatchError(
                f"{name} is offloaded in groups, under which a schedule does not run. Load the pipeline without "
                "enable_group_offload; pipe.enable_model_cpu_offload() works."
            )
