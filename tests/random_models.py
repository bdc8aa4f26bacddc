"""Pipelines with random weights at published sizes, for times that need no pictures.

    python -m tests.random_models dit-s-2 OUT

writes OUT as a pipeline folder. dit-s-2: 12 layers, width 384, 256 tokens. dit-xl-2: 28 layers, width 1152, 256 tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

SIZES = {"dit-s-2": (12, 6, 64), "dit-xl-2": (28, 16, 72)}  # layers, heads, width of a head


def write(name: str, out: Path) -> None:
    layers, heads, width = SIZES[name]
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=width, out_channels=8
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False), {0: "none"})
    pipe.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SIZES:
        sys.exit(f"usage: python -m tests.random_models {{{','.join(SIZES)}}} OUT")
    write(sys.argv[1], Path(sys.argv[2]))
