"""Our diffusers hooks on modules. They stay there if accelerate, which offloads models, replaces a module's `forward`."""

from __future__ import annotations

from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ...errors import MismatchError

GROUP_OFFLOADING = "group_offloading"  # the name of diffusers' own hooks


class Hooks:
    """Hooks on modules; each wraps those that were added to its module before it."""

    def __init__(self) -> None:
        self.hooks: dict[Any, list[tuple[str, ModelHook]]] = {}  # of each module
        self.forwards: dict[Any, Any] = {}  # module with registered hooks -> its forward, which calls them

    def add(self, module: nn.Module, hook: ModelHook, name: str) -> None:
        """Adds a hook; `attach` registers it."""
        self.hooks.setdefault(module, []).append((name, hook))

    def attach(self) -> None:
        """Registers all hooks."""
        for module in self.hooks:
            self._register(module)

    def remove(self) -> None:
        """Removes all hooks; a `forward` that others put around them since then stays."""
        while self.forwards:
            module, ours = self.forwards.popitem()
            outer = vars(module).get("forward")
            self._unregister(module)
            if outer is not ours and vars(module).get("_old_forward") is ours:  # accelerate's, around ours
                module._old_forward, module.forward = module.forward, outer

    def keep(self) -> None:
        """Registers hooks again that accelerate removed: it restores the `forward` that a module had earlier.

        A `forward` that others put around ours stays.
        """
        for module, ours in self.forwards.items():
            replaced = vars(module).get("forward")
            accelerated = getattr(getattr(replaced, "func", None), "__module__", None) == "accelerate.hooks"
            plain = replaced is None or getattr(replaced, "__func__", None) is type(module).forward
            if replaced is ours or not (accelerated or plain) or vars(module).get("_old_forward") is ours:
                continue
            self._unregister(module)
            if replaced is None:
                vars(module).pop("forward", None)
            else:
                module.forward = replaced
            self._register(module)

    def _register(self, module: Any) -> None:
        for name, hook in self.hooks[module]:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
            self.forwards[module] = module.forward

    def _unregister(self, module: Any) -> None:
        for name, _ in reversed(self.hooks[module]):
            module._diffusers_hook.remove_hook(name, recurse=False)


def refuse_group_offload(name: str, transformer: nn.Module) -> None:
    """Raises MismatchError if diffusers offloads the transformer in groups, which moves weights between our hooks."""
    for module in transformer.modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and registry.get_hook(GROUP_OFFLOADING) is not None:
            raise MismatchError(
                f"{name} is offloaded in groups, under which a schedule does not run. Load the pipeline without "
                "enable_group_offload; pipe.enable_model_cpu_offload() works."
            )
