"""The rectified-flow scheduler of Open-Sora v1.2."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..errors import SodaprofError

BASE_PIXELS = 512 * 512
CHUNK_FRAMES, CHUNK_LATENTS = 17, 5  # pixel frames of a chunk of the autoencoder, and its latent frames


def shift_ratio(height: float, width: float, num_frames: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns ρ [1], by which a request of this size (pixels, as requested) shifts the timesteps; 1 at 512 × 512 × 1.

    Every operation is rounded to `dtype`.
    """
    chunks = num_frames // CHUNK_FRAMES
    if num_frames != 1 and chunks == 0:
        raise SodaprofError(
            f"The timestep transform of {num_frames} frames is undefined: give 1, or {CHUNK_FRAMES} and more."
        )
    h, w = torch.tensor([height], dtype=dtype), torch.tensor([width], dtype=dtype)
    latents = torch.tensor([1 if num_frames == 1 else chunks * CHUNK_LATENTS], dtype=dtype)
    return (h * w / BASE_PIXELS).sqrt() * latents.sqrt()


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Euler steps along x_t = (1 − t/1000) · data + (t/1000) · noise, whose velocity is data − noise.

    `size_dtype` is the dtype of the size in the timestep transform: the published script uses "bfloat16", which moves
    timesteps by up to 0.8 of 1000 for videos.
    """

    __module__ = "sodaprof.opensora"  # as model_index.json names it
    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, use_timestep_transform: bool = True, size_dtype: str = "float32"
    ) -> None:
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        height: float | None = None,
        width: float | None = None,
        num_frames: int | None = None,
    ) -> None:
        """Sets `timesteps`, fp32 [num_inference_steps], descending; size in pixels, as requested."""
        total = self.config.num_train_timesteps
        linear = [(1.0 - i / num_inference_steps) * total for i in range(num_inference_steps)]
        t = torch.tensor(linear, dtype=torch.float32)
        if self.config.use_timestep_transform:
            if height is None or width is None or num_frames is None:
                raise SodaprofError("The timestep transform needs height, width and num_frames: give them.")
            ratio = shift_ratio(height, width, num_frames, getattr(torch, self.config.size_dtype))
            s = t / total
            t = total * (ratio * s / (1 + (ratio - 1) * s))
        self.num_inference_steps = num_inference_steps
        self.timesteps = t.to(device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Returns the sample unchanged."""
        return sample

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Returns the sample at the timestep that follows (0 after the last), in fp32 or wider.

        model_output is the guided velocity, of the sample's shape; timestep one of `timesteps`.
        """
        steps = self.timesteps.to(sample.device)
        if not isinstance(timestep, Tensor):
            timestep = steps.new_full((1,), timestep)
        # found on the device: an index that came to the host would make it wait in every step
        index = (steps - timestep.to(sample.device).reshape(-1)[:1]).abs().argmin().reshape(1)
        sizes = (steps - torch.cat((steps[1:], steps.new_zeros(1)))) / self.config.num_train_timesteps
        previous = sample + model_output * sizes.index_select(0, index).reshape((1,) * sample.ndim)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the samples [B, ...] noised to timesteps [] or [B]."""
        t = timesteps.to(original_samples.device, torch.float32).reshape(-1, *(1,) * (original_samples.ndim - 1))
        kept = 1 - t / self.config.num_train_timesteps
        return kept * original_samples + (1 - kept) * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps
