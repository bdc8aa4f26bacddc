"""Tiny random instances of diffusers' transformer classes, and of this project's own STDiT3, each with one call of it.

Batch 2 as both guidance halves hold it: the same latents twice, each half with its own text. Two layers a stack or more,
8 to 64 tokens, widths up to 64, fp32. Nothing is downloaded; one seed makes one instance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from torch import Tensor, nn

from sodaprof.opensora.network import STDiT3 as OpenSora

Made = tuple[nn.Module, dict[str, Any]]
ZOO: dict[str, Callable[[], Made]] = {}

HEADS, HEAD, WIDTH = 2, 16, 32
TEXT, TEXT_WIDTH = 5, 12

# Names of arguments by what they hold. In a tuple or list, each tensor is meant.
LATENTS = ("hidden_states", "audio_hidden_states", "x")
TIMES = ("timestep", "timesteps", "t", "timestep_r", "r_timestep", "vision_timesteps")
CONDITIONS = (
    "class_labels", "encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_t5",
    "encoder_hidden_states_llama3", "audio_encoder_hidden_states", "text_encoder_layers", "cap_feats", "text_bth",
    "pooled_projections", "pooled_embeds", "input_ids", "global_hidden_states", "proj_embedding",
)  # fmt: skip

# ---- what a call is made of -------------------------------------------------------------------------------------------


def at(kwargs: dict[str, Any], seed: int, halves: bool = True) -> dict[str, Any]:
    """Returns the call with fresh latents, the same in both halves (or not), and with another timestep."""
    source = torch.Generator().manual_seed(seed)
    factor = 0.3 + 0.6 * torch.rand((), generator=source)

    def latents(x: Tensor) -> Tensor:
        fresh = torch.randn(x.shape, generator=source)
        return torch.cat((fresh[:1], fresh[:1])) if halves else fresh

    changed: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in LATENTS:
            if isinstance(value, list):  # one tensor a sample
                fresh = [torch.randn(v.shape, generator=source) for v in value]
                changed[name] = [fresh[0]] * len(fresh) if halves else fresh
            else:
                changed[name] = latents(value)
        elif name in TIMES and torch.is_tensor(value):
            changed[name] = (value * factor).to(value.dtype)
    return {**kwargs, **changed}


def other(kwargs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns the call with other text, or other classes: what another guidance branch is called with."""
    source = torch.Generator().manual_seed(seed)

    def fresh(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(fresh(v) for v in value)
        if not torch.is_tensor(value):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=source)
        return (value.flip(-1) - 1).abs()

    return {name: fresh(value) if name in CONDITIONS else value for name, value in kwargs.items()}


def given(**kwargs: Any) -> dict[str, Any]:
    """Returns its arguments, so that the calls below read as calls."""
    return kwargs


def halves(*size: int) -> Tensor:
    """Returns random latents [2, *size], the same twice."""
    x = torch.randn(1, *size)
    return torch.cat((x, x))


def text(tokens: int = TEXT, width: int = TEXT_WIDTH) -> Tensor:
    """Returns random states [2, tokens, width] of text."""
    return torch.randn(2, tokens, width)


def mask(tokens: int = TEXT, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns a mask [2, tokens] of text: the second half's is shorter by two tokens."""
    return (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 2]])).to(dtype)


def time(value: float = 700.0) -> Tensor:
    """Returns a timestep [2], int64 where it is given as an int."""
    return torch.tensor([value, value])


