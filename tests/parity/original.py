"""Loads the checkpoints of Meta's DiT and of PixArt-α under their published names, as diffusers models.

Each parameter of the original gives one or more of diffusers': fused projections are cut along their first axis, and
what diffusers holds in every block (DiT's embedders) is repeated. The tables `*_MODULES` say which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor

from sodaprof.errors import FormatError
from sodaprof.formats.files import checked
from sodaprof.opensora.weights import Weights, check_names, read_weights, shape_of

Modules = Mapping[str, tuple[str, ...]]  # original module -> diffusers' for each equal part of its weight and its bias
Parts = tuple[tuple[str, ...], ...]  # diffusers' names of each equal part of an original tensor
BLOCK = re.compile(r"blocks\.(\d+)\.")
BLOCK_MODULES: Modules = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
DIT_BLOCK_MODULES: Modules = {**BLOCK_MODULES, "adaLN_modulation.1": ("norm1.linear",)}
DIT_MODULES: Modules = {
    "x_embedder.proj": ("pos_embed.proj",),
    "final_layer.adaLN_modulation.1": ("proj_out_1",),
    "final_layer.linear": ("proj_out_2",),
}
DIT_EMBEDDERS = {  # of the whole network, in every block of diffusers'
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
PIXART_BLOCK_MODULES: Modules = {
    **BLOCK_MODULES,
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
}
PIXART_MODULES: Modules = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
PIXART_SIZE_MODULES: Modules = {  # of checkpoints that are told resolution and aspect ratio (1024-MS)
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
}
POSITIONS, NULL = "pos_embed", "y_embedder.y_embedding"


def load_dit(weights: Weights, dtype: torch.dtype | None = None, heads: int = 16) -> DiTTransformer2DModel:
    """Returns Meta's DiT in evaluation mode; its class `num_embeds_ada_norm` stands for no class.

    weights: a .pt or .safetensors file, or tensors by their original names; dtype: by default the stored one; heads:
    16 in DiT-XL and DiT-L, 12 in DiT-B, 6 in DiT-S, and nowhere in the weights. Raises FormatError for a file that is
    missing or broken and for weights of another network.

    Meta's timestep frequencies end one step short of diffusers': this is set on the modules, for the configuration
    cannot hold it. After `save_pretrained` and `from_pretrained` it is gone, and outputs differ: load the original.
    """
    tensors, where = read_weights(weights)
    layers = _layers(tensors)
    blocks = "transformer_blocks.{}.norm1.emb."
    table: dict[str, Parts] = {
        name: (tuple(blocks.format(layer) + target for layer in range(layers)),)
        for name, target in DIT_EMBEDDERS.items()
    }
    table |= _pairs(DIT_MODULES, DIT_BLOCK_MODULES, layers)
    check_names(tensors, [*table, POSITIONS], where)

    def build() -> DiTTransformer2DModel:
        return DiTTransformer2DModel(
            **_common(tensors, heads, layers, where),
            norm_eps=1e-6,
            num_embeds_ada_norm=shape_of(tensors, "y_embedder.embedding_table.weight", 2, where)[0] - 1,
        )

    model = _filled(build, table, tensors, dtype, where)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def load_pixart(weights: Weights, dtype: torch.dtype | None = None, heads: int = 16) -> PixArtTransformer2DModel:
    """Returns PixArt-α in evaluation mode; `pixart_null_embedding` has what stands for no text, which diffusers drops.

    weights, dtype, heads and errors as for `load_dit`; heads are 16 in PixArt-XL. Weights that embed resolution and
    aspect ratio (1024-MS) give a model with `use_additional_conditions`.
    """
    tensors, where = read_weights(weights)
    layers = _layers(tensors)
    sized = any(name.startswith(("csize_embedder.", "ar_embedder.")) for name in tensors)
    table = _pairs({**PIXART_MODULES, **(PIXART_SIZE_MODULES if sized else {})}, PIXART_BLOCK_MODULES, layers)
    for layer in range(layers):
        table[f"blocks.{layer}.scale_shift_table"] = ((f"transformer_blocks.{layer}.scale_shift_table",),)
    table["final_layer.scale_shift_table"] = (("scale_shift_table",),)
    check_names(tensors, [*table, POSITIONS, NULL], where)

    def build() -> PixArtTransformer2DModel:
        common = _common(tensors, heads, layers, where)
        return PixArtTransformer2DModel(
            **common,
            norm_eps=1e-6,
            cross_attention_dim=common["num_attention_heads"] * common["attention_head_dim"],
            caption_channels=shape_of(tensors, "y_embedder.y_proj.fc1.weight", 2, where)[1],
            use_additional_conditions=sized,
            interpolation_scale=_interpolation_scale(tensors[POSITIONS]),
        )

    return _filled(build, table, tensors, dtype, where)


def pixart_null_embedding(weights: Weights) -> Tensor:
    """Returns what stands for no text in the original's guidance, [L, channels] before the text projection.

    weights and errors as for `load_pixart`. The original masks it to the length of the prompt.
    """
    tensors, where = read_weights(weights)
    if NULL not in tensors:
        raise FormatError(f"{where}: no {NULL}; expected the weights of PixArt under their original names.")
    shape_of(tensors, NULL, 2, where)
    return tensors[NULL]


def _layers(tensors: Mapping[str, Tensor]) -> int:
    """Returns how many blocks the names count; gaps show as missing names afterwards."""
    return len({match[1] for match in map(BLOCK.match, tensors) if match})


def _pairs(modules: Modules, blocks: Modules, layers: int) -> dict[str, Parts]:
    """Returns {original name: parts} of the weights and biases of these modules, and of those of every block."""
    every = dict(modules)
    for layer in range(layers):
        for name, targets in blocks.items():
            every[f"blocks.{layer}.{name}"] = tuple(f"transformer_blocks.{layer}.{target}" for target in targets)
    return {
        f"{name}.{kind}": tuple((f"{target}.{kind}",) for target in targets)
        for name, targets in every.items()
        for kind in ("weight", "bias")
    }


def _common(tensors: Mapping[str, Tensor], heads: int, layers: int, where: str) -> dict[str, Any]:
    """Returns the part of the configuration that DiT and PixArt share, read off the shapes."""
    width, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4, where)
    tokens = shape_of(tensors, POSITIONS, 3, where)[1]
    out = shape_of(tensors, "final_layer.linear.weight", 2, where)[0]
    side = math.isqrt(tokens)
    if tuple(tensors[POSITIONS].shape) != (1, side * side, width):
        raise FormatError(
            f"{where}: {POSITIONS} has the shape {list(tensors[POSITIONS].shape)}, expected [1, a square, {width}]."
        )
    if heads < 1 or width % heads:
        raise FormatError(f"{where}: the width {width} does not divide into {heads} heads. Give the heads= it has.")
    if out % patch**2:
        raise FormatError(f"{where}: final_layer.linear has {out} outputs, expected a multiple of {patch}·{patch}.")
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": out // patch**2,
        "num_layers": layers,
        "sample_size": side * patch,
        "patch_size": patch,
    }


def _interpolation_scale(positions: Tensor) -> float | None:
    """Returns the factor by which PixArt's positions [1, N, D] are drawn together, None where they do not tell.

    The second token's first sine and cosine are of its column, the angle 1 / scale. diffusers needs the scale where it
    computes positions itself: for other sizes, and after saving.
    """
    if positions.shape[1] < 2 or positions.shape[2] < 4:
        return None
    sine, cosine = float(positions[0, 1, 0]), float(positions[0, 1, positions.shape[2] // 4])
    angle = math.atan2(sine, cosine)
    return round(1 / angle, 2) if angle > 0.01 else None


def _filled(
    build: Callable[[], Any],
    table: dict[str, Parts],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    where: str,
) -> Any:
    """Returns the model that `build` makes, with the tensors in place; FormatError where a shape does not fit."""
    dtype = dtype or tensors["x_embedder.proj.weight"].dtype
    if not dtype.is_floating_point:
        raise FormatError(f"{where}: weights of {dtype}, expected floating-point numbers.")
    with torch.device("meta"):
        model = checked(build, where)
    empty = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, parts in table.items():
        whole, shape = tensors[name], empty[parts[0][0]].shape
        wanted = [len(parts) * shape[0], *shape[1:]]
        if list(whole.shape) != wanted:
            raise FormatError(f"{where}: {name} has the shape {list(whole.shape)}, expected {wanted}.")
        for targets, part in zip(parts, whole.chunk(len(parts)), strict=True):
            # each its own memory: files cannot hold tensors that share it
            state |= {target: part.to(dtype, copy=True, memory_format=torch.contiguous_format) for target in targets}
    model.load_state_dict(state, assign=True)
    # a buffer that diffusers does not save: it computes the same positions when it reads the model
    model.pos_embed.pos_embed = tensors[POSITIONS].to(dtype, copy=True)
    return model.eval()
