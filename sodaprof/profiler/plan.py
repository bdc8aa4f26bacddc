"""Plans a profile: which sites in which pass, how much memory, disk and time it will take."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import SodaprofError, UnsupportedModelError
from ..models.discover import inspect_pipeline
from ..models.load import OwnCall, default_guidance, default_prompts
from ..models.recording import Step
from ..profiles import FORMAT, TABLES, VERSION
from ..sites import Model, Sampler, Site

RATES = np.array([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375])
MEMORY_SHARE = 0.6  # of what is free may go to the rings


@dataclass
class ProfilePlan:
    """What a profile will take: shown before it starts."""

    model: Model
    sampler: Sampler
    request: dict[str, Any]  # the manifest without what is only known at the end
    groups: list[list[int]]  # sites profiled together; one pass over the trajectories each
    extra_bytes: int  # the rings of the largest group, and the differences of one site
    disk_bytes: int
    seconds: float  # estimated
    step: Step = field(repr=False)
    own: OwnCall | None = None  # what is called in place of the pipeline

    @property
    def branches(self) -> int:
        """Guidance branches of a step: both halves of a batch, or the calls of the network."""
        return 2 if self.sampler.guidance_form == "halves" else self.step.passes

    @property
    def varying(self) -> frozenset[int]:
        """Numbers of the sites whose tokens are as many as the prompt is long."""
        return frozenset(
            i for i, (name, site) in enumerate(self.sites) if self.model.transformers[name].holds_text(site)
        )

    @property
    def sites(self) -> list[tuple[str, Site]]:
        return [(name, s) for name, t in self.model.transformers.items() for s in t.sites]


def plan_profile(
    pipe: Any,
    name: str,
    *,
    steps: int = 50,
    samples: int = 100,
    prompts: Sequence[int | str] | None = None,
    guidance_scale: float | None = None,
    max_interval: int = 8,
    batch_size: int = 16,
    seed: int = 0,
    memory_bytes: int | None = None,
    call: OwnCall | None = None,
) -> ProfilePlan:
    """Returns what `run_profile` will do and take. Raises SodaprofError for settings that make no sense.

    call: called as call(entries, generators) where the pipeline would be, for prompt embeddings and any other arguments of
    your own; entries are some of `prompts`, by default numbers from 0 on, one a sample. It must run `steps` steps;
    guidance_scale is then what it uses, and is only noted.
    """
    for what, value, least in (("steps", steps, 2), ("samples", samples, 1), ("batch-size", batch_size, 1)):
        if value < least:
            raise SodaprofError(f"--{what} is {value}; expected at least {least}.")
    if not 2 <= max_interval <= min(steps, 100):
        raise SodaprofError(f"--max-interval is {max_interval}; expected 2 to {min(steps, 100)} (at most the steps).")
    if seed < 0:
        raise SodaprofError(f"--seed is {seed}; expected at least 0.")
    if prompts is None:
        prompts = default_prompts(pipe) if call is None else range(samples)
    prompts = list(prompts)
    scale = default_guidance(pipe) if guidance_scale is None and call is None else guidance_scale
    model, sampler, step = inspect_pipeline(pipe, name, steps, scale, prompts[0], call)
    if call is not None and sampler.steps != steps:
        raise SodaprofError(f"The call runs {sampler.steps} timesteps, steps is {steps}. Give steps={sampler.steps}.")
    if step.takes_turns:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has transformers that take turns ({', '.join(model.transformers)}); this release "
            "profiles those that are called at each step."
        )
    batch_size = min(batch_size, samples)
    branches = 2 if sampler.guidance_form == "halves" else step.passes
    sites = [s for t in model.transformers.values() for s in t.sites]
    folds = [step.folds[n, s.key] for n, t in model.transformers.items() for s in t.sites]
    item = 4 if model.shape["dtype"] == "float32" else 2
    ages = max_interval - 1
    rows = [branches * batch_size * fold * s.tokens for fold, s in zip(folds, sites, strict=True)]
    ring = [ages * n * (s.width * item + 12) for n, s in zip(rows, sites, strict=True)]
    free = _free_memory(pipe) * MEMORY_SHARE if memory_bytes is None else memory_bytes
    widest = max(n * s.width for n, s in zip(rows, sites, strict=True))  # of all branches
    scratch = ages * (widest if sampler.guidance_form == "halves" else widest // branches) * 4
    groups = _group(ring, free - scratch)
    cells = steps * len(sites) * ages
    tokens = sum(s.tokens for s in sites) // len(sites)
    disk = cells * ((branches + 1) * (24 + 8 * len(RATES)) + 2 * tokens)
    request = {
        "format": FORMAT, "version": VERSION, "tables": dict.fromkeys(TABLES, 1), "model": name,
        "sampler": sampler.class_name, "prompts": list(prompts), "seed": seed, "samples": samples,
        "max_interval": max_interval, "batch_size": batch_size, "guidance_scale": scale, "dtype": model.shape["dtype"],
    }  # fmt: skip
    seconds = _seconds_a_step(pipe, step) * steps * samples * len(groups) * 1.3
    return ProfilePlan(
        model, sampler, request, groups, scratch + max(sum(ring[i] for i in g) for g in groups), disk, seconds, step,
        call,
    )  # fmt: skip


def _group(sizes: list[int], free: float) -> list[list[int]]:
    """Returns the sites in as few consecutive groups as fit `free` bytes each."""
    if max(sizes) > free:
        raise SodaprofError(
            f"The ring of one site takes {max(sizes) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB may be used. "
            "Lower --batch-size or --max-interval."
        )
    groups: list[list[int]] = [[]]
    used = 0
    for i, size in enumerate(sizes):
        if used + size > free:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += size
    return groups


def _free_memory(pipe: Any) -> float:
    device = torch.device(str(getattr(pipe, "device", "cpu")))
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _seconds_a_step(pipe: Any, step: Any) -> float:
    """Returns the seconds of one generation's step, timed on the recorded one."""
    with torch.no_grad():
        for repeat in range(2):  # the first one warms up
            if repeat:
                began = time.perf_counter()
            for name, args, kwargs in step.calls:
                pipe.components[name](*args, **kwargs)
            if getattr(pipe, "device", torch.device("cpu")).type == "cuda":
                torch.cuda.synchronize()
    return time.perf_counter() - began
