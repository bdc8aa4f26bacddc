"""A tiny FLUX pipeline, whose single blocks end in a Linear that is a site, and a schedule with all actions on these sites."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from sodaprof.formats.schedule import Forecast, Plan, Schedule, TokenRule
from sodaprof.pipelines.discover import inspect_pipeline

STEPS = 6
ENDS = tuple(f"single_transformer_blocks.{layer}.proj_out" for layer in (0, 1))


def flux_pipe() -> Any:
    torch.manual_seed(0)
    network = diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    ).eval()  # fmt: skip
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_call(pipe: Any) -> Any:
    """Returns the pipeline's call with prompt embeddings, as `profile` takes it."""

    def call(entries: Any, generators: Any) -> torch.Tensor:
        texts = torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(int(e))) for e in entries])
        return pipe(
            prompt_embeds=texts, pooled_prompt_embeds=texts[:, 0, :8], height=64, width=64, generator=generators,
            num_inference_steps=STEPS, output_type="latent", return_dict=False,
        )[0]  # fmt: skip

    return call


def draw(pipe: Any) -> torch.Tensor:
    return flux_call(pipe)([7], [torch.Generator().manual_seed(7)])


def draw_rows(pipe: Any, change: Any = None, after: int = 0, count: int = 3) -> torch.Tensor:
    """Draws a batch; change: what a callback does to the latents after a step."""
    texts = torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(n)) for n in range(count)])

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return given | {"latents": change(given["latents"])} if change and step == after else given

    return pipe(
        prompt_embeds=texts, pooled_prompt_embeds=texts[:, 0, :8], height=64, width=64, num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(n) for n in range(count)], callback_on_step_end=callback,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip


def flux_schedule(pipe: Any) -> Schedule:
    """All four actions on the last Linear of the single blocks, C everywhere else."""
    model, sampler, _ = inspect_pipeline(pipe, "tiny", STEPS, own=flux_call(pipe))
    network = model.transformers["transformer"]
    rows = {site.key: "C" * STEPS for site in network.sites} | dict(zip(ENDS, ("CRFCPC", "CPRCFC"), strict=True))
    forecasts = {ENDS[0]: (Forecast((0,), (1.1,)),), ENDS[1]: (Forecast((3, 0), (1.5, -0.5)),)}
    plan = Plan(network.class_name, network.fingerprint, rows, "." * STEPS, {ENDS[0]: (4,), ENDS[1]: (6,)}, forecasts)
    how = {"name": "test", "knobs": {}}
    return Schedule({"transformer": plan}, sampler, model.shape, how, token_rule=TokenRule("feature_mean"))
