"""Finds what keeps the parts of a pipeline out of CUDA graphs, without a GPU."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..formats.schedule import Plan
from ..formats.sites import Transformer
from ..pipelines.clock import Moment
from ..pipelines.discover import find_sites, guidance_form
from ..pipelines.load import default_guidance, default_prompts, transformers_of
from ..pipelines.recording import Step, hooked, record_step
from ..pipelines.sampler_steps import in_loop
from ..pipelines.structure import find_modules
from ..runtime.compiled.trace import Programs, TracedBlock
from ..runtime.hooks.sites import SiteHook, SiteRow
from ..runtime.hooks.stack import block_of
from .findings import TEXTS, Finding, built_findings, finding, is_compiled, scheduler_findings, timesteps_asked
from .hazards import Call, Hazard, follow

HOOK = "sodaprof.doctor"
# kinds of findings that keep their module, and those that keep the whole transformer out of a graph
BLOCKS_PART = ("read", "copy", "lowering")
BLOCKS_ALL = ("offload", "casting", "hook", "compiled", "sites", "unseen")


def diagnose(pipe: Any, name: str, steps: int = 50, guidance_scale: float | None = None) -> dict[str, Any]:
    """Returns what keeps a pipeline out of CUDA graphs, as plain data: {format, ..., transformers, verdict, findings}.

    The pipeline, which must be on the CPU, runs to its scheduler's first step; then each transformer is run again with the
    recorded arguments under `hazards.follow`, and its blocks are traced. Its verdict is `captures` if nothing prevents a
    graph, `captures in part` if at least one block can be captured, else `falls back`. Raises UnsupportedModelError if no
    step can be recorded, MismatchError if the pipeline carries a schedule.
    """
    parts = transformers_of(pipe)
    for part, network in parts.items():
        if elsewhere := {str(parameter.device) for parameter in network.parameters()} - {"cpu"}:
            raise UnsupportedModelError(
                f"{part} is on {elsewhere.pop()}; the doctor examines networks on the CPU, where it simulates a device. "
                'Type: pipe.to("cpu")'
            )
    scale = default_guidance(pipe) if guidance_scale is None else guidance_scale
    compiled = any(is_compiled(network) for network in parts.values())
    with (
        torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        timesteps_asked(pipe.scheduler) as asked,
        torch.no_grad(),
    ):
        step = record_step(pipe, [default_prompts(pipe)[0]], steps, scale)
        findings = scheduler_findings(pipe.scheduler, asked)
        about, verdict = {}, {}
        for part, network in parts.items():
            calls = [(args, kwargs) for n, args, kwargs in step.calls if n == part]
            about[part], verdict[part], found = audit(part, network, calls)
            findings += found
    return {
        "format": "sodaprof.doctor", "version": 1, "model": name, "pipeline": type(pipe).__name__, "steps": steps,
        "scheduler": {"class": type(pipe.scheduler).__name__, "in_loop": in_loop(pipe.scheduler)},
        "guidance": {"form": guidance_form(pipe, step), "scale": scale},
        "transformers": about, "verdict": verdict, "findings": findings,
    }  # fmt: skip


@torch.no_grad()
def audit(name: str, network: nn.Module, calls: list[Call]) -> tuple[dict[str, Any], str, list[Finding]]:
    """Returns ({class, blocks, lowered}, verdict, findings) of one transformer, from its calls of one step."""
    findings = built_findings(name, network)
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    blocks: list[str] = []
    refused: dict[str, str] = {}
    hazards: list[Hazard] = []
    inputs: dict[str, Call] = {}
    try:
        if not calls:
            raise UnsupportedModelError("The pipeline's first step does not call it.")
        found = find_sites(SimpleNamespace(components={name: network}), name, Step([(name, *calls[0])]))
        blocks = list(dict.fromkeys(block_of(site.key) for site in found.sites))
    except UnsupportedModelError as error:
        findings.append(finding(name, "sites", error))
    try:
        hazards, inputs = follow(network, calls, blocks)
        with _quiet():
            refused = refusals(network, found, inputs) if blocks else {}
    except Exception as error:  # operators that do not support the simulated device raise all kinds
        findings.append(finding(name, "unseen", f"{type(error).__name__}: {_first_line(error)}"))
    findings += _hazard_findings(name, hazards) + _refusal_findings(name, refused, hazards)
    held = {h.module for h in hazards if h.kind in BLOCKS_PART} | set(refused)
    free = [block for block in blocks if not any(_is_in(path, block) for path in held)]
    verdict = "captures" if not held else "captures in part" if free else "falls back"
    if any(f["kind"] in BLOCKS_ALL for f in findings):
        verdict = "falls back"
    about = {"class": type(network).__name__, "blocks": len(blocks), "lowered": len(inputs) - len(refused)}
    return about, verdict, findings


def refusals(network: nn.Module, found: Transformer, inputs: dict[str, Call]) -> dict[str, str]:
    """Returns for each block that cannot be traced the reason, by path; inputs: what each block is called with."""
    plan = Plan(found.class_name, found.fingerprint, {site.key: "C" for site in found.sites}, ".")
    known, moment = find_modules(network), Moment()
    programs: Programs = {}
    refused = {}
    for block, (args, kwargs) in inputs.items():
        rows: dict[str, list[SiteRow]] = defaultdict(list)
        for site in found.sites:
            if block_of(site.key) == block:
                kind, module = known[site.path][3:]
                rows[site.path].append(SiteRow(plan, site.key, module, kind == "attn", None))
        moment.forward += 1
        module = network.get_submodule(block)
        traced = TracedBlock(block, module, list(chain(*rows.values())), moment, programs)
        with ExitStack() as stack:
            for path, calls in rows.items():
                stack.enter_context(hooked(known[path][4], SiteHook(calls, moment), HOOK))
            stack.enter_context(hooked(module, traced, f"{HOOK}.traced"))
            try:
                module(*args, **kwargs)
            except UnsupportedModelError as error:
                refused[block] = _first_line(error.__cause__ or error)
    return refused


@contextmanager
def _quiet() -> Iterator[None]:
    """Disables the logging of tracebacks of operators that cannot be traced, while the block runs."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _hazard_findings(name: str, hazards: list[Hazard]) -> list[Finding]:
    """Returns one finding for each hazard at a line of code, over all layers."""
    groups = defaultdict(list)
    for hazard in hazards:
        groups[hazard.kind, hazard.operator, _any_layer(hazard.module), hazard.source].append(hazard)
    found = []
    for (kind, operator, _, source), group in groups.items():
        modules = list(dict.fromkeys(hazard.module for hazard in group))
        more = {"operator": operator, "source": source, "code": group[0].code, "modules": modules}
        found.append(finding(_where(name, modules), kind, operator, **more))
    return sorted(found, key=lambda f: list(TEXTS).index(f["kind"]))


def _refusal_findings(name: str, refused: dict[str, str], hazards: list[Hazard]) -> list[Finding]:
    """Returns one finding for each reason that blocks cannot be traced for."""
    groups = defaultdict(list)
    for block, reason in refused.items():
        if any(h.kind == "read" and _is_in(h.module, block) for h in hazards):
            reason = "it depends on the values that it reads"
        groups[_any_layer(block), reason].append(block)
    return [finding(_where(name, blocks), "lowering", reason, modules=blocks) for (_, reason), blocks in groups.items()]


def _is_in(module: str, block: str) -> bool:
    return f"{module}.".startswith(f"{block}.")


def _where(name: str, modules: list[str]) -> str:
    path = modules[0] if len(modules) == 1 else _any_layer(modules[0])
    return f"{name}.{path}" if path else name


def _any_layer(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path, count=1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
