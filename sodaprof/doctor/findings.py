"""The findings of the doctor: their texts, and those about the scheduler, the hooks and the adapters of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..pipelines.patch import patched
from ..pipelines.sampler_steps import LOOP_SCHEDULERS, in_loop

Finding = dict[str, Any]  # where, kind, what, effect, do, and what else is known
NO_CHANGE = "no change is needed"
TEXTS = {  # kind -> what, effect, do; those of hazards first, in the order of the report
    "read": (
        "{}: reads values that are on the device",
        "a host sync, which fails a capture: this part runs without a graph",
        "compute it before the loop from values on the host, or pad to a fixed length",
    ),
    "copy": (
        "{}: copies host data to the device",
        "a capture fails on the copy: this part runs without a graph",
        "create it once, on the device, and keep it as a buffer",
    ),
    "random": (
        "{}: draws random numbers",
        "each replay draws new numbers: results depend on the order of replays",
        "draw before the loop and pass the numbers as an argument",
    ),
    "frozen": (
        "{}: takes a 0-dim tensor on the CPU",
        "its value at capture is kept; later changes are ignored without an error",
        "keep it on the device, or make sure that it is constant",
    ),
    "mask": (
        "{}: has a mask",
        "can be captured; attention runs a slower kernel than flash attention",
        "cut prompts to a fixed length and pass no mask",
    ),
    "lowering": (
        "cannot be traced: {}",
        "runs through the hooks, neither traced nor captured",
        "remove the findings in it; with runtime hooks every schedule runs",
    ),
    "sites": ("{}", "no schedule can be applied to it", "see docs/adding-a-model.md"),
    "unseen": (
        "its forward could not be examined ({})",
        "nothing is known about it",
        "try on a GPU, without graphs first",
    ),
    "compiled": (
        "torch.compile was applied to it",
        "its modules run inside compiled code, which ignores schedules: nothing is captured",
        "do without torch.compile, or apply the schedule to the original module (._orig_mod)",
    ),
    "offload": ("hook {}", "weights move at each call: nothing is captured", "turn offload off"),
    "casting": (
        "hook {}",
        "weights are cast at each call: nothing is captured",
        "load the weights in the dtype they run in",
    ),
    "hook": ("hook {}", "its Python runs at each call, which a graph cannot hold: nothing is captured", "remove it"),
    "adapter": (
        "{} adapter modules (peft)",
        "can be captured; weights changed after the capture are detected",
        NO_CHANGE,
    ),
    "scheduler": (
        "{}: its step runs in Python",
        "the transformer's calls can be captured, not the whole step",
        "for --runtime whole-steps take DPMSolverMultistepScheduler (2M), DDIM or flow-match Euler",
    ),
    "timesteps": (
        "the pipeline leaves the timesteps on the CPU (set_timesteps without a device)",
        "each step copies one to the device, outside the transformer, unless the whole step is captured",
        "pass device= to set_timesteps",
    ),
    "begin_index": (
        "the pipeline does not call set_begin_index",
        "its first step looks up its index on the device: one host sync a run",
        "call scheduler.set_begin_index(0) after set_timesteps",
    ),
}


def finding(where: str, kind: str, about: object = "", **more: Any) -> Finding:
    """Returns one finding as plain data; `about` completes its text."""
    what, effect, do = TEXTS[kind]
    return {"where": where, "kind": kind, "what": what.format(about), "effect": effect, "do": do, **more}


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
    name, found, loop = type(scheduler).__name__, [], in_loop(scheduler)
    instead = {"do": NO_CHANGE} if loop else {}
    if not loop:
        allowed, own = LOOP_SCHEDULERS.get(name, {}), scheduler.config
        odd = ", ".join(f"{k}={own.get(k)!r}" for k, values in allowed.items() if own.get(k, values[0]) not in values)
        found.append(finding("scheduler", "scheduler", f"{name} with {odd}" if odd else name))
    if asked and not asked[-1]:
        found.append(finding("scheduler", "timesteps", **instead))
    if name.startswith("FlowMatchEuler") and getattr(scheduler, "begin_index", None) is None:
        found.append(finding("scheduler", "begin_index", **instead))
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was applied to the module, or in place to a module in it."""
    return hasattr(module, "_orig_mod") or any(m._compiled_call_impl is not None for m in module.modules())


def built_findings(name: str, network: nn.Module) -> list[Finding]:
    """Returns the hooks, the compiled modules and the adapters of a transformer, each kind once."""
    found = [finding(name, "compiled")] if is_compiled(network) else []
    hooks: dict[str, list[str]] = {}  # name -> paths of the modules
    adapters = []
    for path, module in getattr(network, "_orig_mod", network).named_modules():
        registry, accelerate = vars(module).get("_diffusers_hook"), vars(module).get("_hf_hook")
        names = list(registry.hooks) if registry is not None else []
        for hook in names + ([type(accelerate).__name__] if accelerate else []):
            hooks.setdefault(hook, []).append(path)
        if type(module).__module__.split(".")[0] == "peft":
            adapters.append(path)
    for hook, paths in hooks.items():
        kind = next((kind for kind in ("offload", "casting") if kind in hook.lower()), "hook")
        about = f"{hook} on {len(paths)} module{'s' if len(paths) > 1 else ''}"
        found.append(finding(f"{name}.{paths[0]}".rstrip("."), kind, about, modules=paths))
    if adapters:
        found.append(finding(f"{name}.{adapters[0]}", "adapter", len(adapters), modules=adapters))
    return found
