"""The pipelines of the run, with random weights, made on the device; tiny ones of the same classes for a rehearsal."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.gpu.common import Settings
from tests.studies.random_models import make_dit, make_pixart, make_tokenizer, tiny_vae
from tests.tiny_pipelines import tiny_pipe


def dit(settings: Settings) -> Any:
    """Returns DiT-XL/2, 256 tokens; both guidance branches in one batch."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        pipe = tiny_pipe() if settings.rehearsal else make_dit("dit-xl-2")
    return ready(settings, pipe)


def pixart(settings: Settings, name: str) -> Any:
    """Returns PixArt-XL behind a text encoder of one layer."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        pipe = tiny_pixart() if settings.rehearsal else make_pixart(name)
    return ready(settings, pipe)


def tiny_pixart() -> PixArtAlphaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        caption_channels=32,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=16, d_kv=16, num_heads=1, num_layers=1)
    scheduler = DPMSolverMultistepScheduler()
    return PixArtAlphaPipeline(tokenizer, T5EncoderModel(config), tiny_vae(), transformer, scheduler)


def ready(settings: Settings, pipe: Any) -> Any:
    """Returns the pipeline in bf16 on the device, without dropout and progress bars."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # its numbers are kept on the CPU
    pipe.to(settings.device, torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe
