"""Tiny pipelines whose two transformers take turns, and schedules written by hand for them."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from msgspec.structs import replace

from sodaprof.formats.schedule import Forecast, Plan, Schedule
from sodaprof.pipelines.discover import inspect_pipeline
from tests.tiny_pipelines import tiny_pipe, tiny_vae
from tests.zoo.zoo import WAN

STEPS, BOUNDARY = 11, 0.55
HIGH, LOW = tuple(range(5)), tuple(range(5, 11))  # the steps of the two transformers
NAMES = ("transformer", "transformer_2")


class SmallWan(WanPipeline):
    """WanPipeline at a tiny size; random embeddings in place of a text encoder."""

    def encode_prompt(self, prompt=None, **given):
        of = lambda seed: torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))  # noqa: E731
        empty = torch.stack([of(99) for _ in prompt])
        return torch.stack([of(len(p)) for p in prompt]), empty if given["do_classifier_free_guidance"] else None

    def __call__(self, prompt, **arguments):
        return super().__call__(prompt, height=64, width=64, num_frames=5, **arguments | {"output_type": "latent"})


def small_wan():
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(WanTransformer3DModel(**WAN).eval())
    pipe = SmallWan(None, None, None, FlowMatchEulerDiscreteScheduler(), *networks, boundary_ratio=BOUNDARY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a cat", steps=STEPS, scale=5.0, seed=0):
    """Returns the latents [1, C, F, H, W] of the pipeline's own call."""
    generator = torch.Generator().manual_seed(seed)
    return pipe([prompt], guidance_scale=scale, num_inference_steps=steps, generator=[generator]).frames


class TurnsPipeline(DiTPipeline):
    """DiT with two transformers. turns: their steps; halves: of each, whether both guidance branches share a batch.

    skipped: steps without a call; doubled: steps at which the first one is called, too.
    """

    def __init__(self, transformer, vae, scheduler, transformer_2):
        super().__init__(transformer, vae, scheduler, {i: f"class {i}" for i in range(10)})
        self.register_modules(transformer_2=transformer_2)
        self.turns, self.halves, self.skipped, self.doubled = (HIGH, LOW), (True, True), (), ()

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=4.0, generator=None, num_inference_steps=50, output_type="np"):
        n = len(class_labels)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator])
        labels, null = torch.tensor(class_labels), torch.full((n,), 1000)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            second = step not in self.turns[0]
            network, both = self.transformer_2 if second else self.transformer, torch.cat([labels, null])
            if step in self.doubled:
                self.transformer(torch.cat([x, x]), timestep=t.expand(2 * n), class_labels=both)
            if step in self.skipped:
                cond = uncond = x
            elif self.halves[second]:
                out = network(torch.cat([x, x]), timestep=t.expand(2 * n), class_labels=both).sample
                cond, uncond = out.chunk(2)
            else:
                cond, uncond = (network(x, timestep=t.expand(n), class_labels=c).sample for c in (labels, null))
            x = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
        return type("Out", (), {"images": self.vae.decode(x).sample.permute(0, 2, 3, 1).numpy()})()


def turns_pipe(halves=True, turns=(HIGH, LOW)):
    networks = [tiny_pipe(seed=seed).transformer for seed in (0, 1)]
    pipe = TurnsPipeline(networks[0], tiny_vae(), DDIMScheduler(clip_sample=False), networks[1])
    pipe.halves, pipe.turns = (halves, halves), turns
    return pipe


def paint(pipe, labels=(1, 2)):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    return pipe(list(labels), generator=generators, num_inference_steps=STEPS).images


def schedule_of(pipe, high="CCCCC", low="CCCCCC", scale=5.0, **changes) -> Schedule:
    """Returns the schedule with one row for all sites of each transformer; changes: fields of transformer_2's plan."""
    model, sampler, _ = inspect_pipeline(pipe, "tiny", STEPS, scale)
    plans = {}
    for (name, t), row in zip(model.transformers.items(), (high + "_" * 6, "_" * 5 + low), strict=True):
        stack = "".join(a if a in "_" else "." for a in row)
        plans[name] = Plan(t.class_name, t.fingerprint, dict.fromkeys((s.key for s in t.sites), row), stack)
    plans["transformer_2"] = replace(plans["transformer_2"], **changes)
    return Schedule(plans, sampler, model.shape, {"name": "test", "knobs": {}})


def mixed(pipe, scale=5.0) -> Schedule:
    """Returns a schedule of C, R and F; the two transformers differ."""
    forecasts = (Forecast((6, 5), (1.5, -0.5)), Forecast((8,), (1.0,)))
    schedule = schedule_of(pipe, "CRRCR", "CCFCRF", scale)
    second = schedule.transformers["transformer_2"]
    second = replace(second, forecasts=dict.fromkeys(second.rows, forecasts))
    return replace(schedule, transformers=schedule.transformers | {"transformer_2": second})
