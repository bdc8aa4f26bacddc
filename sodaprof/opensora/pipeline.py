"""Text to video (or to an image, a video of one frame) with Open-Sora v1.2, as a diffusers pipeline.

n: prompts, F: pixel frames, T: latent frames, h × w: pixels, L: text tokens. Both guidance halves run in one batch of 2n,
the prompts first; there is no path without guidance, as in the published script.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ..errors import SodaprofError
from .autoencoder import AutoencoderKLOpenSora
from .network import STDiT3
from .prompts import cleaned, size_of, with_scores
from .scheduler import RectifiedFlowScheduler

IMAGE_FPS = 120  # the frame rate that the network receives for a single frame
OLD_MODULE = re.compile(r"sodaprof\.(models\.)?opensora\.\w+")  # in a model_index.json of an earlier release
OUTPUT_TYPES = ("np", "pt", "pil", "latent")
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class OpenSoraPipelineOutput(BaseOutput):  # type: ignore[misc]
    """`frames`: "np" [n, F, H, W, 3] in 0…1, "pt" [n, F, 3, H, W], "pil" lists of lists, "latent" [n, C, T, H, W]."""

    frames: Any


class OpenSoraPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples videos. `height`, `width` and `num_frames` are the defaults of a call.

    clean_caption: whether the captions of the network's training set were cleaned. The text encoder runs in its own dtype,
    float32 in the published script.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        transformer: STDiT3,
        vae: AutoencoderKLOpenSora,
        scheduler: RectifiedFlowScheduler,
        height: int = 240,
        width: int = 426,
        num_frames: int = 51,
        clean_caption: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.register_to_config(height=height, width=width, num_frames=num_frames, clean_caption=clean_caption)
        self.video_processor = VideoProcessor(vae_scale_factor=1)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Returns the content of a model_index.json; earlier releases named modules of our parts that have moved."""
        loaded = super().load_config(*args, **kwargs)
        for value in loaded.values() if isinstance(loaded, dict) else ():
            if isinstance(value, list) and value and OLD_MODULE.fullmatch(str(value[0])):
                value[0] = "sodaprof.opensora"
        return loaded

    def encode_prompt(
        self,
        prompt: str | list[str],
        aes: float | None = 6.5,
        flow: float | None = None,
        camera_motion: str | None = None,
        clean_caption: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns embeddings [n, L, channels] and mask int64 [n, L], right padded; L is the network's model_max_length.

        The end token counts as text; longer prompts are cut off before it.
        """
        clean_caption = self.config.clean_caption if clean_caption is None else clean_caption
        prompts = [with_scores(p, aes, flow, camera_motion) for p in ([prompt] if isinstance(prompt, str) else prompt)]
        texts = [cleaned(p) if clean_caption else p.lower().strip() for p in prompts]
        tokens = self.tokenizer(
            texts, max_length=self.transformer.config.model_max_length, padding="max_length", truncation=True,
            return_attention_mask=True, add_special_tokens=True, return_tensors="pt",
        )  # fmt: skip
        device = self._execution_device
        mask = tokens.attention_mask.to(device)
        embeds = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        return embeds, mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        resolution: str | None = None,
        aspect_ratio: str | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        fps: float = 24,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "np",
        aes: float | None = 6.5,
        flow: float | None = None,
        camera_motion: str | None = None,
        clean_caption: bool | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        return_dict: bool = True,
    ) -> OpenSoraPipelineOutput | tuple[Any]:
        """Returns videos as `OpenSoraPipelineOutput.frames`, a tuple of it with return_dict=False.

        prompt, or prompt_embeds [n, L, channels] with prompt_attention_mask [n, L]; height and width in pixels, or the
        names resolution ("480p") and aspect_ratio ("9:16", height:width), else the pipeline's own size. The decoded video
        has whole latent cells: 240 × 426 gives 240 × 424. generator: one, or one a generation, so that a video does not
        depend on the rest of the batch. latents [n, C, T, H, W]: the noise to start from. aes, flow and camera_motion are
        appended to prompts that do not name theirs. Raises SodaprofError for arguments that exclude each other, and for 2
        to 16 frames if the scheduler transforms timesteps.
        """
        height, width = self._size(height, width, resolution, aspect_ratio)
        num_frames = num_frames or self.config.num_frames
        self._check(prompt, prompt_embeds, prompt_attention_mask, output_type, callback_on_step_end_tensor_inputs)
        size = {"height": height, "width": width, "num_frames": num_frames}
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device, **size)
        if prompt_embeds is None or prompt_attention_mask is None:
            assert prompt is not None
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt, aes, flow, camera_motion, clean_caption)
        latents = self._latents(latents, len(prompt_embeds), generator, self.vae.latent_size(num_frames, height, width))
        conditions = self._conditions(prompt_attention_mask, IMAGE_FPS if num_frames == 1 else fps, height, width)
        text = self._both_halves(prompt_embeds)
        with self.progress_bar(total=num_inference_steps) as progress:
            for i, t in enumerate(self.scheduler.timesteps):
                velocity = self._velocity(latents, t, text, conditions, guidance_scale)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, asked)
                    latents = tensors["latents"]
                    if (embeds := tensors["prompt_embeds"]) is not prompt_embeds:
                        prompt_embeds, text = embeds, self._both_halves(embeds)
                progress.update()
        frames = latents if output_type == "latent" else self._decoded(latents, num_frames, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=frames) if return_dict else (frames,)

    def _decoded(self, latents: Tensor, num_frames: int, output_type: str) -> Any:
        video = self.vae.decode(latents.to(self.vae.dtype), num_frames)
        return self.video_processor.postprocess_video(video.float(), output_type=output_type)

    def _conditions(self, mask: Tensor, fps: float, height: int, width: int) -> dict[str, Any]:
        """Returns the network's arguments that hold for all steps; the size rounded as the scheduler rounds it."""
        rounded = torch.tensor([height, width], dtype=getattr(torch, self.scheduler.config.size_dtype)).tolist()
        mask = mask.to(self._execution_device)
        return {"encoder_attention_mask": mask, "fps": float(fps), "height": rounded[0], "width": rounded[1]}

    def _velocity(
        self, latents: Tensor, t: Tensor, text: Tensor, conditions: dict[str, Any], guidance_scale: float
    ) -> Tensor:
        """Returns the guided velocity of the latents at a timestep."""
        time = t.expand(2 * len(latents))
        both = torch.cat([latents, latents])
        out = self.transformer(both, timestep=time, encoder_hidden_states=text, **conditions, return_dict=False)[0]
        with_text, without = out[:, : latents.shape[1]].chunk(2)  # the channels after the velocity are not used
        return without + guidance_scale * (with_text - without)

    def _latents(self, latents: Tensor | None, n: int, generator: Generators, size: tuple[int, int, int]) -> Tensor:
        """Returns the noise to start from, [n, C, T, H, W]: the caller's, or drawn in the network's dtype."""
        device, network = self._execution_device, self.transformer
        shape = (n, network.config.in_channels, *size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=network.dtype)
        if latents.shape != shape:
            raise SodaprofError(
                f"latents have the shape {list(latents.shape)}; {n} generations of this size start from {list(shape)}."
            )
        return latents.to(device)

    def _both_halves(self, embeds: Tensor) -> Tensor:
        """Returns [2n, 1, L, channels]: the prompts' embeddings, then for each the embedding of no text."""
        dtype, device = self.transformer.dtype, self._execution_device
        null = self.transformer.y_embedder.y_embedding.to(device, dtype)
        return torch.cat([embeds.to(device, dtype), null.expand(len(embeds), -1, -1)])[:, None]

    def _size(
        self, height: int | None, width: int | None, resolution: str | None, aspect_ratio: str | None
    ) -> tuple[int, int]:
        """Returns height and width in pixels; SodaprofError if a size is given twice, or half of one."""
        if (height is None) != (width is None) or (resolution is None) != (aspect_ratio is None):
            raise SodaprofError("Half a size: give height and width, or resolution and aspect_ratio, or none of them.")
        if resolution is not None and aspect_ratio is not None:
            if height is not None:
                raise SodaprofError("Two sizes: give height and width, or resolution and aspect_ratio.")
            return size_of(resolution, aspect_ratio)
        height, width = height or self.config.height, width or self.config.width
        if min(height, width) < self.vae.spatial_rate:
            raise SodaprofError(f"{height} × {width} pixels; expected {self.vae.spatial_rate} or more a side.")
        return height, width

    def _check(
        self,
        prompt: str | list[str] | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        output_type: str,
        wanted: tuple[str, ...] | list[str],
    ) -> None:
        """Raises SodaprofError for arguments of a call that exclude each other."""
        if (prompt is None) == (embeds is None) or (embeds is None) != (mask is None):
            raise SodaprofError("Give a prompt, or prompt_embeds with their prompt_attention_mask.")
        length = self.transformer.config.model_max_length
        if embeds is not None and mask is not None and (embeds.ndim != 3 or embeds.shape[1] != length):
            raise SodaprofError(
                f"prompt_embeds have the shape {list(embeds.shape)}, expected [n, {length}, channels]: padded, with a mask."
            )
        if output_type not in OUTPUT_TYPES:
            raise SodaprofError(f"output_type {output_type!r}; expected {', '.join(OUTPUT_TYPES)}.")
        if unknown := set(wanted) - set(self._callback_tensor_inputs):
            raise SodaprofError(
                f"A callback cannot receive {', '.join(sorted(unknown))}; expected {', '.join(self._callback_tensor_inputs)}."
            )
