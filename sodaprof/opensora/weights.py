"""Reads the files that the authors of Open-Sora v1.2 published, under their own names, as a pipeline.

A folder with three folders, each as on the hub:

    OpenSora-STDiT-v3/   model.safetensors           the network (hpcai-tech/OpenSora-STDiT-v3)
    OpenSora-VAE-v1.2/   model.safetensors           both halves of the autoencoder (hpcai-tech/OpenSora-VAE-v1.2)
    t5-v1_1-xxl/         config.json, weights, spiece.model    text encoder and tokenizer (DeepFloyd/t5-v1_1-xxl)

Configurations are read off the tensors' shapes; the authors' config.json of the first two are not read.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from ..errors import FormatError
from ..formats.files import checked
from .autoencoder import AutoencoderKLOpenSora
from .layers import RotaryEmbed
from .network import STDiT3
from .pipeline import OpenSoraPipeline
from .scheduler import RectifiedFlowScheduler

NETWORK, AUTOENCODER, TEXT = "OpenSora-STDiT-v3", "OpenSora-VAE-v1.2", "t5-v1_1-xxl"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # older diffusers' names
OLD_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def is_published(folder: Path) -> bool:
    """Whether the folder has the three folders that `load_published` reads."""
    return all((folder / part).is_dir() for part in (NETWORK, AUTOENCODER, TEXT))


def load_published(folder: str | Path, dtype: torch.dtype | None = None, groups: int = 32) -> OpenSoraPipeline:
    """Returns the pipeline of a folder as above, in `dtype` (the stored one by default), on the CPU.

    The text encoder stays in float32, as the published script runs it: 19 GB for the published one, which
    `pipe.text_encoder.to(torch.bfloat16)` halves. groups: of the autoencoder's norms, which do not follow from its shapes.
    Raises FormatError for folders and files that are missing or of another model.
    """
    folder = Path(folder)
    if not is_published(folder):
        raise FormatError(f"{folder}: expected the folders {NETWORK}, {AUTOENCODER} and {TEXT}, from the hub.")
    network = load_stdit3(folder / NETWORK / "model.safetensors", dtype)
    vae = load_autoencoder(folder / AUTOENCODER / "model.safetensors", dtype, groups)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / TEXT)
        encoder = T5EncoderModel.from_pretrained(folder / TEXT, dtype=torch.float32).eval()
    except Exception as error:  # the readers raise whatever their parts raise
        raise FormatError(f"{folder / TEXT}: not readable as a T5 and its tokenizer ({_reason(error)}).") from None
    return OpenSoraPipeline(tokenizer, encoder, network, vae, RectifiedFlowScheduler())


def load_stdit3(weights: Weights, dtype: torch.dtype | None = None) -> STDiT3:
    """Returns STDiT3 in evaluation mode, from a checkpoint with or without its rotary frequencies.

    weights: a .safetensors or .pt file, or tensors by their published names; dtype: by default the stored one. Raises
    FormatError for a file that is missing or broken and for weights of another network.
    """
    tensors, source = read_weights(weights)
    width, channels, *patch = shape_of(tensors, "x_embedder.proj.weight", 5, source)
    length, captions = shape_of(tensors, "y_embedder.y_embedding", 2, source)
    head = shape_of(tensors, "spatial_blocks.0.attn.q_norm.weight", 1, source)[0]
    hidden = shape_of(tensors, "spatial_blocks.0.mlp.fc1.weight", 2, source)[0]
    out = shape_of(tensors, "final_layer.linear.weight", 2, source)[0]

    build = partial(
        STDiT3, in_channels=channels, patch_size=tuple(patch), hidden_size=width, num_heads=width // head,
        depth=_count(tensors, "spatial_blocks.{}.scale_shift_table"), mlp_ratio=hidden / width,
        caption_channels=captions, model_max_length=length, pred_sigma=out == 2 * channels * math.prod(patch),
    )  # fmt: skip
    tensors.setdefault("rope.freqs", RotaryEmbed(head).freqs)  # not trained, so a checkpoint may leave it out
    return _filled(build, tensors, dtype, source)


def load_autoencoder(weights: Weights, dtype: torch.dtype | None = None, groups: int = 32) -> AutoencoderKLOpenSora:
    """Returns the autoencoder in evaluation mode; its attention may have the names of older releases of diffusers.

    weights, dtype and errors as for `load_stdit3`. groups: of all norms; they do not follow from the shapes.
    """
    tensors, source = read_weights(weights)
    tensors = {_renamed(name): tensor for name, tensor in tensors.items()}
    spatial = _widths(tensors, "spatial_vae.module.encoder.down_blocks.{}.resnets.0.conv1.weight", 4, source)
    temporal = _widths(tensors, "temporal_vae.encoder.block_res_blocks.{}.0.conv1.conv.weight", 5, source)
    if any(width % temporal[0] for width in temporal):
        raise FormatError(f"{source}: temporal levels of {temporal} channels, expected multiples of the first.")

    def build() -> AutoencoderKLOpenSora:
        return AutoencoderKLOpenSora(
            latent_channels=tensors["temporal_vae.encoder.conv_in.conv.weight"].shape[1],
            block_out_channels=tuple(spatial),
            layers_per_block=_count(tensors, "spatial_vae.module.encoder.down_blocks.0.resnets.{}.conv1.weight"),
            norm_num_groups=groups,
            filters=temporal[0],
            channel_multipliers=tuple(width // temporal[0] for width in temporal),
            num_res_blocks=_count(tensors, "temporal_vae.encoder.block_res_blocks.0.{}.conv1.conv.weight"),
            temporal_downsample=tuple(
                f"temporal_vae.encoder.conv_blocks.{i}.conv.weight" in tensors for i in range(len(temporal) - 1)
            ),
            num_groups=groups,
            latents_mean=tuple(tensors["shift"].flatten().tolist()),
            latents_std=tuple(tensors["scale"].flatten().tolist()),
        )

    return _filled(build, tensors, dtype, source)


def _renamed(name: str) -> str:
    match = OLD_NAME.fullmatch(name)
    return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}" if match else name


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Returns how many tensors `pattern.format(i)` there are, i from 0 on without a gap."""
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    return count


