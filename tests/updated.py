"""Schedules with updates, drawn by hand for tiny pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from msgspec.structs import replace

from sodaprof.formats.sampler import rounded
from sodaprof.formats.schedule import Schedule, Update
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.pipelines.sampler_steps import own_update
from tests.tiny_pipelines import STEPS, draw, schedule_for, tiny_pipe

RESTING = "..-.--.."  # the steps of a run: where the network is called, where not
CALLED = RESTING.count(".")
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class of diffusers, settings beside the pipeline's own
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}


def set_sampler(pipe: Any, name: str) -> None:
    """Puts another scheduler on the pipeline, with the settings of its own."""
    if name == "rectified":
        pipe.scheduler = RectifiedFlowScheduler(use_timestep_transform=False)
    else:
        cls, more = SAMPLERS[name]
        pipe.scheduler = getattr(diffusers, cls).from_config(dict(pipe.scheduler.config), **more)


def pipe_of(cls: type = diffusers.DiTPipeline, sampler: str = "ddim", layers: int = 2) -> Any:
    """Returns a tiny pipeline with this scheduler."""
    pipe = tiny_pipe(layers, cls=cls)
    set_sampler(pipe, sampler)
    return pipe


def apart(found: Any, wanted: Any) -> float:
    """Returns the largest difference, relative to the largest element."""
    return float(abs(found - wanted).max() / abs(wanted).max())


def with_update(pipe: Any, schedule: Schedule, stack: str = "", history: int = 3, stir: float = 0.0) -> Schedule:
    """Returns the schedule with the scheduler's own update, or one up to `stir` beside it, and with - where stack has it.

    The pipeline's scheduler is to be the one of the schedule, after `set_timesteps`.
    """
    own = own_update(pipe.scheduler, pipe.scheduler.timesteps)
    wide, generator = max(history, own.history), torch.Generator().manual_seed(0)
    stack = stack or "." * schedule.steps
    rows, called = [list(row) for row in own.padded(wide)], 0
    for row, action in zip(rows, stack, strict=True):
        called += action != "-"
        noise = torch.rand(len(row), generator=generator).tolist()
        for j, value in enumerate(row):
            row[j] = (value + stir * (noise[j] - 0.5)) if j <= called else 0.0
    plans = {
        name: replace(
            plan,
            stack=stack,
            rows={key: "".join("-" if a == "-" else c for a, c in zip(stack, row, strict=True))
                  for key, row in plan.rows.items()},
        )
        for name, plan in schedule.transformers.items()
    }  # fmt: skip
    fitted = {"guidance_scale": schedule.sampler.guidance_scale, "loop": "open"}
    return replace(schedule, transformers=plans, update=Update(own.basis, wide, rounded(rows), fitted))


def updated(pipe: Any, stack: str = "", history: int = 3, stir: float = 0.0, guidance_scale: float = 4.0) -> Schedule:
    """Returns a schedule of whole steps of one of `pipelines`' pipelines, with an update."""
    schedule = schedule_for(pipe, guidance_scale=guidance_scale)
    pipe.scheduler.set_timesteps(STEPS)
    return with_update(pipe, schedule, stack, history, stir)


def sample(pipe: Any, *args: Any, **kwargs: Any) -> np.ndarray:
    """Returns the latents that the pipeline decodes; what a stochastic sampler draws is the same each time."""
    torch.manual_seed(11)  # these pipelines hand their generator to nobody
    found, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda x: (found.append(x.float().numpy()), decode(x))[1]
    try:
        draw(pipe, *args, **kwargs)
    finally:
        del pipe.vae.decode
    return found[0]
