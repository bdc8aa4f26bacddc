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
from ..formats.manifest import MAX_INTERVAL, MAX_SAMPLES, Manifest
from ..formats.profile import history_of
from ..formats.sites import MAX_STEPS, Model, Sampler, Site, raster_of
from ..formats.tables import STACK_FORMS, TABLE_VERSIONS, VERSIONS
from ..pipelines.discover import inspect_pipeline
from ..pipelines.entries import check_entries, default_prompts, makes_video
from ..pipelines.load import OwnCall, check_seeds, default_guidance, default_steps
from ..pipelines.recording import Stack, Step, stack_of
from .budget import Grid, Shapes, grid_of, passes
from .gram import GramSums, Track

RATES = np.array([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375])
MEMORY_SHARE = 0.6  # of the free memory may go to the rings


@dataclass
class ProfilePlan:
    """What a profile measures and takes, known before it starts."""

    model: Model
    sampler: Sampler
    request: dict[str, Any]  # the manifest, except for what is known at the end only
    grids: list[Grid]  # of each site's errors a token
    stacks: dict[str, Stack]  # of the transformers whose products are measured, if blocks pass one tensor
    step: Step = field(repr=False)
    own: OwnCall | None = None  # called instead of the pipeline
    groups: list[list[int]] = field(default_factory=list)  # sites profiled together, in a pass over the trajectories
    extra_bytes: int = 0  # the rings of the largest group, the differences of one site, and the history of the products
    host_bytes: int = 0  # the sums
    disk_bytes: int = 0  # before compression
    seconds: float = 0.0  # estimated

    @property
    def steps(self) -> int:
        return self.sampler.steps

    @property
    def ages(self) -> int:
        """The oldest age at which errors are measured."""
        return self.request["max_interval"] - 1

    @property
    def halves(self) -> bool:
        """Whether both guidance branches share a batch."""
        return self.sampler.guidance_form == "halves"

    @property
    def branches(self) -> int:
        """Guidance branches of a step: both halves of a batch, or the calls of the network."""
        return 2 if self.halves else self.step.passes

    @property
    def sites(self) -> list[tuple[str, Site]]:
        """The sites with the names of their transformers."""
        return [(name, s) for name, t in self.model.transformers.items() for s in t.sites]

    @property
    def varying(self) -> frozenset[int]:
        """Numbers of the sites with one token for each token of the prompt."""
        transformers = self.model.transformers
        return frozenset(i for i, (name, site) in enumerate(self.sites) if transformers[name].holds_text(site.key))

    @property
    def past(self) -> dict[str, list[int]]:
        """How many steps of its turn precede each step, by transformer (`sites.turn_ages`)."""
        return {name: t.past(self.steps) for name, t in self.model.transformers.items()}

    @property
    def measures(self) -> bool:
        """Whether errors of reuse and pruning are measured."""
        return "caching" in self.request["tables"]

    @property
    def multiplies(self) -> bool:
        """Whether products of states and guided outputs are measured; if errors are, of the sites' outputs too."""
        return "gram" in self.request["tables"]

    @property
    def history(self) -> int:
        """Oldest age of the products of outputs."""
        return history_of(self.steps, self.request["max_interval"])

    def device(self, pipe: Any) -> torch.device:
        """Returns where the first transformer computes."""
        return next(pipe.components[next(iter(self.model.transformers))].parameters()).device

    def generations(self, start: int, count: int) -> tuple[list[int | str], list[int]]:
        """Returns the entries and seeds of `count` generations."""
        prompts, numbers = self.request["prompts"], range(start, start + count)
        return [prompts[i % len(prompts)] for i in numbers], [self.request["seed"] + i for i in numbers]

    def gram(self) -> GramSums | None:
        """Returns empty sums of the products to measure, None if there are none."""
        if not self.multiplies:
            return None
        shapes, tracks = self.shapes(), []
        if self.measures:
            tracks = [Track("site", name, site.key, shapes.elements(i)) for i, (name, site) in enumerate(self.sites)]
            for name, size in zip(self.stacks, shapes.stacks, strict=True):
                tracks += [Track(form, name, "", size) for form in STACK_FORMS]
        return GramSums(tracks, self.steps, self.history, shapes.latent)

    def shapes(self) -> Shapes:
        """Returns what decides how much the profile takes."""
        measured = self.sites if self.measures else []
        return Shapes(
            sites=[site for _, site in measured],
            rows=[self.branches * self.step.folds[name, site.key] * site.tokens for name, site in measured],
            grids=self.grids if self.measures else [],
            steps=self.steps,
            branches=self.branches,
            halves=self.halves,
            ages=self.ages,
            item=4 if self.model.shape["dtype"] == "float32" else 2,
            rates=len(RATES),
            latent=math.prod(self.model.shape["latent"]) if self.multiplies else 0,
            history=self.history if self.multiplies and self.measures else 0,
            stacks=[stack.size // (self.branches if self.halves else 1) for stack in self.stacks.values()],
        )


def plan_profile(
    pipe: Any,
    name: str,
    *,
    steps: int | None = None,
    samples: int | None = None,
    prompts: Sequence[int | str] | None = None,
    guidance_scale: float | None = None,
    max_interval: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    memory_bytes: int | None = None,
    full_tokens: bool = False,
    states_only: bool = False,
    gram: bool = True,
    call: OwnCall | None = None,
) -> ProfilePlan:
    """Returns what `run_profile` measures and takes. Raises SodaprofError for invalid settings.

    steps: by default the pipeline's. samples: generations, by default 100, of video 10 (SODA, 4.1). max_interval: by default 8,
    or the steps if these are fewer. batch_size: generations at once, at most: fewer if that saves passes over the trajectories.
    full_tokens: keep every site's error a token, also if there are more than MOST_TOKENS. states_only: only the products of
    states and guided outputs, no errors of sites.
    gram: whether products are measured at all.
    call: called as call(entries, generators) instead of the pipeline, for prompt embeddings and any other arguments of
    your own; entries are some of `prompts`, by default numbers from 0 on, one a sample. It must run `steps` steps;
    guidance_scale is then the scale that it uses, and is only recorded.
    """
    if samples is None:
        samples = 10 if makes_video(pipe) else 100
    if call is None and guidance_scale is None:
        guidance_scale = default_guidance(pipe)
    expected = default_steps(pipe) if steps is None else steps
    if max_interval is None:
        max_interval = max(2, min(8, expected))
    _check_settings(expected, samples, max_interval, batch_size, seed)
    _check_tables(states_only, gram, full_tokens)
    if prompts is None:
        prompts = default_prompts(pipe) if call is None else range(samples)
    prompts = list(prompts)
    if call is None:
        prompts = check_entries(pipe, prompts)
    model, sampler, step = inspect_pipeline(pipe, name, expected, guidance_scale, prompts[0], call)
    if call is not None and steps is not None and sampler.steps != steps:
        raise SodaprofError(f"The call runs {sampler.steps} timesteps, steps is {steps}. Give steps={sampler.steps}.")
    _check_run(pipe, model, sampler, step, expected if call is None else sampler.steps)
    request = {
        "format": Manifest.FORMAT[0], "version": Manifest.FORMAT[1],
        "tables": {"gram": VERSIONS["gram"]} if states_only else VERSIONS if gram else TABLE_VERSIONS,
        "model": name, "sampler": sampler.class_name, "prompts": prompts, "seed": seed, "samples": samples,
        "max_interval": max_interval, "batch_size": min(batch_size, samples), "guidance_scale": guidance_scale,
        "dtype": model.shape["dtype"],
    }  # fmt: skip
    plan = ProfilePlan(model, sampler, request, [], {}, step, call)
    _plan_sites(pipe, plan, full_tokens)
    _plan_passes(pipe, plan, memory_bytes)
    return plan


def _check_tables(states_only: bool, gram: bool, full_tokens: bool) -> None:
    if states_only and not gram:
        raise SodaprofError("--states-only and --no-gram together leave nothing to measure. Give one of them.")
    if states_only and full_tokens:
        raise SodaprofError("--states-only measures no site, so there are no tokens to keep. Leave --tokens out.")


def _plan_sites(pipe: Any, plan: ProfilePlan, full_tokens: bool) -> None:
    """Sets the grids of the sites' tokens, and the stacks that are measured."""
    model, step = plan.model, plan.step
    for n, transformer in model.transformers.items():
        patch = transformer.fingerprint.get("patch", 1)
        for site in transformer.sites:
            raster = raster_of(model.shape["latent"], patch, site.tokens)
            plan.grids.append(grid_of(site.tokens, raster, full_tokens))
        if plan.measures and plan.multiplies and (stack := stack_of(pipe, n, transformer, step)):
            plan.stacks[n] = stack


def _plan_passes(pipe: Any, plan: ProfilePlan, memory_bytes: int | None) -> None:
    """Sets the plan's batch size and passes for the memory, and what they take."""
    shapes, request = plan.shapes(), plan.request
    free = _free_memory(pipe) * MEMORY_SHARE if memory_bytes is None else memory_bytes
    request["batch_size"], plan.groups = passes(shapes, request["batch_size"], free)
    plan.extra_bytes = shapes.taken(plan.groups, request["batch_size"])
    plan.host_bytes, plan.disk_bytes = shapes.host_bytes, shapes.disk_bytes
    over_plain = 1.05 if not plan.measures else 1.6 if plan.multiplies else 1.3
    plan.seconds = _seconds(pipe, plan) * request["samples"] * len(plan.groups) * over_plain


def _check_settings(steps: int, samples: int, max_interval: int, batch_size: int, seed: int) -> None:
    """Raises SodaprofError for numbers out of range."""
    limits = (
        ("steps", steps, 2, MAX_STEPS),
        ("samples", samples, 1, MAX_SAMPLES),
        ("batch-size", batch_size, 1, 2**31 - 1),
    )
    for what, value, least, most in limits:
        if not least <= value <= most:
            raise SodaprofError(f"--{what} is {value}; expected {least} to {most}.")
    longest = min(steps, MAX_INTERVAL)
    if not 2 <= max_interval <= longest:
        raise SodaprofError(f"--max-interval is {max_interval}; expected 2 to {longest} (at most the steps).")
    if seed < 0:
        raise SodaprofError(f"--seed is {seed}; expected at least 0.")
    check_seeds((seed, seed + samples - 1))


def _check_run(pipe: Any, model: Model, sampler: Sampler, step: Step, steps: int) -> None:
    """Raises UnsupportedModelError if the recorded run has steps that this release cannot profile."""
    if sampler.steps != steps:
        raise UnsupportedModelError(
            f"{sampler.class_name} runs {sampler.steps} timesteps for --steps {steps}; this release needs samplers that "
            "call the network once a step. Give another: --scheduler DPMSolverMultistepScheduler"
        )
    calls = sum(past >= 0 for t in model.transformers.values() for past in t.past(sampler.steps))
    if step.called and calls != sampler.steps:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has transformers that take turns ({', '.join(model.transformers)}), and calls {calls} in "
            f"{sampler.steps} steps; this release needs one transformer a step."
        )


def _free_memory(pipe: Any) -> float:
    device = torch.device(str(getattr(pipe, "device", "cpu")))
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _seconds(pipe: Any, plan: ProfilePlan) -> float:
    """Returns the seconds of one generation's network calls, timed on the recorded ones."""
    total = 0.0
    for name, past in plan.past.items():
        with torch.no_grad():
            for repeat in range(2):  # the first one warms up
                if repeat:
                    began = time.perf_counter()
                for called, args, kwargs in plan.step.calls:
                    if called == name:
                        pipe.components[name](*args, **kwargs)
                if getattr(pipe, "device", torch.device("cpu")).type == "cuda":
                    torch.cuda.synchronize()
        total += (time.perf_counter() - began) * sum(steps >= 0 for steps in past)
    return total
