"""The temporal half of Open-Sora's autoencoder, under the parameter names of its published weights.

Tensors are [B, C, T, H, W]; H and W never change. Every list of a decoder is indexed by level, counted from the input of
the encoder, so the decoder runs it downwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import SodaprofError

EPS = 1e-5


class CausalConv3d(nn.Module):
    """A convolution that is padded with zeros: on both sides of H and W, in time in front alone."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - stride, 0)  # W, H, time
        self.conv = nn.Conv3d(channels, out, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, around which x goes; its norms see all frames at once."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=EPS)
        self.conv1 = CausalConv3d(channels, out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, out, eps=EPS)
        self.conv2 = CausalConv3d(out, out, 3, bias=False)
        self.conv3 = CausalConv3d(channels, out, 1, bias=False) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(y))) + self.conv3(x)


def _res_blocks(channels: int, out: int, count: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(channels if i == 0 else out, out, groups) for i in range(count)))


class Encoder(nn.Module):
    """Halves the frames after each level that `downsample` says so."""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], downsample: Sequence[bool], count: int, groups: int
    ) -> None:
        super().__init__()
        last = widths[-1]
        self.conv_in = CausalConv3d(channels, widths[0], 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(widths[max(i - 1, 0)], width, count, groups) for i, width in enumerate(widths)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, stride=2) if down else nn.Identity()
            for width, down in zip(widths, downsample, strict=False)  # none after the last level
        )
        self.res_blocks = _res_blocks(last, last, count, groups)
        self.norm1 = nn.GroupNorm(groups, last, eps=EPS)
        self.conv2 = CausalConv3d(last, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = blocks(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class Decoder(nn.Module):
    """Doubles the frames where the encoder halved them."""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], downsample: Sequence[bool], count: int, groups: int
    ) -> None:
        super().__init__()
        last = widths[-1]
        self.conv1 = CausalConv3d(channels, last, 3)
        self.res_blocks = _res_blocks(last, last, count, groups)
        before = [*widths[1:], last]  # width of the level that runs before
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(wider, width, count, groups) for wider, width in zip(before, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(wider, 2 * wider, 3) if up else nn.Identity()
            for wider, up in zip(widths[1:], downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = CausalConv3d(widths[0], out, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                x = self.conv_blocks[level - 1](x)  # [B, 2C, T, H, W], the two frames of a channel side by side
                x = x.unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Latents of single frames to latents of `rate` frames each, one chunk at a time: no context from other chunks."""

    def __init__(
        self,
        channels: int,
        filters: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        temporal_downsample: Sequence[bool],
        num_groups: int,
    ) -> None:
        super().__init__()
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise SodaprofError(
                f"{len(temporal_downsample)} values of temporal_downsample for {len(channel_multipliers)} levels: "
                "give one less than there are channel_multipliers."
            )
        self.rate = 2 ** sum(temporal_downsample)
        rest = ([filters * m for m in channel_multipliers], temporal_downsample, num_res_blocks, num_groups)
        self.encoder = Encoder(channels, 2 * channels, *rest)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv3d(channels, channels, 1)
        self.decoder = Decoder(channels, channels, *rest)

    def moments(self, x: Tensor) -> Tensor:
        """Returns mean and log variance [B, 2C, ⌈T / rate⌉, H, W] of a chunk [B, C, T, H, W]."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.rate, 0))
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """Returns the chunk [B, C, frames, H, W] of z [B, C, ⌈frames / rate⌉, H, W]."""
        x = self.decoder(self.post_quant_conv(z))
        return x[:, :, -frames % self.rate :]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the chunk after it was encoded to its mean and decoded."""
        return self.decode(self.moments(x).chunk(2, 1)[0], x.shape[2])


def draw_from(moments: Tensor, noise: Tensor) -> Tensor:
    """Returns mean + standard deviation · noise, of moments [B, 2C, ...] and noise [B, C, ...]."""
    mean, log_variance = moments.chunk(2, 1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
