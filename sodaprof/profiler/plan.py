"""Plans a profile: which sites in which pass, how much memory, disk and time it will take."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import SodaprofError, UnsupportedModelError
from ..formats.profile import FORMAT, VERSION, history_of
from ..formats.sites import Model, Sampler, Site, raster_of
from ..formats.tables import STACK_FORMS, TABLE_VERSIONS, VERSIONS
from ..pipelines.discover import inspect_pipeline
from ..pipelines.load import (
    OwnCall,
    check_entries,
    check_seeds,
    default_guidance,
    default_prompts,
    default_steps,
    makes_video,
)
from ..pipelines.recording import Step
from ..pipelines.stack import Stack, stack_of
from .budget import Grid, Shapes, grid_of, passes
from .gram import GramSums, Track

RATES = np.array([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375])
MEMORY_SHARE = 0.6  # of what is free may go to the rings


@dataclass
class ProfilePlan:
    """What a profile will take: shown before it starts."""

    model: Model
    sampler: Sampler
    request: dict[str, Any]  # the manifest without what is only known at the end
    groups: list[list[int]]  # sites profiled together; one pass over the trajectories each
    extra_bytes: int  # the rings of the largest group, the differences of one site, and what is kept for products
    host_bytes: int  # the sums
    disk_bytes: int  # before compression
    seconds: float  # estimated
    grids: list[Grid]  # of each site's errors a token
    stacks: dict[str, Stack]  # of the transformers whose products are taken, where blocks hand on one tensor
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
            i for i, (name, site) in enumerate(self.sites) if self.model.transformers[name].holds_text(site.key)
        )

    @property
    def measures(self) -> bool:
        """Whether errors of reuse and pruning are measured."""
        return "caching" in self.request["tables"]

    @property
    def multiplies(self) -> bool:
        """Whether products of states and guided outputs are taken; where errors are measured, of the sites' outputs too."""
        return "gram" in self.request["tables"]

    def gram(self) -> GramSums | None:
        """Returns empty sums of the products that are to be taken, None where there are none."""
        if not self.multiplies:
            return None
        steps, tracks = self.sampler.steps, []
        if self.measures:
            folds = [self.step.folds[name, site.key] for name, site in self.sites]
            tracks = [
                Track("site", name, s, f * s.tokens * s.width) for (name, s), f in zip(self.sites, folds, strict=True)
            ]
            halves = self.branches if self.sampler.guidance_form == "halves" else 1
            tracks += [
                Track(form, name, None, stack.size // halves)
                for name, stack in self.stacks.items()
                for form in STACK_FORMS
            ]
        history = history_of(steps, self.request["max_interval"])
        return GramSums(tracks, steps, history, math.prod(self.model.shape["latent"]))

    @property
    def sites(self) -> list[tuple[str, Site]]:
        return [(name, s) for name, t in self.model.transformers.items() for s in t.sites]

    @property
    def past(self) -> dict[str, list[int]]:
        """How many steps of its turn go before each step, by transformer (`sites.turn_ages`)."""
        return {name: t.past(self.sampler.steps) for name, t in self.model.transformers.items()}


def plan_profile(
    pipe: Any,
    name: str,
    *,
    steps: int | None = None,
    samples: int | None = None,
    prompts: Sequence[int | str] | None = None,
    guidance_scale: float | None = None,
    max_interval: int = 8,
    batch_size: int = 16,
    seed: int = 0,
    memory_bytes: int | None = None,
    full_tokens: bool = False,
    states_only: bool = False,
    gram: bool = True,
    call: OwnCall | None = None,
) -> ProfilePlan:
    """Returns what `run_profile` will do and take. Raises SodaprofError for settings that make no sense.

    steps: by default the pipeline's. samples: generations, by default 100, of video 10 (SODA, 4.1). batch_size: generations
    at once, at most: fewer where that saves passes over the trajectories. full_tokens: keep every site's error a token, also
    where there are more than MOST_TOKENS. states_only: only the products of states and guided outputs, no errors of sites.
    gram: whether products are taken at all.
    call: called as call(entries, generators) where the pipeline would be, for prompt embeddings and any other arguments of
    your own; entries are some of `prompts`, by default numbers from 0 on, one a sample. It must run `steps` steps;
    guidance_scale is then what it uses, and is only noted.
    """
    asked = steps
    steps = default_steps(pipe) if steps is None else steps
    if samples is None:
        samples = 10 if makes_video(pipe) else 100
    for what, value, least in (("steps", steps, 2), ("samples", samples, 1), ("batch-size", batch_size, 1)):
        if value < least:
            raise SodaprofError(f"--{what} is {value}; expected at least {least}.")
    if not 2 <= max_interval <= min(steps, 100):
        raise SodaprofError(f"--max-interval is {max_interval}; expected 2 to {min(steps, 100)} (at most the steps).")
    if states_only and not gram:
        raise SodaprofError("--states-only and --no-gram together leave nothing to measure. Give one of them.")
    if states_only and full_tokens:
        raise SodaprofError("--states-only measures no site, so there are no tokens to keep. Leave --tokens out.")
    if seed < 0:
        raise SodaprofError(f"--seed is {seed}; expected at least 0.")
    check_seeds(range(seed, seed + samples))
    if prompts is None:
        prompts = default_prompts(pipe) if call is None else range(samples)
    prompts = list(prompts)
    if call is None:
        check_entries(pipe, prompts)
    scale = default_guidance(pipe) if guidance_scale is None and call is None else guidance_scale
    model, sampler, step = inspect_pipeline(pipe, name, steps, scale, prompts[0], call)
    if call is not None and asked is None:
        steps = sampler.steps
    if call is not None and sampler.steps != steps:
        raise SodaprofError(f"The call runs {sampler.steps} timesteps, steps is {steps}. Give steps={sampler.steps}.")
    if call is None and sampler.steps != steps and len({*sampler.timesteps}) < sampler.steps:
        raise UnsupportedModelError(
            f"{sampler.class_name} runs {sampler.steps} timesteps for --steps {steps}, some of them twice; this release takes "
            "samplers that call the network once a step. Give another: --scheduler DPMSolverMultistepScheduler"
        )
    works = {name: sum(past >= 0 for past in t.past(sampler.steps)) for name, t in model.transformers.items()}  # steps
    if step.called and sum(works.values()) != sampler.steps:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has transformers that take turns ({', '.join(model.transformers)}), and calls "
            f"{sum(works.values())} in {sampler.steps} steps; this release takes one transformer a step."
        )
    batch_size = min(batch_size, samples)
    branches = 2 if sampler.guidance_form == "halves" else step.passes
    named = [] if states_only else [(n, s) for n, t in model.transformers.items() for s in t.sites]
    sites = [s for _, s in named]
    folds = [step.folds[n, s.key] for n, s in named]
    latent = model.shape["latent"]
    grids = [
        grid_of(site.tokens, raster_of(latent, t.fingerprint.get("patch", 1), site.tokens), full_tokens)
        for t in model.transformers.values()
        for site in t.sites
    ]
    halves = sampler.guidance_form == "halves"
    found = {n: stack_of(pipe, n, t, step) for n, t in model.transformers.items()} if gram and not states_only else {}
    stacks = {n: stack for n, stack in found.items() if stack is not None}
    shapes = Shapes(
        sites, [branches * fold * s.tokens for fold, s in zip(folds, sites, strict=True)], [] if states_only else grids,
        steps, branches, halves, max_interval - 1, 4 if model.shape["dtype"] == "float32" else 2, len(RATES),
        math.prod(latent) if gram else 0, history_of(steps, max_interval) if gram and not states_only else 0,
        [stack.size // (branches if halves else 1) for stack in stacks.values()],
    )  # fmt: skip
    free = _free_memory(pipe) * MEMORY_SHARE if memory_bytes is None else memory_bytes
    batch_size, groups = passes(shapes, batch_size, free)
    extra = shapes.scratch(batch_size) + max(sum(shapes.ring(i, batch_size) for i in group) for group in groups)
    tables = {"gram": VERSIONS["gram"]} if states_only else VERSIONS if gram else TABLE_VERSIONS
    request = {
        "format": FORMAT, "version": VERSION, "tables": tables, "model": name,
        "sampler": sampler.class_name, "prompts": list(prompts), "seed": seed, "samples": samples,
        "max_interval": max_interval, "batch_size": batch_size, "guidance_scale": scale, "dtype": model.shape["dtype"],
    }  # fmt: skip
    seconds = _seconds(pipe, step, works) * samples * len(groups) * (1.05 if states_only else 1.6 if gram else 1.3)
    return ProfilePlan(
        model, sampler, request, groups, extra, shapes.host_bytes, shapes.disk_bytes, seconds, grids, stacks, step, call,
    )  # fmt: skip


def _free_memory(pipe: Any) -> float:
    device = torch.device(str(getattr(pipe, "device", "cpu")))
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _seconds(pipe: Any, step: Step, works: dict[str, int]) -> float:
    """Returns the seconds of one generation's calls, timed on the recorded ones; works: steps of each transformer."""
    total = 0.0
    for name, steps in works.items():
        with torch.no_grad():
            for repeat in range(2):  # the first one warms up
                if repeat:
                    began = time.perf_counter()
                for called, args, kwargs in step.calls:
                    if called == name:
                        pipe.components[name](*args, **kwargs)
                if getattr(pipe, "device", torch.device("cpu")).type == "cuda":
                    torch.cuda.synchronize()
        total += (time.perf_counter() - began) * steps
    return total
