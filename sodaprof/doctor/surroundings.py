"""What the scheduler, the pipeline, and hooks or adapters in the transformers mean for CUDA graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..pipelines.patch import patched
from ..pipelines.sampler_steps import LOOP_SCHEDULERS, in_loop

Finding = dict[str, Any]  # where, kind, what, effect, do, and what else is known
HOOKS = {  # a part of a hook's name -> kind, effect, do
    "offload": ("offload", "weights move at each call: nothing is captured", "turn offload off"),
    "casting": (
        "casting",
        "weights are cast at each call: nothing is captured",
        "load the weights in the dtype they run in",
    ),
    "": ("hook", "its Python runs at each call, which a graph cannot hold: nothing is captured", "remove it"),
}


def finding(where: str, kind: str, what: str, effect: str, do: str, **more: Any) -> Finding:
    """Returns one finding as plain data."""
    return {"where": where, "kind": kind, "what": what, "effect": effect, "do": do, **more}


@contextmanager
def timesteps_asked(scheduler: Any) -> Iterator[list[bool]]:
    """Yields a list that gets, at each `set_timesteps` of this instance, whether a device was passed."""
    asked: list[bool] = []

    def listen(set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(set_timesteps).bind(*args, **kwargs).arguments
        asked.append(bound.get("device") is not None)
        return set_timesteps(*args, **kwargs)

    with patched(scheduler, "set_timesteps", listen):
        yield asked


def scheduler_findings(scheduler: Any, asked: list[bool]) -> list[Finding]:
    """Returns what keeps a step with this scheduler from being one graph; `asked`: of `timesteps_asked`, after a step."""
    name, found = type(scheduler).__name__, []
    loop = in_loop(scheduler)
    if not loop:
        wanted = LOOP_SCHEDULERS.get(name, {})
        odd = ", ".join(
            f"{k}={scheduler.config.get(k)!r}" for k, v in wanted.items() if scheduler.config.get(k, v[0]) not in v
        )
        found.append(
            finding(
                "scheduler", "scheduler", f"{name}{f' with {odd}' if odd else ''}: its step runs in Python",
                "the transformer's calls can be captured, not the whole step",
                "for --runtime whole-steps take DPMSolverMultistepScheduler (2M), DDIM or flow-match Euler",
            )
        )  # fmt: skip
    if asked and not asked[-1]:
        found.append(
            finding(
                "scheduler", "timesteps", "the pipeline leaves the timesteps on the CPU (set_timesteps without a device)",
                "each step copies one to the device, outside the transformer"
                + (", unless the whole step is captured" if loop else ""),
                "no change is needed" if loop else "pass device= to set_timesteps",
            )
        )  # fmt: skip
    if name.startswith("FlowMatchEuler") and getattr(scheduler, "begin_index", None) is None:
        found.append(
            finding(
                "scheduler", "begin_index", "the pipeline does not call set_begin_index",
                "its first step looks up its index on the device: one host sync a run",
                "no change is needed" if loop else "call scheduler.set_begin_index(0) after set_timesteps",
            )
        )  # fmt: skip
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was applied to the module, or in place to a module in it."""
    return hasattr(module, "_orig_mod") or any(m._compiled_call_impl is not None for m in module.modules())


def built_findings(name: str, network: nn.Module) -> list[Finding]:
    """Returns the hooks, the compiled modules and the adapters of a transformer, each kind once."""
    found = []
    if is_compiled(network):
        found.append(
            finding(
                name, "compiled", "torch.compile was applied to it",
                "its modules run inside compiled code, which ignores schedules: nothing is captured",
                "do without torch.compile, or apply the schedule to the original module (._orig_mod)",
            )
        )  # fmt: skip
    network = getattr(network, "_orig_mod", network)
    hooks: dict[str, list[str]] = {}  # name -> paths of the modules
    adapters = []
    for path, module in network.named_modules():
        registry = vars(module).get("_diffusers_hook")
        names = list(registry.hooks) if registry is not None else []
        if accelerate := vars(module).get("_hf_hook"):
            names.append(type(accelerate).__name__)
        for hook in names:
            hooks.setdefault(hook, []).append(path)
        if type(module).__module__.split(".")[0] == "peft":
            adapters.append(path)
    for hook, paths in hooks.items():
        kind, effect, do = next(text for part, text in HOOKS.items() if part in hook.lower())
        what = f"hook {hook} on {len(paths)} module{'s' if len(paths) > 1 else ''}"
        found.append(finding(f"{name}.{paths[0]}".rstrip("."), kind, what, effect, do, modules=paths))
    if adapters:
        what = f"{len(adapters)} adapter modules (peft)"
        effect = "can be captured; weights changed after the capture are detected"
        found.append(finding(f"{name}.{adapters[0]}", "adapter", what, effect, "no change is needed", modules=adapters))
    return found


def devices_of(network: nn.Module) -> set[torch.device]:
    """Returns the devices of the network's parameters."""
    return {parameter.device for parameter in network.parameters()}