def places(*sides: int, axes: int = 3) -> Tensor:
    """Returns the coordinates [N, axes] of a raster's tokens; its sides are the last axes, the others 0."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in sides), indexing="ij"), -1).flatten(0, -2).float()
    return torch.cat((torch.zeros(len(grid), axes - len(sides)), grid), -1)


def turns(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns random cosines and sines [tokens, width] of a rotary embedding, the same for both numbers of a pair."""
    angle = torch.rand(tokens, width // 2).repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


@torch.no_grad()
def drawn(module: nn.Module) -> nn.Module:
    """Returns the module in eval mode with all matrices drawn anew: many are 0 at first, or left as memory was."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and parameter.numel():
            parameter.normal_(0, (parameter.numel() / parameter.shape[0]) ** -0.5)
        elif not parameter.isfinite().all() or not parameter.any():
            parameter.normal_(0, 0.02)
    return module.float().eval()


def member(make: Callable[[type], Made]) -> Callable[[], Made]:
    """Enters a class of diffusers under the name of the function, which is called with the class."""

    def entry() -> Made:
        torch.manual_seed(0)
        module, kwargs = make(OpenSora if make.__name__ == "STDiT3" else getattr(diffusers, make.__name__))
        return drawn(module), kwargs

    ZOO[make.__name__] = entry
    return entry


# ---- one stream -------------------------------------------------------------------------------------------------------


@member
def DiTTransformer2DModel(cls: Any) -> Made:
    module = cls(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return module, given(hidden_states=halves(4, 8, 8), timestep=time(700), class_labels=torch.tensor([3, 10]))


@member
def PixArtTransformer2DModel(cls: Any) -> Made:
    module = cls(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=WIDTH, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 8, 8), encoder_hidden_states=text(), timestep=time(700), encoder_attention_mask=mask(),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip


@member
def LatteTransformer3DModel(cls: Any) -> Made:
    module = cls(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=WIDTH, caption_channels=TEXT_WIDTH, video_length=2, attention_bias=True,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )  # fmt: skip
    return module, given(hidden_states=halves(4, 2, 8, 8), timestep=time(700), encoder_hidden_states=text())


@member
def AllegroTransformer3DModel(cls: Any) -> Made:
    module = cls(
        num_attention_heads=HEADS, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_height=8, sample_width=8, sample_frames=2, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    *freqs, t, h, w = embeddings.get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 2)
    grids = torch.cartesian_prod(t, h, w).long().T[:, None]
    return module, given(
        hidden_states=halves(4, 2, 8, 8), encoder_hidden_states=text(), timestep=time(700),
        attention_mask=torch.ones(2, 2, 8, 8), encoder_attention_mask=mask(), image_rotary_emb=(freqs, grids),
    )  # fmt: skip


@member
def HunyuanDiT2DModel(cls: Any) -> Made:
    module = cls(  # skips from its first half to its second: there are none below 4 layers
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, patch_size=2, sample_size=8, num_layers=4,
        hidden_size=WIDTH, cross_attention_dim=8, cross_attention_dim_t5=16, pooled_projection_dim=8,
        text_len=TEXT, text_len_t5=TEXT,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 8, 8), timestep=time(), encoder_hidden_states=text(width=8), text_embedding_mask=mask(),
        encoder_hidden_states_t5=text(width=16), text_embedding_mask_t5=mask(), image_meta_size=torch.rand(2, 6),
        style=torch.zeros(2, dtype=torch.int64), image_rotary_emb=turns(16, HEAD),
    )  # fmt: skip


@member
def SanaTransformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2,
        num_cross_attention_heads=HEADS, cross_attention_head_dim=HEAD, cross_attention_dim=WIDTH, sample_size=4,
        caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 4, 4), encoder_hidden_states=text(), timestep=time(), encoder_attention_mask=mask()
    )


@member
def SanaVideoTransformer3DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=HEADS, cross_attention_head_dim=12, cross_attention_dim=24, sample_size=4,
        caption_channels=TEXT_WIDTH, rope_max_seq_len=32,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 2, 8, 8), encoder_hidden_states=text(), timestep=time(), encoder_attention_mask=mask()
    )


@member
def LTXVideoTransformer3DModel(cls: Any) -> Made:
    module = cls(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=HEAD, cross_attention_dim=WIDTH,
        num_layers=2, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(2 * 4 * 4, 8), encoder_hidden_states=text(), timestep=time(),
        encoder_attention_mask=mask(), num_frames=2, height=4, width=4,
    )  # fmt: skip


WAN = {
    "num_attention_heads": HEADS, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH,
    "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip


def wan_call(frames: int = 2) -> dict[str, Any]:
    return given(hidden_states=halves(4, frames, 8, 8), timestep=time(), encoder_hidden_states=text())


@member
def WanTransformer3DModel(cls: Any) -> Made:
    return cls(**WAN), wan_call()


@member
def WanVACETransformer3DModel(cls: Any) -> Made:
    control = given(control_hidden_states=halves(6, 2, 8, 8), control_hidden_states_scale=torch.ones(2))
    return cls(**WAN, vace_layers=[0, 1], vace_in_channels=6), wan_call() | control


@member
def ChronoEditTransformer3DModel(cls: Any) -> Made:
    module = cls(**WAN, image_dim=10, added_kv_proj_dim=24, rope_temporal_skip_len=4)
    return module, wan_call() | given(encoder_hidden_states_image=text(6, 10))


@member
def WanAnimateTransformer3DModel(cls: Any) -> Made:
    module = cls(
        **WAN | {"in_channels": 12}, latent_channels=4, image_dim=10, added_kv_proj_dim=24, inject_face_latents_blocks=2,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=16, face_encoder_num_heads=HEADS,
    )  # fmt: skip
    return module, wan_call() | given(
        hidden_states=halves(12, 2, 8, 8), encoder_hidden_states_image=text(6, 10),
        pose_hidden_states=halves(4, 1, 8, 8), face_pixel_values=halves(3, 4, 16, 16),
    )  # fmt: skip


@member
def SkyReelsV2Transformer3DModel(cls: Any) -> Made:
    return cls(**WAN), wan_call()


@member
def AnyFlowTransformer3DModel(cls: Any) -> Made:
    times = torch.full((2, 2), 700.0)  # one a frame
    return cls(**WAN), wan_call() | given(hidden_states=halves(2, 4, 8, 8), timestep=times, r_timestep=times - 200)


@member
def HeliosTransformer3DModel(cls: Any) -> Made:
    module = cls(**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, rope_dim=(4, 4, 4))
    history = {"short": (2, (0, 1)), "mid": (2, (2, 3)), "long": (4, (4, 5, 6, 7))}
    call = wan_call() | given(timestep=time(700), indices_hidden_states=torch.tensor([[8, 9]] * 2))
    for name, (frames, indices) in history.items():
        call[f"latents_history_{name}"] = halves(4, frames, 8, 8)
        call[f"indices_latents_history_{name}"] = torch.tensor([indices] * 2)
    return module, call


@member
def CosmosTransformer3DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2,
        text_embed_dim=TEXT_WIDTH, adaln_lora_dim=4, max_size=(4, 16, 16), concat_padding_mask=False,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 2, 8, 8), timestep=time(), encoder_hidden_states=text(), fps=16,
        attention_mask=mask(dtype=torch.bool),
    )  # fmt: skip


@member
def StableAudioDiTModel(cls: Any) -> Made:
    module = cls(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=HEAD, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 16), timestep=time(0.7), encoder_hidden_states=text(),
        global_hidden_states=text(1, 8), rotary_embedding=turns(17, HEAD // 2),
    )  # fmt: skip


@member
def StableAudio3DiTModel(cls: Any) -> Made:
    module = cls(
        io_channels=4, embed_dim=WIDTH, depth=2, num_heads=HEADS, cond_token_dim=TEXT_WIDTH, global_cond_dim=8,
        local_add_cond_dim=5, timestep_features_dim=8, num_memory_tokens=3,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 16), timestep=time(0.7), encoder_hidden_states=text(),
        global_hidden_states=torch.randn(2, 8), encoder_attention_mask=mask(), local_add_cond=halves(5, 16),
    )  # fmt: skip


@member
def LongCatAudioDiTTransformer(cls: Any) -> Made:
    module = cls(dit_dim=WIDTH, dit_depth=2, dit_heads=HEADS, dit_text_dim=TEXT_WIDTH, latent_dim=4)
    return module, given(
        hidden_states=halves(16, 4), encoder_hidden_states=text(), encoder_attention_mask=mask(dtype=torch.bool),
        timestep=time(0.7), attention_mask=torch.ones(2, 16, dtype=torch.bool), latent_cond=halves(16, 4),
    )  # fmt: skip


@member
def AceStepTransformer1DModel(cls: Any) -> Made:
    module = cls(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=1,
        head_dim=HEAD, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4, encoder_hidden_size=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(32, 4), timestep=time(0.7), timestep_r=time(0.5), encoder_hidden_states=text(),
        context_latents=halves(32, 8),
    )  # fmt: skip


@member
def MiniMaxMusic3Transformer1DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, condition_dim=TEXT_WIDTH, num_layers=2, num_attention_heads=HEADS, attention_head_dim=HEAD,
        ff_inner_dim=48, rotary_dim=8, fourier_embedding_dim=8,
    )  # fmt: skip
    return module, given(hidden_states=halves(4, 16), timestep=time(0.7), encoder_hidden_states=text(16))


@member
def Lumina2Transformer2DModel(cls: Any) -> Made:
    module = cls(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=HEADS, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(32, 32, 32), cap_feat_dim=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 8, 8), timestep=time(0.7), encoder_hidden_states=text(),
        encoder_attention_mask=mask(dtype=torch.bool),
    )  # fmt: skip


@member
def LuminaNextDiT2DModel(cls: Any) -> Made:
    module = cls(
        sample_size=8, in_channels=4, hidden_size=WIDTH, num_layers=2, num_attention_heads=HEADS, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 8, 8), timestep=time(0.7), encoder_hidden_states=text(),
        encoder_mask=mask(), image_rotary_emb=embeddings.get_2d_rotary_pos_embed_lumina(HEAD, 16, 16),
        cross_attention_kwargs={},
    )  # fmt: skip


@member
def ZImageTransformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, dim=24, n_layers=2, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 4, 4], axes_lens=[64, 32, 32],
    )  # fmt: skip
    latents = torch.randn(4, 1, 8, 8)
    return module, given(x=[latents, latents], t=time(0.7), cap_feats=list(text()))


@member
def OmniGenTransformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, intermediate_size=48,
        num_layers=2, pad_token_id=0, vocab_size=50, max_position_embeddings=64, original_max_position_embeddings=32,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}, pos_embed_max_size=8, time_step_dim=16,
    )  # fmt: skip
    tokens = TEXT + 1 + 16
    return module, given(
        hidden_states=halves(4, 8, 8), timestep=time(0.7), input_ids=torch.randint(1, 40, (2, TEXT)),
        input_img_latents=[], input_image_sizes={}, attention_mask=torch.ones(2, tokens, tokens),
        position_ids=torch.arange(tokens).expand(2, -1),
    )  # fmt: skip


@member
def PRXTransformer2DModel(cls: Any) -> Made:
    module = cls(in_channels=4, context_in_dim=TEXT_WIDTH, hidden_size=WIDTH, num_heads=HEADS, depth=2, axes_dim=[8, 8])
    return module, given(
        hidden_states=halves(4, 8, 8), timestep=time(0.7), encoder_hidden_states=text(),
        attention_mask=mask(dtype=torch.bool),
    )  # fmt: skip


@member
def Kandinsky5Transformer3DModel(cls: Any) -> Made:
    module = cls(
        in_visual_dim=4, in_text_dim=TEXT_WIDTH, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=24, ff_dim=48,
        num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 4, 4),
    )  # fmt: skip
    return module, given(
        hidden_states=halves(2, 8, 8, 4), encoder_hidden_states=text(), timestep=time(),
        pooled_projections=torch.randn(2, 8), visual_rope_pos=[torch.arange(n) for n in (2, 4, 4)],
        text_rope_pos=torch.arange(TEXT),
    )  # fmt: skip


@member
def Kandinsky6Transformer3DModel(cls: Any) -> Made:
    module = cls(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=TEXT_WIDTH, in_text_dim2=8, time_dim=16, model_dim=24, ff_dim=48,
        num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 4, 4), in_audio_dim=6, out_audio_dim=6,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(2, 8, 8, 9), encoder_hidden_states=text(), timestep=time(),
        pooled_projections=torch.randn(2, 8), audio_hidden_states=halves(6, 6),
    )  # fmt: skip


@member
def Krea2Transformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=8, num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS, num_key_value_heads=1,
        intermediate_size=48, timestep_embed_dim=8, text_hidden_dim=TEXT_WIDTH, num_text_layers=3,
        text_num_attention_heads=HEADS, text_num_key_value_heads=1, text_intermediate_size=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return module, given(
        hidden_states=halves(16, 8), encoder_hidden_states=torch.randn(2, TEXT, 3, TEXT_WIDTH), timestep=time(0.7),
        position_ids=torch.cat((torch.zeros(TEXT, 3), places(4, 4))), encoder_attention_mask=mask(dtype=torch.bool),
    )  # fmt: skip


@member
def Ideogram4Transformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=8, num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS, intermediate_size=48,
        adaln_dim=8, llm_features_dim=TEXT_WIDTH, mrope_section=(4, 2, 2),
    )  # fmt: skip
    # text stands before the image in one sequence; 3 marks text, 2 the image
    ids = torch.cat((places(TEXT), places(4, 4))).long()
    return module, given(
        hidden_states=halves(TEXT + 16, 8), timestep=time(0.7), encoder_hidden_states=text(TEXT + 16),
        position_ids=ids.expand(2, -1, -1), segment_ids=torch.ones(2, TEXT + 16, dtype=torch.int64),
        indicator=torch.tensor([[3] * TEXT + [2] * 16] * 2),
    )  # fmt: skip


@member
def ErnieImageTransformer2DModel(cls: Any) -> Made:
    module = cls(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_layers=2, ffn_hidden_size=48, in_channels=4, out_channels=4,
        text_in_dim=TEXT_WIDTH, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 4, 4), timestep=time(), text_bth=text(), text_lens=torch.tensor([TEXT, TEXT - 2])
    )


@member
def NucleusMoEImageTransformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=8, out_channels=2, num_layers=5, attention_head_dim=32, num_attention_heads=HEADS,
        num_key_value_heads=1, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(8, 12, 12), num_experts=4,
        moe_intermediate_dim=16, capacity_factors=2.0,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(16, 8), img_shapes=[(1, 4, 4)] * 2, encoder_hidden_states=text(),
        encoder_hidden_states_mask=mask(dtype=torch.bool), timestep=time(0.7),
    )  # fmt: skip


@member
def QwenImage21Transformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS,
        context_in_dim=TEXT_WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return module, given(  # the mask has one entry for a token of text, and for 2 x 2 tokens of the image
        hidden_states=halves(16, 8), encoder_hidden_states=text(), encoder_hidden_states_mask=mask(dtype=torch.bool),
        timestep=time(0.7), img_shapes=[[(1, 4, 4)]] * 2, img_mask=torch.tensor([[False] * TEXT + [True] * 4] * 2),
    )  # fmt: skip


@member
def MiniMaxH3Transformer3DModel(cls: Any) -> Made:
    module = cls(
        num_attention_heads=HEADS, attention_head_dim=HEAD, hidden_size=24, num_layers=2, ffn_dim=48, in_channels=4,
        audio_in_channels=6, text_dim=TEXT_WIDTH, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=8,
        rope_freq_dim=2,
    )  # fmt: skip
    sizes = (TEXT, 16, 4)  # text, video and audio in one sequence
    ids = torch.cat([places(TEXT), places(4, 4), places(4)])
    first, second, third = torch.arange(sum(sizes)).split(sizes)
    return module, given(
        hidden_states=halves(16, 16), audio_hidden_states=halves(4, 6), encoder_hidden_states=text(),
        timestep=time(), timestep_indices=torch.zeros(len(ids), dtype=torch.int64), position_ids=ids,
        token_tags=torch.arange(3).repeat_interleave(torch.tensor(sizes)), text_indices=first, video_indices=second,
        audio_indices=third,
    )  # fmt: skip


@member
def BriaFibo2Transformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, dim=24, n_layers=2, n_refiner_layers=2, n_heads=HEADS, cap_feat_dim=TEXT_WIDTH,
        injection_layer_ids=(1,), min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=4,
        gist_max_text_len=16, axes_dims=(4, 4, 4), axes_lens=(64, 32, 32),
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 8, 8), timestep=time(0.7), encoder_hidden_states=torch.randn(2, 2, TEXT, TEXT_WIDTH),
        encoder_attention_mask=mask(dtype=torch.bool),
    )  # fmt: skip


@member
def PriorTransformer(cls: Any) -> Made:
    module = cls(
        num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2, embedding_dim=TEXT_WIDTH, num_embeddings=TEXT
    )
    return module, given(
        hidden_states=halves(TEXT_WIDTH), timestep=time(700), proj_embedding=torch.randn(2, TEXT_WIDTH),
        encoder_hidden_states=text(), attention_mask=mask(dtype=torch.bool),
    )  # fmt: skip


@member
def STDiT3(cls: Any) -> Made:
    module = cls(
        hidden_size=WIDTH, num_heads=HEADS, depth=2, caption_channels=TEXT_WIDTH, model_max_length=TEXT, qk_norm=True
    )
    return module, given(
        hidden_states=halves(4, 2, 8, 8), timestep=time(), encoder_hidden_states=text()[:, None],
        encoder_attention_mask=mask(), fps=24.0, height=64.0, width=64.0,
    )  # fmt: skip


# ---- two streams ------------------------------------------------------------------------------------------------------


@member
def SD3Transformer2DModel(cls: Any) -> Made:
    module = cls(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=HEAD, num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=8, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 8, 8), encoder_hidden_states=text(), pooled_projections=torch.randn(2, 8),
        timestep=time(),
    )  # fmt: skip


FLUX = {
    "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": HEAD, "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def flux_call(axes: int = 3, scale: float = 1.0) -> dict[str, Any]:
    return given(
        hidden_states=halves(16, 8), encoder_hidden_states=text(), timestep=time(0.7 * scale),
        img_ids=places(4, 4, axes=axes), txt_ids=torch.zeros(TEXT, axes),
    )  # fmt: skip


@member
def FluxTransformer2DModel(cls: Any) -> Made:
    module = cls(**FLUX, pooled_projection_dim=8, guidance_embeds=True)
    return module, flux_call() | given(pooled_projections=torch.randn(2, 8), guidance=torch.full((2,), 3.5))


@member
def ChromaTransformer2DModel(cls: Any) -> Made:
    module = cls(**FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
    tokens = torch.cat((mask(dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)), 1)
    return module, flux_call() | given(attention_mask=tokens)


@member
def BriaTransformer2DModel(cls: Any) -> Made:
    return cls(**FLUX), flux_call(scale=1000)


@member
def BriaFiboTransformer2DModel(cls: Any) -> Made:
    layers = [text(width=6) for _ in range(FLUX["num_layers"] + FLUX["num_single_layers"])]
    return cls(**FLUX, text_encoder_dim=6), flux_call(scale=1000) | given(text_encoder_layers=layers)


@member
def LongCatImageTransformer2DModel(cls: Any) -> Made:
    return cls(**FLUX, pooled_projection_dim=8), flux_call()


@member
def OvisImageTransformer2DModel(cls: Any) -> Made:
    return cls(**FLUX, out_channels=8), flux_call()


@member
def Flux2Transformer2DModel(cls: Any) -> Made:
    module = cls(**FLUX | {"axes_dims_rope": (4, 4, 4, 4)}, timestep_guidance_channels=16)
    return module, flux_call(axes=4) | given(guidance=torch.full((2,), 3.5))


@member
def Flux3Transformer2DModel(cls: Any) -> Made:
    module = cls(**FLUX | {"axes_dims_rope": (4, 4, 4, 4)}, cond_in_channels=8, timestep_channels=16)
    return module, flux_call(axes=4)


@member
def AuraFlowTransformer2DModel(cls: Any) -> Made:
    module = cls(
        sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=HEAD,
        num_attention_heads=HEADS, joint_attention_dim=TEXT_WIDTH, caption_projection_dim=WIDTH, pos_embed_max_size=16,
    )  # fmt: skip
    return module, given(hidden_states=halves(4, 8, 8), encoder_hidden_states=text(), timestep=time(0.7))


@member
def QwenImageTransformer2DModel(cls: Any) -> Made:
    module = cls(
        in_channels=8, out_channels=2, num_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return module, given(
        hidden_states=halves(16, 8), encoder_hidden_states=text(), encoder_hidden_states_mask=mask(dtype=torch.bool),
        timestep=time(0.7), img_shapes=[(1, 4, 4)] * 2,
    )  # fmt: skip


COGVIDEO = {
    "num_attention_heads": HEADS, "attention_head_dim": HEAD, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": TEXT_WIDTH, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
}  # fmt: skip


def cogvideo_call() -> dict[str, Any]:
    return given(
        hidden_states=halves(2, 4, 8, 8), encoder_hidden_states=text(), timestep=time(700),
        image_rotary_emb=turns(2 * 4 * 4, HEAD),
    )  # fmt: skip


@member
def CogVideoXTransformer3DModel(cls: Any) -> Made:
    return cls(**COGVIDEO), cogvideo_call()


@member
def ConsisIDTransformer3DModel(cls: Any) -> Made:
    module = cls(
        **COGVIDEO, is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=HEAD, cross_attn_num_heads=HEADS,
        LFE_id_dim=6, LFE_vit_dim=8, LFE_depth=2, LFE_dim_head=HEAD, LFE_num_heads=HEADS, LFE_num_id_token=2,
        LFE_num_querie=3, LFE_output_dim=2 * WIDTH // 3, LFE_ff_mult=2, LFE_num_scale=2,
    )  # fmt: skip
    return module, cogvideo_call() | given(id_cond=torch.randn(2, 6), id_vit_hidden=[text(4, 8) for _ in range(2)])


@member
def EasyAnimateTransformer3DModel(cls: Any) -> Made:
    module = cls(
        num_attention_heads=HEADS, attention_head_dim=HEAD, in_channels=4, out_channels=4, patch_size=2,
        sample_width=8, sample_height=8, num_layers=2, mmdit_layers=1, time_embed_dim=8, text_embed_dim=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(hidden_states=halves(4, 2, 8, 8), timestep=time(), encoder_hidden_states=text())


@member
def MochiTransformer3DModel(cls: Any) -> Made:
    module = cls(
        num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2, pooled_projection_dim=8, in_channels=4,
        text_embed_dim=16, time_embed_dim=16, max_sequence_length=TEXT,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 2, 8, 8), encoder_hidden_states=text(width=16), timestep=time(),
        encoder_attention_mask=mask(dtype=torch.bool),
    )  # fmt: skip


COGVIEW = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": HEAD, "num_attention_heads": HEADS,
    "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 8, "condition_dim": 4,
}  # fmt: skip


def cogview_call(*sizes: str) -> dict[str, Any]:
    call = given(hidden_states=halves(4, 8, 8), encoder_hidden_states=text(), timestep=time(700))
    return call | {size: torch.full((2, 2), 0.0 if size == "crop_coords" else 64.0) for size in sizes}


@member
def CogView3PlusTransformer2DModel(cls: Any) -> Made:
    module = cls(**COGVIEW, pos_embed_max_size=8, sample_size=8)
    return module, cogview_call("original_size", "target_size", "crop_coords")


@member
def CogView4Transformer2DModel(cls: Any) -> Made:
    module = cls(**COGVIEW, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16))
    return module, cogview_call("original_size", "target_size", "crop_coords")


@member
def GlmImageTransformer2DModel(cls: Any) -> Made:
    module = cls(**COGVIEW, prior_vq_quantizer_codebook_size=20)
    return module, cogview_call("target_size", "crop_coords") | given(
        prior_token_id=torch.randint(0, 20, (1, 16)).expand(2, -1),
        prior_token_drop=torch.tensor([[False], [True]]).expand(2, 16),
    )


HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS, "attention_head_dim": HEAD, "num_layers": 2,
    "text_embed_dim": TEXT_WIDTH, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip


def hunyuan_call() -> dict[str, Any]:
    return given(
        hidden_states=halves(4, 2, 8, 8), timestep=time(), encoder_hidden_states=text(), encoder_attention_mask=mask()
    )


@member
def HunyuanVideoTransformer3DModel(cls: Any) -> Made:
    module = cls(**HUNYUAN, num_single_layers=2, pooled_projection_dim=8)
    return module, hunyuan_call() | given(pooled_projections=torch.randn(2, 8), guidance=torch.full((2,), 6000.0))


@member
def HunyuanVideoFramepackTransformer3DModel(cls: Any) -> Made:
    module = cls(
        **HUNYUAN, num_single_layers=2, pooled_projection_dim=8, has_image_proj=True, image_proj_dim=6,
        has_clean_x_embedder=True,
    )  # fmt: skip
    return module, hunyuan_call() | given(
        pooled_projections=torch.randn(2, 8), guidance=torch.full((2,), 6000.0), image_embeds=text(3, 6),
        indices_latents=torch.tensor([6, 7]), latents_clean=halves(4, 2, 8, 8),
        indices_latents_clean=torch.tensor([0, 1]), latents_history_2x=halves(4, 2, 8, 8),
        indices_latents_history_2x=torch.tensor([2, 3]), latents_history_4x=halves(4, 4, 8, 8),
        indices_latents_history_4x=torch.tensor([2, 3, 4, 5]),
    )  # fmt: skip


@member
def HunyuanVideo15Transformer3DModel(cls: Any) -> Made:
    module = cls(**HUNYUAN, text_embed_2_dim=8, image_embed_dim=6, target_size=8)
    return module, hunyuan_call() | given(
        hidden_states=halves(4, 2, 4, 4), encoder_hidden_states_2=text(4, 8), encoder_attention_mask_2=mask(4),
        image_embeds=text(3, 6),
    )  # fmt: skip


@member
def HunyuanImageTransformer2DModel(cls: Any) -> Made:
    module = cls(**HUNYUAN | {"rope_axes_dim": (8, 8)}, num_single_layers=2, text_embed_2_dim=8)
    return module, hunyuan_call() | given(
        hidden_states=halves(4, 4, 4), encoder_hidden_states_2=text(4, 8), encoder_attention_mask_2=mask(4)
    )


@member
def MotifVideoTransformer3DModel(cls: Any) -> Made:
    module = cls(
        **HUNYUAN, num_single_layers=3, num_decoder_layers=1, enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )  # fmt: skip
    return module, hunyuan_call()


@member
def HiDreamImageTransformer2DModel(cls: Any) -> Made:
    module = cls(
        patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=HEAD,
        num_attention_heads=HEADS, caption_channels=[TEXT_WIDTH, 10], text_emb_dim=8, axes_dims_rope=(4, 6, 6),
        max_resolution=(8, 8), llama_layers=[0, 1, 1, 1], force_inference_output=True,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(4, 8, 8), timesteps=time(700), encoder_hidden_states_t5=text(),
        encoder_hidden_states_llama3=torch.randn(2, 2, TEXT, 10), pooled_embeds=torch.randn(2, 8),
    )  # fmt: skip


@member
def JoyImageEditTransformer3DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, hidden_size=WIDTH, num_attention_heads=HEADS, text_dim=TEXT_WIDTH, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    return module, given(hidden_states=halves(4, 2, 8, 8), timestep=time(), encoder_hidden_states=text())


@member
def JoyImageEditPlusTransformer3DModel(cls: Any) -> Made:
    module = cls(
        in_channels=4, hidden_size=WIDTH, num_attention_heads=HEADS, text_dim=TEXT_WIDTH, num_layers=2,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    return module, given(  # cut into patches before, for pictures of several sizes
        hidden_states=halves(20, 4, 1, 2, 2), timestep=time(), encoder_hidden_states=text(),
        encoder_hidden_states_mask=mask(), shape_list=[[(1, 4, 4), (1, 2, 2)]] * 2,
    )  # fmt: skip


@member
def LTX2VideoTransformer3DModel(cls: Any) -> Made:
    module = cls(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=HEAD, cross_attention_dim=WIDTH,
        audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=HEADS, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    return module, given(
        hidden_states=halves(2 * 4 * 4, 8), audio_hidden_states=halves(6, 6), encoder_hidden_states=text(),
        audio_encoder_hidden_states=text(), timestep=time(), encoder_attention_mask=mask(),
        audio_encoder_attention_mask=mask(), num_frames=2, height=4, width=4, audio_num_frames=6,
    )  # fmt: skip
