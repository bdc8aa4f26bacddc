"""Our diffusers hooks on modules, kept there while others replace `forward`: accelerate does, when it offloads a model."""

from __future__ import annotations

from typing import Any

from diffusers.hooks import HookRegistry

from ...errors import MismatchError

GROUP_OFFLOADING = "group_offloading"  # the name of diffusers' own hooks


class Hooked:
    """Hooks on modules, each standing around those before it."""

    def __init__(self) -> None:
        self.hooks: list[tuple[Any, Any, str]] = []  # (module, hook, name)
        self.standing: dict[int, list[tuple[Any, Any, str]]] = {}  # id of a module -> those that are on it
        self.forwards: dict[int, Any] = {}  # id of a module -> its forward with them

    def add(self, module: Any, hook: Any, name: str) -> None:
        """Notes a hook, to be put on with the others."""
        self.hooks.append((module, hook, name))

    def attach(self) -> None:
        """Puts all hooks on."""
        for module, hook, name in self.hooks:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
            self.standing.setdefault(id(module), []).append((module, hook, name))
            self.forwards[id(module)] = module.forward

    def remove(self) -> None:
        """Takes all hooks off; what was put around them since stays."""
        while self.standing:
            number, mine = self.standing.popitem()
            module, ours = mine[0][0], self.forwards.pop(number)
            outer = vars(module).get("forward")
            self._take_off(mine)
            if outer is not ours and vars(module).get("_old_forward") is ours:  # accelerate's, around ours
                module._old_forward, module.forward = module.forward, outer

    def keep(self) -> None:
        """Puts hooks on again where accelerate took them off: it gives a module the `forward` back that it once found.

        A `forward` that somebody else put around ours stays.
        """
        for number, mine in self.standing.items():
            module, ours = mine[0][0], self.forwards[number]
            replaced = vars(module).get("forward")
            accelerated = getattr(getattr(replaced, "func", None), "__module__", None) == "accelerate.hooks"
            plain = replaced is None or getattr(replaced, "__func__", None) is type(module).forward
            if replaced is ours or not (accelerated or plain) or vars(module).get("_old_forward") is ours:
                continue
            self._take_off(mine)
            if replaced is None:
                vars(module).pop("forward", None)
            else:
                module.forward = replaced
            for _, hook, name in mine:
                module._diffusers_hook.register_hook(hook, name)
            self.forwards[number] = module.forward

    def _take_off(self, mine: list[tuple[Any, Any, str]]) -> None:
        for module, _, name in reversed(mine):
            module._diffusers_hook.remove_hook(name, recurse=False)


def refuse_group_offload(name: str, transformer: Any) -> None:
    """Raises MismatchError where diffusers offloads the transformer in groups, which moves weights between our hooks."""
    for module in transformer.modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and registry.get_hook(GROUP_OFFLOADING) is not None:
            raise MismatchError(
                f"{name} is offloaded in groups, under which a schedule does not run. Load the pipeline without "
                "enable_group_offload; pipe.enable_model_cpu_offload() works."
            )
