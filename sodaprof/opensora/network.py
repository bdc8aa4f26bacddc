"""STDiT3, the video transformer of Open-Sora v1.2, under the parameter names of its published weights.

B: samples (both guidance halves), T: latent frames, N: tokens, D: width.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .layers import FinalLayer, PatchEmbed, RotaryEmbed, ScalarEmbed, STDiT3Block, TextEmbed, positions


def _first(size: float | Tensor) -> float:
    """Returns the number, or the first of a tensor."""
    return float(size.reshape(-1)[0]) if isinstance(size, Tensor) else float(size)


class STDiT3(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Predicts the velocity of video latents; the defaults are STDiT3-XL/2."""

    __module__ = "sodaprof.opensora"  # as model_index.json names it
    _no_split_modules = ("STDiT3Block",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        if patch_size[0] != 1:
            raise ValueError(f"A patch of STDiT3 is one frame deep, patch_size[0] is {patch_size[0]}.")
        width = hidden_size
        self.out_channels = in_channels * (2 if pred_sigma else 1)
        self.x_embedder = PatchEmbed(in_channels, width, (1, patch_size[1], patch_size[2]))
        self.t_embedder = ScalarEmbed(width)
        self.fps_embedder = ScalarEmbed(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = TextEmbed(caption_channels, width, model_max_length)
        self.rope = RotaryEmbed(width // num_heads)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(STDiT3Block(width, num_heads, mlp_ratio, qk_norm, temporal) for _ in range(depth))
            for temporal in (False, True)
        )
        self.final_layer = FinalLayer(width, math.prod(patch_size) * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        fps: float | Tensor,
        height: float | Tensor,
        width: float | Tensor,
        x_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Returns fp32 [B, 8, T, H, W]: the velocity in the first 4 channels, then channels that the sampler does not use.

        hidden_states [B, 4, T, H, W]; timestep [B], 0 to 1000; encoder_hidden_states [B, 1, L, caption_channels];
        encoder_attention_mask [n, L], n a divisor of B, not 0 for text tokens that count; fps, height and width (pixels
        as requested) numbers or [n], height and width read on the host: in a loop give numbers; x_mask bool [B, T], True
        for frames to generate, None for all. The published script rounds height and width to bf16 (854
        becomes 856): give rounded ones to repeat it.
        """
        dtype, device = self.x_embedder.proj.weight.dtype, hidden_states.device
        batch, _, frames, rows, columns = hidden_states.shape
        _, patch_rows, patch_columns = self.config.patch_size
        grid = (-(-rows // patch_rows), -(-columns // patch_columns))
        x = self.x_embedder(hidden_states.to(dtype))
        unit = (_first(height) * _first(width)) ** 0.5 / self.config.input_sq_size
        table = positions(grid, x.shape[-1], unit, dtype, device)
        x = (x.unflatten(1, (frames, -1)) + table[:, None]).flatten(1, 2)

        if not isinstance(fps, Tensor):
            fps = torch.full((1,), float(fps), device=device)  # filled there: a copy would be a host sync
        rates = fps.to(device, dtype).reshape(-1)
        fps_embedding = self.fps_embedder(rates.repeat(batch // rates.shape[0]))
        t = timestep.to(dtype).expand(batch)
        e = self.t_embedder(t) + fps_embedding  # [B, D]
        modulation = self.t_block(e).unflatten(-1, (6, -1))[:, None]  # [B, 1, 6, D]
        e_kept = None
        if x_mask is not None:
            e_kept = self.t_embedder(torch.zeros_like(t)) + fps_embedding
            kept = self.t_block(e_kept).unflatten(-1, (6, -1))[:, None]
            modulation = torch.where(x_mask[:, :, None, None], modulation, kept)  # [B, T, 6, D]

        text = self.y_embedder(encoder_hidden_states.to(dtype))[:, 0]  # [B, L, D]
        text_mask = None
        if encoder_attention_mask is not None:
            mask = encoder_attention_mask.repeat(batch // encoder_attention_mask.shape[0], 1)
            text_mask = (mask != 0)[:, None, None]  # [B, 1, 1, L]
        rope = self.rope(frames, dtype)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, text, modulation, text_mask, frames)
            x = temporal(x, text, modulation, text_mask, frames, rope=rope)
        out = self.unpatchify(self.final_layer(x, e, frames, e_kept, x_mask), frames, rows, columns).float()
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def unpatchify(self, tokens: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """Returns [B, channels, T, H, W] of tokens [B, N, patch · channels], without the padding."""
        _, patch_rows, patch_columns = self.config.patch_size
        grid = (-(-rows // patch_rows), -(-columns // patch_columns))
        x = tokens.reshape(-1, frames, *grid, patch_rows, patch_columns, self.out_channels)
        x = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return x[..., :rows, :columns]
