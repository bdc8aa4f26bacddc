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
from sodaprof.pipelines.patch import patched
from sodaprof.pipelines.sampler_steps import own_update
from tests.tiny_pipelines import STEPS, draw, schedule_for, tiny_pipe

RESTING = "..-.--.."  # the steps of a run: where the network is called, where not
CALLED = RESTING.count(".")
# name -> class of diffusers, settings in addition to the pipeline's own
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
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
    """Returns the schedule with the scheduler's own update, changed by at most stir / 2, and skipped steps as in `stack`.

    The pipeline's scheduler must be that of the schedule, after `set_timesteps`.
    """
    own = own_update(pipe.scheduler, pipe.scheduler.timesteps)
    wide, generator = max(history, own.history), torch.Generator().manual_seed(0)
    stack = stack or "." * schedule.steps
    called = torch.tensor([[action != "-"] for action in stack]).cumsum(0)  # outputs that exist
    rows = torch.tensor(own.padded(wide), dtype=torch.float64)
    rows = rows + stir * (torch.rand(rows.shape, generator=generator) - 0.5)
    rows = torch.where(torch.arange(1 + wide) <= called, rows, 0.0).tolist()
    plans = {}
    for name, plan in schedule.transformers.items():
        cells = {key: zip(stack, row, strict=True) for key, row in plan.rows.items()}
        row_of = {key: "".join("-" if a == "-" else cell for a, cell in row) for key, row in cells.items()}
        plans[name] = replace(plan, stack=stack, rows=row_of)
    fitted = {"guidance_scale": schedule.sampler.guidance_scale, "loop": "open"}
    return replace(schedule, transformers=plans, update=Update(own.basis, wide, rounded(rows), fitted))


def updated(pipe: Any, stack: str = "", history: int = 3, stir: float = 0.0, guidance_scale: float = 4.0) -> Schedule:
    """Returns a schedule of whole steps of one of `pipelines`' pipelines, with an update."""
    schedule = schedule_for(pipe, guidance_scale=guidance_scale)
    pipe.scheduler.set_timesteps(STEPS)
    return with_update(pipe, schedule, stack, history, stir)


def sample(pipe: Any, *args: Any, **kwargs: Any) -> np.ndarray:
    """Returns the latents that the pipeline decodes; what a stochastic sampler draws is the same each time."""
    torch.manual_seed(11)  # these pipelines pass their generator to no scheduler
    found = []
    with patched(pipe.vae, "decode", lambda decode, x: (found.append(x.float().cpu().numpy()), decode(x))[1]):
        draw(pipe, *args, **kwargs)
    return found[0]
