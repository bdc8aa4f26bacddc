"""What `sodaprof inspect` writes for the published models of the literature, from their shapes alone: no weights.

    python -m tests.studies.published OUT

The networks are built on the meta device. OUT/MODEL holds model.json, sampler.json and cost.flops.json, which is all
that the policies fora, toca and duca need.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtTransformer2DModel,
)
from diffusers.utils import logging

from sodaprof.formats.cost import save_cost
from sodaprof.formats.profile import write_inspection
from sodaprof.formats.sites import Guidance, Model, Sampler
from sodaprof.opensora.network import STDiT3
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.pipelines.discover import config_of, find_sites
from sodaprof.pipelines.flops import count_flops
from sodaprof.pipelines.recording import Step

DIFFUSION = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
VIDEO = {"height": 480, "width": 854, "num_frames": 51}  # Open-Sora's 480p, 9:16: latents [4, 15, 60, 106]


def dit_xl_2_256() -> tuple[torch.nn.Module, dict[str, Any]]:
    return DiTTransformer2DModel(), {
        "hidden_states": torch.zeros(2, 4, 32, 32),
        "timestep": torch.zeros(2, dtype=torch.int64),
        "class_labels": torch.zeros(2, dtype=torch.int64),
    }


def pixart_xl_2_256() -> tuple[torch.nn.Module, dict[str, Any]]:
    network = PixArtTransformer2DModel(sample_size=32, caption_channels=4096, use_additional_conditions=False)
    return network, {
        "hidden_states": torch.zeros(2, 4, 32, 32),
        "encoder_hidden_states": torch.zeros(2, 120, 4096),
        "encoder_attention_mask": torch.zeros(2, 120),
        "timestep": torch.zeros(2, dtype=torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def stdit3_xl_2_480p() -> tuple[torch.nn.Module, dict[str, Any]]:
    return STDiT3(), {
        "hidden_states": torch.zeros(2, 4, 15, 60, 106),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 1, 300, 4096),
        "encoder_attention_mask": None,
        "fps": 24.0,
        "height": 480.0,
        "width": 854.0,
    }


def timesteps_of(scheduler: Any, steps: int, **size: Any) -> tuple[float, ...]:
    scheduler.set_timesteps(steps, **size)
    return tuple(scheduler.timesteps.tolist())


# name -> network and a call of it, dtype, scheduler, steps, guidance scale, further arguments of set_timesteps
Entry = tuple[Callable[[], tuple[torch.nn.Module, dict[str, Any]]], torch.dtype, Any, int, float, dict[str, Any]]
MODELS: dict[str, Entry] = {
    "dit-xl-2-256-ddim-50": (dit_xl_2_256, torch.float32, DDIMScheduler(**DIFFUSION, clip_sample=False), 50, 1.5, {}),
    "dit-xl-2-256-ddpm-250": (
        dit_xl_2_256, torch.float32,
        DDPMScheduler(**DIFFUSION, clip_sample=False, variance_type="learned_range"), 250, 1.5, {},
    ),
    "pixart-xl-2-256-dpm-20": (
        pixart_xl_2_256, torch.float16, DPMSolverMultistepScheduler(**DIFFUSION), 20, 4.5, {}
    ),
    "open-sora-v1.2-480p-51f-rflow-30": (
        stdit3_xl_2_480p, torch.bfloat16, RectifiedFlowScheduler(size_dtype="bfloat16"), 30, 7.0, VIDEO
    ),
}  # fmt: skip


def published(name: str) -> tuple[Model, Sampler, Step, Any]:
    """Returns model, sampler, one call of the network, and what holds that, for one of MODELS."""
    build, dtype, scheduler, steps, scale, size = MODELS[name]
    with torch.device("meta"):
        network, call = build()
    network = network.to(dtype).eval()
    call = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    pipe = SimpleNamespace(components={"transformer": network})
    latents = tuple(call["hidden_states"].shape)
    step = Step([("transformer", (), call)], timesteps_of(scheduler, steps, **size), (1, *latents[1:]))
    with torch.no_grad():
        found = find_sites(pipe, "transformer", step)
    shape = {
        "latent": list(latents[1:]), "tokens": max(s.tokens for s in found.sites), "batch_profiled": 1,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    model = Model(name, "", {"transformer": found}, shape)
    guidance = Guidance("halves", scale)
    return model, Sampler(type(scheduler).__name__, config_of(scheduler), step.timesteps, guidance), step, pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    logging.set_verbosity_error()
    for name in MODELS:
        model, sampler, step, pipe = published(name)
        folder = parser.parse_args().out / name
        write_inspection(folder, model, sampler)
        save_cost(count_flops(pipe, model, step), folder / "cost.flops.json", force=True)
        print(folder)


if __name__ == "__main__":
    main()
