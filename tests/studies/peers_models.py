"""The pipelines that peers are compared on: the shipped model, and a random Flux, where most peers are at home."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from sodaprof.pipelines.load import load_pipeline
from tests.zoo.zoo import drawn

TEXT, TEXT_WIDTH, POOLED = 8, 32, 16


@dataclass(frozen=True)
class Host:
    """A pipeline to compare on. make: returns a fresh one, the same weights each time."""

    make: Callable[[], Any]
    steps: int
    weights: str


class FluxPipelineOfRandomWords(FluxPipeline):
    """Flux whose prompts are random embeddings, the same for the same words. cache-dit goes by how the name begins."""

    def encode_prompt(
        self, prompt: Any, prompt_2: Any = None, device: Any = None, num_images_per_prompt: int = 1, **kwargs: Any
    ) -> Any:
        """Returns (text states, pooled states, text ids)."""
        sources = [
            torch.Generator().manual_seed(sum(p.encode())) for p in ([prompt] if isinstance(prompt, str) else prompt)
        ]
        text = torch.stack([torch.randn(TEXT, TEXT_WIDTH, generator=g) for g in sources])
        pooled = torch.stack([torch.randn(POOLED, generator=g) for g in sources])
        given = {"device": self.transformer.device, "dtype": self.transformer.dtype}
        return text.to(**given), pooled.to(**given), torch.zeros(TEXT, 3, **given)


def random_flux() -> Any:
    """Returns a Flux of 4 + 4 blocks, width 128, 64 tokens, random weights."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=4, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=1, shift_factor=0.0
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = FluxPipelineOfRandomWords(scheduler, vae.eval(), None, None, None, None, drawn(transformer))
    pipe.default_sample_size = 16
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


HOSTS = {
    "tiny-dit": Host(lambda: load_pipeline("tiny-dit"), 50, "trained, shipped with this project"),
    "random-flux": Host(random_flux, 20, "random: PSNR says how far a cache drifts, nothing about pictures"),
}
