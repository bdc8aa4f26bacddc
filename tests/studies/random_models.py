"""Pipelines with random weights at published sizes, for times that need no pictures.

    python -m tests.studies.random_models dit-s-2 OUT

writes OUT as a pipeline folder. dit-s-2: 12 layers, width 384, 256 tokens. dit-xl-2: 28 layers, width 1152, 256 tokens.
pixart-xl-2-512, pixart-xl-2-1024: PixArt-α's transformer, 1024 and 4096 tokens, behind a text encoder of one layer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel

from tests.reference.train_tiny_pixart import make_tokenizer

DIT = {"dit-s-2": (12, 6, 64), "dit-xl-2": (28, 16, 72)}  # layers, heads, width of a head
PIXART = {"pixart-xl-2-512": 64, "pixart-xl-2-1024": 128}  # sides of the latents


def tiny_vae() -> AutoencoderKL:
    """Downsamples 8-fold, as the pipelines expect."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def make_dit(name: str) -> DiTPipeline:
    layers, heads, width = DIT[name]
    transformer = DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=width, out_channels=8
    )
    return DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False), {0: "none"})


def make_pixart(name: str) -> PixArtAlphaPipeline:
    side = PIXART[name]
    transformer = PixArtTransformer2DModel(
        sample_size=side, caption_channels=4096, use_additional_conditions=side == 128
    )
    tokenizer = make_tokenizer()
    text = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=4096, d_ff=64, d_kv=64, num_heads=1, num_layers=1)
    )
    return PixArtAlphaPipeline(tokenizer, text, tiny_vae(), transformer, DPMSolverMultistepScheduler())


def write(name: str, out: Path) -> None:
    torch.manual_seed(0)
    pipe = make_dit(name) if name in DIT else make_pixart(name)
    pipe.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in (*DIT, *PIXART):
        sys.exit(f"usage: python -m tests.studies.random_models {{{','.join((*DIT, *PIXART))}}} OUT")
    write(sys.argv[1], Path(sys.argv[2]))
