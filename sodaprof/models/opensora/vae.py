"""The autoencoder of Open-Sora v1.2: images frame by frame, then frames in chunks, under its published parameter names.

B: samples, F: pixel frames, T: latent frames, h × w: pixels, H × W: latent cells. Pixels lie in −1…1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ...errors import SodaprofError
from .temporal import TemporalVAE, draw_from


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
        return self._video(torch.cat(parts) * self.factor, len(video))

    def decode(self, x: Tensor) -> Tensor:
        """Returns the video [B, 3, F, s · H, s · W] of latents [B, C, F, H, W]."""
        frames = x.transpose(1, 2).flatten(0, 1).split(self.micro_batch)
        return self._video(torch.cat([self.module.decode(part / self.factor).sample for part in frames]), len(x))

    @staticmethod
    def _video(frames: Tensor, batch: int) -> Tensor:
        return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class AutoencoderKLOpenSora(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Both halves; the defaults are the published one.

    Chunks of `micro_frame_size` frames know nothing of each other; None makes the whole video one chunk. Chunks change
    numbers, `micro_batch_size` does not. `latents_mean` and `latents_std`, one number a latent channel, start the buffers
    `shift` and `scale`, which are stored with the weights.
    """

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
        levels = len(block_out_channels)
        module = AutoencoderKL(
            block_out_channels=tuple(block_out_channels), layers_per_block=layers_per_block,
            latent_channels=latent_channels, norm_num_groups=norm_num_groups,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        )  # fmt: skip
        self.spatial_rate = 2 ** (levels - 1)
        self.spatial_vae = SpatialVAE(module, spatial_factor, micro_batch_size)
        self.temporal_vae = TemporalVAE(
            latent_channels, filters, channel_multipliers, num_res_blocks, temporal_downsample, num_groups
        )
        self.register_buffer("shift", torch.tensor(latents_mean).reshape(1, -1, 1, 1, 1))
        self.register_buffer("scale", torch.tensor(latents_std).reshape(1, -1, 1, 1, 1))

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns T, H, W of a video of this many frames and pixels. What is decoded may be smaller: `decoded_size`."""
        latents = sum(-(-frames // self.temporal_vae.rate) for frames in self._chunks(num_frames))
        return latents, height // self.spatial_rate, width // self.spatial_rate

    def decoded_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of what the latents of such a video decode to: whole cells, never more."""
        return height // self.spatial_rate * self.spatial_rate, width // self.spatial_rate * self.spatial_rate

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, video: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Returns normalised latents [B, C, T, H, W] of a video [B, 3, F, h, w]: draws of both halves, or their means."""
        x = self.spatial_vae.encode(video, sample, generator)
        parts = []
        for chunk in x.split(self._chunks(x.shape[2]), 2):
            moments = self.temporal_vae.moments(chunk)
            mean = moments.chunk(2, 1)[0]
            if sample:
                noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            parts.append(draw_from(moments, noise) if sample else mean)
        return (torch.cat(parts, 2) - self.shift) / self.scale

    def decode_spatial(self, z: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Yields the latents of single frames, [B, C, f, H, W], chunk after chunk, of normalised z [B, C, T, H, W]."""
        chunks = self._chunks(num_frames)
        sizes = [-(-frames // self.temporal_vae.rate) for frames in chunks]
        if z.shape[2] != sum(sizes):
            raise SodaprofError(
                f"{z.shape[2]} latent frames for {num_frames} frames, which have {sum(sizes)}. Give the num_frames that "
                "the latents were made for."
            )
        parts = (z * self.scale + self.shift).split(sizes, 2)
        for part, frames in zip(parts, chunks, strict=True):
            yield self.temporal_vae.decode(part, frames)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Returns the video [B, 3, num_frames, s · H, s · W] of normalised latents [B, C, T, H, W].

        Frames are decoded as soon as their chunk is there, so only one chunk's activations are held at a time.
        """
        return torch.cat([self.spatial_vae.decode(x) for x in self.decode_spatial(z, num_frames)], 2)

    def forward(self, video: Tensor) -> Tensor:
        """Returns the video after it was encoded to its means and decoded."""
        return self.decode(self.encode(video, sample=False), video.shape[2])

    def _chunks(self, num_frames: int) -> Sequence[int]:
        size = self.config.micro_frame_size or num_frames
        return [min(size, num_frames - start) for start in range(0, num_frames, size)]
