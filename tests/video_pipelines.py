"""A tiny Open-Sora pipeline with random weights, made in memory."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from sodaprof.opensora.autoencoder import AutoencoderKLOpenSora
from sodaprof.opensora.network import STDiT3
from sodaprof.opensora.pipeline import OpenSoraPipeline
from sodaprof.opensora.scheduler import RectifiedFlowScheduler

VOCABULARY = "<pad> </s> <unk> a red blue disk square moves left right up down aesthetic motion score : 6 5 ."
WORDS = VOCABULARY.split()
LENGTH = 12  # text tokens
VAE = {
    "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "filters": 4,
    "channel_multipliers": (1, 1, 1), "num_res_blocks": 1, "temporal_downsample": (True, True), "num_groups": 2,
}  # fmt: skip
NETWORK = {
    "input_sq_size": 16, "hidden_size": 16, "depth": 2, "num_heads": 2, "caption_channels": 12,
    "model_max_length": LENGTH,
}  # fmt: skip


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark, an end token behind the text."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def tiny_video_pipe(seed: int = 0, transform: bool = True, clean_caption: bool = False) -> OpenSoraPipeline:
    """17 frames of 16 × 24 pixels: latents [4, 5, 8, 12], 24 tokens a frame."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(WORDS), "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    pipe = OpenSoraPipeline(
        word_tokenizer(), encoder.eval(), STDiT3(**NETWORK).eval(), AutoencoderKLOpenSora(**VAE).eval(),
        RectifiedFlowScheduler(use_timestep_transform=transform), height=16, width=24, num_frames=17,
        clean_caption=clean_caption,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts=("a red disk moves left", "a blue square moves up"), steps=6, seed=0, **options):
    """The pipeline's own call, a generator a prompt; frames as an array."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(list(prompts), generator=generators, num_inference_steps=steps, **options).frames
