"""The autoencoder of Open-Sora v1.2: images frame by frame, then frames in chunks, under its published parameter names.

B: samples, F: pixel frames, T: latent frames, h × w: pixels, H × W: latent cells. Pixels lie in −1…1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..errors import SodaprofError


class SpatialVAE(nn.Module):
    """diffusers' autoencoder on every frame by itself, `micro_batch` frames at a time; latents times `factor`."""

    def __init__(self, module: AutoencoderKL, factor: float, micro_batch: int) -> None:
        super().__init__()
        self.module, self.factor, self.micro_batch = module, factor, micro_batch

    def encode(self, video: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Returns [B, C, F, h // s, w // s] of a video [B, 3, F, h, w]: a draw, or the mean."""
        parts = []
        for frames in video.transpose(1, 2).flatten(0, 1).split(self.micro_batch):
            posterior = self.module.encode(frames).latent_dist
            parts.append(posterior.sample(generator) if sample else posterior.mean)
        return (torch.cat(parts) * self.factor).unflatten(0, (len(video), -1)).transpose(1, 2)

    def decode(self, x: Tensor) -> Tensor:
        """Returns the video [B, 3, F, s · H, s · W] of latents [B, C, F, H, W]."""
        parts = x.transpose(1, 2).flatten(0, 1).split(self.micro_batch)
        frames = torch.cat([self.module.decode(part / self.factor).sample for part in parts])
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class AutoencoderKLOpenSora(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Both halves; the defaults are the published one.

    Chunks of `micro_frame_size` frames are coded independently; None makes the whole video one chunk. The size of chunks
    changes the result, `micro_batch_size` does not. `latents_mean` and `latents_std`, one number a latent channel, are the
    initial values of the buffers `shift` and `scale`, which are stored with the weights.
    """

    __module__ = "sodaprof.opensora"  # as model_index.json names it
    scale: Tensor
    shift: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        filters: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        num_res_blocks: int = 4,
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        num_groups: int = 32,
        latents_mean: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98),
        latents_std: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06),
        micro_frame_size: int | None = 17,
        micro_batch_size: int = 4,
        spatial_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise SodaprofError(
                f"{len(temporal_downsample)} values of temporal_downsample for {len(channel_multipliers)} levels: "
                "give one fewer than channel_multipliers."
            )
        levels = len(block_out_channels)
        module = AutoencoderKL(
            block_out_channels=tuple(block_out_channels), layers_per_block=layers_per_block,
            latent_channels=latent_channels, norm_num_groups=norm_num_groups,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        )  # fmt: skip
        self.spatial_rate = 2 ** (levels - 1)
        self.spatial_vae = SpatialVAE(module, spatial_factor, micro_batch_size)
        widths = [filters * multiplier for multiplier in channel_multipliers]
        self.temporal_vae = TemporalVAE(latent_channels, widths, temporal_downsample, num_res_blocks, num_groups)
        self.register_buffer("shift", torch.tensor(latents_mean).reshape(1, -1, 1, 1, 1))
        self.register_buffer("scale", torch.tensor(latents_std).reshape(1, -1, 1, 1, 1))

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns T, H, W of a video of this many frames and pixels; pixels beyond whole latent cells are not decoded."""
        return sum(self._chunks(num_frames)[1]), height // self.spatial_rate, width // self.spatial_rate

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, video: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Returns normalised latents [B, C, T, H, W] of a video [B, 3, F, h, w]: draws of both halves, or their means."""
        x = self.spatial_vae.encode(video, sample, generator)
        parts = []
        for chunk in x.split(self._chunks(x.shape[2])[0], 2):
            posterior = DiagonalGaussianDistribution(self.temporal_vae.moments(chunk))
            parts.append(posterior.sample(generator) if sample else posterior.mean)
        return (torch.cat(parts, 2) - self.shift) / self.scale

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Returns the video [B, 3, num_frames, s · H, s · W] of normalised latents [B, C, T, H, W].

        Frames are decoded chunk by chunk, so that only one chunk's activations are in memory at a time.
        """
        chunks, sizes = self._chunks(num_frames)
        if z.shape[2] != sum(sizes):
            raise SodaprofError(
                f"{z.shape[2]} latent frames for {num_frames} frames, which have {sum(sizes)}. Give the num_frames of the "
                "latents."
            )
        videos = []
        for part, frames in zip((z * self.scale + self.shift).split(sizes, 2), chunks, strict=True):
            videos.append(self.spatial_vae.decode(self.temporal_vae.decode(part, frames)))
        return torch.cat(videos, 2)

    def forward(self, video: Tensor) -> Tensor:
        """Returns the video encoded to its means and decoded."""
        return self.decode(self.encode(video, sample=False), video.shape[2])

    def _chunks(self, num_frames: int) -> tuple[list[int], list[int]]:
        """Returns the frames of each chunk, and its latent frames."""
        size = self.config.micro_frame_size or num_frames
        chunks = [min(size, num_frames - start) for start in range(0, num_frames, size)]
        return chunks, [-(-frames // self.temporal_vae.rate) for frames in chunks]


EPS = 1e-5


class CausalConv3d(nn.Module):
    """A convolution padded with zeros: on both sides of H and W, in time before the first frame only."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - stride, 0)  # W, H, time
        self.conv = nn.Conv3d(channels, out, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to x; its norms are over all frames at once."""

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
    """Halves the frames after each level that `downsample` marks."""

    def __init__(self, channels: int, widths: list[int], downsample: Sequence[bool], count: int, groups: int) -> None:
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
        self.conv2 = CausalConv3d(last, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.block_res_blocks
        x = first(self.conv_in(x))
        for conv, blocks in zip(self.conv_blocks, others, strict=True):
            x = blocks(conv(x))
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class Decoder(nn.Module):
    """Doubles the frames at the levels at which the encoder halved them."""

    def __init__(self, channels: int, widths: list[int], downsample: Sequence[bool], count: int, groups: int) -> None:
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
        self.conv_out = CausalConv3d(widths[0], channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        *others, last = self.block_res_blocks
        x = last(self.res_blocks(self.conv1(x)))
        for conv, blocks in zip(reversed(self.conv_blocks), reversed(others), strict=True):
            if isinstance(conv, CausalConv3d):  # gives [B, 2C, T, H, W], the two frames of a channel side by side
                x = conv(x).unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3)
            x = blocks(x)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Latents of single frames to latents of `rate` frames each, one chunk at a time: no context from other chunks."""

    def __init__(self, channels: int, widths: list[int], downsample: Sequence[bool], count: int, groups: int) -> None:
        super().__init__()
        self.rate = 2 ** sum(downsample)
        self.encoder = Encoder(channels, widths, downsample, count, groups)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv3d(channels, channels, 1)
        self.decoder = Decoder(channels, widths, downsample, count, groups)

    def moments(self, x: Tensor) -> Tensor:
        """Returns mean and log variance [B, 2C, ⌈T / rate⌉, H, W] of a chunk [B, C, T, H, W]."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.rate, 0))
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """Returns the chunk [B, C, frames, H, W] of z [B, C, ⌈frames / rate⌉, H, W]."""
        x = self.decoder(self.post_quant_conv(z))
        return x[:, :, -frames % self.rate :]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the chunk encoded to its mean and decoded."""
        return self.decode(self.moments(x).chunk(2, 1)[0], x.shape[2])