def _widths(tensors: Mapping[str, Tensor], pattern: str, axes: int, source: str) -> list[int]:
    """Returns the output channels of the tensors `pattern.format(i)`, i from 0 on."""
    count = max(1, _count(tensors, pattern))  # the first one has to be there
    return [shape_of(tensors, pattern.format(i), axes, source)[0] for i in range(count)]


def _filled(
    build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str
) -> Any:
    """Returns the model of `build` with the tensors as its weights; FormatError for other names or shapes."""
    with torch.device("meta"):
        model: nn.Module = checked(build, source)
    own = model.state_dict()
    check_names(tensors, own, source)
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise FormatError(f"{source}: {name} has the shape {list(tensor.shape)}, expected {list(own[name].shape)}.")
        if not tensor.is_floating_point():
            raise FormatError(f"{source}: {name} is of {tensor.dtype}, expected floating-point numbers.")
    dtype = dtype or next(iter(tensors.values())).dtype
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


Weights = str | Path | Mapping[str, Tensor]

NESTED = ("ema", "state_dict", "model")  # keys of the weights in training checkpoints; the first one found counts


def read_weights(weights: Weights) -> tuple[dict[str, Tensor], str]:
    """Returns the tensors by name, and the name of their source for messages."""
    found: Any = weights
    source = "the given weights"
    if not isinstance(weights, Mapping):
        path = Path(weights)
        source = str(path)
        if not path.is_file():
            raise FormatError(f"{source}: no such file; expected a .pt or .safetensors checkpoint. Check the path.")
        try:
            if path.suffix == ".safetensors":
                found = safetensors.torch.load_file(path)
            else:
                # training checkpoints of DiT hold their arguments, which are plain values
                with torch.serialization.safe_globals([argparse.Namespace]):
                    found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the readers raise whatever their parts raise
            raise FormatError(
                f"{source}: not readable as weights ({_reason(error)}). Fetch the file anew, or save its tensors alone."
            ) from None
    if isinstance(found, Mapping):
        nested = next((name for name in NESTED if isinstance(found.get(name), Mapping)), None)
        found = found if nested is None else found[nested]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise FormatError(f"{source}: expected tensors by name, alone or under {', '.join(NESTED)}.")
    return dict(found), source


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_names(tensors: Mapping[str, Tensor], expected: Iterable[str], source: str) -> None:
    """Raises FormatError unless the tensors have exactly the expected names."""
    wanted = set(expected)
    missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or unknown:
        lists = [f"{word} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                 for word, names in (("missing", missing), ("unknown", unknown)) if names]  # fmt: skip
        raise FormatError(
            f"{source}: {'; '.join(lists)}. Expected {len(wanted)} tensors under the original names, such as "
            f"{', '.join(sorted(wanted)[:2])}. Is this a checkpoint of that network?"
        )


def shape_of(tensors: Mapping[str, Tensor], name: str, axes: int, source: str) -> tuple[int, ...]:
    """Returns the shape of a tensor; FormatError if it is absent or has another number of axes."""
    if name not in tensors:
        raise FormatError(f"{source}: no {name}; expected the weights of that network under their published names.")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise FormatError(f"{source}: {name} has the shape {list(shape)}, expected {axes} axes.")
    return shape
