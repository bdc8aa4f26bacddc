"""The layers of STDiT3, under the parameter names of its published weights.

B: samples (both guidance halves), T: latent frames, S: tokens of a frame, N = T·S, D: width, d: width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

EPS = 1e-6
FREQUENCIES = 256  # width of a scalar's sinusoid

Rope = tuple[Tensor, Tensor]  # cos and sin, each [T, d/2]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns attention [B, heads, N, d] whose softmax is computed in fp32, whatever the dtype of q, k and v.

    Torch function modes intercept it, as they intercept `F.scaled_dot_product_attention`.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(attend, (q, k, v), q, k, v)
    if q.dtype != torch.float64:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.float().softmax(-1).to(q.dtype) @ v


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Returns x [B, heads, T, d] with every pair of channels (2j, 2j + 1) rotated by its angle."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns the normalised and modulated x [B, T, S, D]; shift and scale are [B, 1 or T, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in fp32 up to its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
        return self.weight * y.to(x.dtype)


class SelfAttention(nn.Module):
    """Attention among the tokens of a frame, or (with rope) among the frames of a position."""

    def __init__(self, width: int, heads: int, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.heads, self.temporal = heads, temporal
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, rope: Rope | None = None
    ) -> Tensor:
        """Returns [B', N, D]; `encoder_hidden_states` holds all tokens if `hidden_states` are some of them."""
        width = hidden_states.shape[-1]
        if encoder_hidden_states is None:
            q, k, v = self.qkv(hidden_states).split(width, -1)
        elif rope is not None:
            raise ValueError("Attention over frames needs all frames: the positions of some of them are not known.")
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(hidden_states, weight[:width], bias[:width])
            k, v = F.linear(encoder_hidden_states, weight[width:], bias[width:]).split(width, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))

    def by_sample(self, values: Tensor, batch: int) -> Tensor:
        """Returns values [B', n], one a token as this module is called, as [B, N] in the order of the blocks' tokens."""
        values = values.unflatten(0, (batch, -1))  # [B, T, S], temporal: [B, S, T]
        return (values.transpose(1, 2) if self.temporal else values).flatten(1)


class CrossAttention(nn.Module):
    """Attention of all tokens to the text's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Returns [B, N, D]; text [B, L, D], mask bool [B, 1, 1, L], True for text tokens that count."""
        q = self.q_linear(hidden_states)
        k, v = self.kv_linear(encoder_hidden_states).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU (tanh approximation) between them."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states), approximate="tanh"))


class STDiT3Block(nn.Module):
    """Self-attention over one axis, cross-attention to the text, MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(width, heads, qk_norm, temporal)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio), width)

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor,
        modulation: Tensor,
        text_mask: Tensor | None,
        frames: int,
        rope: Rope | None = None,
    ) -> Tensor:
        """Returns tokens [B, N, D]; text [B, L, D], modulation [B, 1 or T, 6, D]."""
        x = hidden_states.unflatten(1, (frames, -1))  # [B, T, S, D]
        rows = (self.scale_shift_table + modulation)[:, :, None]  # [B, 1 or T, 1, 6, D]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows.unbind(3)
        a = modulate(x, shift_1, scale_1)
        if self.temporal:
            a = self.attn(a.transpose(1, 2).flatten(0, 1), rope=rope)  # [B·S, T, D]
            a = a.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        else:
            a = self.attn(a.flatten(0, 1)).unflatten(0, (x.shape[0], -1))  # from [B·T, S, D]
        tokens = (x + gate_1 * a).flatten(1, 2)
        x = (tokens + self.cross_attn(tokens, text, attention_mask=text_mask)).unflatten(1, (frames, -1))
        y = self.mlp(modulate(x, shift_2, scale_2).flatten(1, 2)).unflatten(1, (frames, -1))
        return (x + gate_2 * y).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Latents, padded with zeros to whole patches, as tokens."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Returns tokens [B, N, D], row-major, of latents [B, C, T, H, W]."""
        _, rows, columns = self.patch
        x = F.pad(x, (0, -x.shape[4] % columns, 0, -x.shape[3] % rows))
        return self.proj(x).flatten(2).transpose(1, 2)


class ScalarEmbed(nn.Module):
    """A scalar's sinusoid through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sinusoid = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)  # fp32, cosines first
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        """Returns [B, D] of values [B], which are in the network's dtype."""
        return self.mlp(self.sinusoid(values).to(values.dtype))


class TextEmbed(nn.Module):
    """Projects text; `y_embedding` is the embedding of no text."""

    y_embedding: Tensor

    def __init__(self, channels: int, width: int, length: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(length, channels) / channels**0.5)
        self.y_proj = Mlp(channels, width, width)

    def forward(self, text: Tensor) -> Tensor:
        """Returns [B, 1, L, D] of text [B, 1, L, channels]."""
        return self.y_proj(text)


class RotaryEmbed(nn.Module):
    """The angles of the attention over frames."""

    freqs: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10_000 ** (-torch.arange(0, head_width, 2).float() / head_width))
        self.register_load_state_dict_pre_hook(self._fill)

    @staticmethod
    def _fill(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Adds the frequencies to weights that were stored without them."""
        state_dict.setdefault(prefix + "freqs", module.get_buffer("freqs"))

    def forward(self, frames: int, dtype: torch.dtype) -> Rope:
        """Returns cos and sin, each [T, d/2], of angles in `dtype`."""
        freqs = self.freqs.to(dtype)
        angles = torch.arange(frames, device=freqs.device).to(dtype)[:, None] * freqs
        return angles.cos(), angles.sin()


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, out)

    def forward(
        self, tokens: Tensor, e: Tensor, frames: int, e_kept: Tensor | None = None, x_mask: Tensor | None = None
    ) -> Tensor:
        """Returns [B, N, patch · channels]; e and e_kept [B, D].

        Frames that x_mask excludes are modulated twice, by e and then by e_kept, as in the published network.
        """
        x = self._modulate(tokens.unflatten(1, (frames, -1)), e)
        if x_mask is not None and e_kept is not None:
            x = torch.where(x_mask[:, :, None, None], x, self._modulate(x, e_kept))
        return self.linear(x.flatten(1, 2))

    def _modulate(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + e[:, None])[:, None, None].unbind(3)  # [B, 1, 1, D]
        return modulate(x, shift, scale)


def positions(grid: tuple[int, int], width: int, unit: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the position vectors [1, S, D] of a frame's tokens: columns before rows, sines before cosines.

    Rows and columns are divided by `unit`, and stretched to a square of as many tokens, in fp32. The frequencies are
    rounded to `dtype`, as they are in the published network; the angles are fp32 or wider.
    """
    wide = torch.promote_types(dtype, torch.float32)
    quarter = torch.arange(0, width // 2, 2, dtype=torch.float32, device=device)
    omega = (1.0 / 10_000 ** (quarter / (width // 2))).to(dtype).to(wide)
    side = round((grid[0] * grid[1]) ** 0.5)
    row, column = ((torch.arange(n, device=device).float() / unit * (side / n)).to(wide) for n in grid)
    row_angles = (row[:, None] * omega)[:, None].expand(-1, grid[1], -1)  # [rows, columns, D/4]
    column_angles = (column[:, None] * omega)[None].expand(grid[0], -1, -1)
    parts = (column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos())
    return torch.cat(parts, -1).flatten(0, 1)[None].to(dtype)
