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
from ..models.load import OwnCall, default_guidance, default_prompts, default_steps, makes_video
from ..models.recording import Step
from ..profiles import FORMAT, TABLE_VERSIONS, VERSION
from ..sites import Model, Sampler, Site, raster_of
from .memory import Grid, Shapes, grid_of, passes

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
    host_bytes: int  # the sums
    disk_bytes: int  # before compression
    seconds: float  # estimated
    grids: list[Grid]  # of each site's errors a token
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
    call: OwnCall | None = None,
) -> ProfilePlan:
    """Returns what `run_profile` will do and take. Raises SodaprofError for settings that make no sense.

    steps: by default the pipeline's. samples: generations, by default 100, of video 10 (SODA, 4.1). batch_size: generations
    at once, at most: fewer where that saves passes over the trajectories. full_tokens: keep every site's error a token, also
    where there are more than MOST_TOKENS.
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
    if seed < 0:
        raise SodaprofError(f"--seed is {seed}; expected at least 0.")
    if prompts is None:
        prompts = default_prompts(pipe) if call is None else range(samples)
    prompts = list(prompts)
    scale = default_guidance(pipe) if guidance_scale is None and call is None else guidance_scale
    model, sampler, step = inspect_pipeline(pipe, name, steps, scale, prompts[0], call)
    if call is not None and asked is None:
        steps = sampler.steps
    if call is not None and sampler.steps != steps:
        raise SodaprofError(f"The call runs {sampler.steps} timesteps, steps is {steps}. Give steps={sampler.steps}.")
    works = {name: sum(past >= 0 for past in t.past(sampler.steps)) for name, t in model.transformers.items()}  # steps
    if step.called and sum(works.values()) != sampler.steps:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has transformers that take turns ({', '.join(model.transformers)}), and calls "
            f"{sum(works.values())} in {sampler.steps} steps; this release takes one transformer a step."
        )
    batch_size = min(batch_size, samples)
    branches = 2 if sampler.guidance_form == "halves" else step.passes
    sites = [s for t in model.transformers.values() for s in t.sites]
    folds = [step.folds[n, s.key] for n, t in model.transformers.items() for s in t.sites]
    latent = model.shape["latent"]
    grids = [
        grid_of(site.tokens, raster_of(latent, t.fingerprint.get("patch", 1), site.tokens), full_tokens)
        for t in model.transformers.values()
        for site in t.sites
    ]
    shapes = Shapes(
        sites, [branches * fold * s.tokens for fold, s in zip(folds, sites, strict=True)], grids, steps,
        branches, sampler.guidance_form == "halves", max_interval - 1, 4 if model.shape["dtype"] == "float32" else 2,
        len(RATES),
    )  # fmt: skip
    free = _free_memory(pipe) * MEMORY_SHARE if memory_bytes is None else memory_bytes
    batch_size, groups = passes(shapes, batch_size, free)
    extra = shapes.scratch(batch_size) + max(sum(shapes.ring(i, batch_size) for i in group) for group in groups)
    request = {
        "format": FORMAT, "version": VERSION, "tables": TABLE_VERSIONS, "model": name,
        "sampler": sampler.class_name, "prompts": list(prompts), "seed": seed, "samples": samples,
        "max_interval": max_interval, "batch_size": batch_size, "guidance_scale": scale, "dtype": model.shape["dtype"],
    }  # fmt: skip
    seconds = _seconds(pipe, step, works) * samples * len(groups) * 1.3
    return ProfilePlan(
        model, sampler, request, groups, extra, shapes.host_bytes, shapes.disk_bytes, seconds, grids, step, call,
    )  # fmt: skip


def _free_memory(pipe: Any) -> float:
    device = torch.device(str(getattr(pipe, "device", "cpu")))
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
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
