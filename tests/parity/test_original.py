"""DiT and PixArt-α from their original checkpoints, against numbers recorded with the authors' code.

The sinusoids of the timestep are the recorded ones: see sinusoids.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import load_file, save_file
from torch import Tensor

from sodaprof.errors import FormatError
from tests.parity.original import load_dit, load_pixart, pixart_null_embedding
from tests.parity.sinusoids import recorded_sinusoids

FOLDER = Path(__file__).parents[1] / "data"
HEADS = 4
DATA = {name: load_file(FOLDER / f"{name}.safetensors") for name in ("dit_toca_ddim50", "pixart_toca_20")}
LOAD: dict[str, Callable[..., Any]] = {"dit_toca_ddim50": load_dit, "pixart_toca_20": load_pixart}
NAMES = pytest.mark.parametrize("name", DATA)


def weights_of(name: str) -> dict[str, Tensor]:
    return {k.removeprefix("weights/"): v for k, v in DATA[name].items() if k.startswith("weights/")}


def arguments(name: str) -> dict[str, Any]:
    """Returns those of the first call, at which everything is computed; guidance halves: DiT's the null class last,
    PixArt's the null text first.
    """
    data = DATA[name]
    given = {"hidden_states": data["call/000/x"].repeat(2, 1, 1, 1), "timestep": data["call/000/t"]}
    if name.startswith("dit"):
        null = torch.full_like(data["labels"], len(data["weights/y_embedder.embedding_table.weight"]) - 1)
        return given | {"class_labels": torch.cat([data["labels"], null])}
    sizes = {"resolution": None, "aspect_ratio": None}
    text = torch.cat([data["null"], data["cap"]])[:, 0]
    mask = data["mask"].repeat(2, 1)
    return given | {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}


def output(model: Any, name: str) -> Tensor:
    """Returns the recorded coordinates of the output: one of each token and sample."""
    given = {k: v.to(model.dtype) if k == "hidden_states" else v for k, v in arguments(name).items()}
    if "encoder_hidden_states" in given:
        given["encoder_hidden_states"] = given["encoder_hidden_states"].to(model.dtype)
    with torch.no_grad(), recorded_sinusoids(DATA[name]):
        return model(**given).sample[tuple(DATA[name]["coordinates"].long().T)]


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@NAMES
def test_outputs_in_double_precision(name):
    model = LOAD[name](weights_of(name), torch.float64, heads=HEADS)
    assert not model.training
    assert error(output(model, name), DATA[name]["call/000/out"]) < 6e-8  # outputs were stored in single precision


@NAMES
def test_outputs_in_single_precision(name):
    model = LOAD[name](weights_of(name), heads=HEADS)
    assert {p.dtype for p in [*model.parameters(), *model.buffers()]} == {torch.float32}
    assert error(output(model, name), DATA[name]["call/000/out"]) < 1e-5


@NAMES
def test_outputs_do_not_depend_on_how_the_cpu_rounds_exp(name, monkeypatch):
    model = LOAD[name](weights_of(name), torch.float64, heads=HEADS)
    wanted, exp = output(model, name), torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: torch.nextafter(exp(x), torch.zeros(())))
    assert torch.equal(output(model, name), wanted)
    monkeypatch.setitem(DATA, name, {k: v for k, v in DATA[name].items() if not k.startswith("sinusoid/")})
    assert not torch.equal(output(model, name), wanted)


def test_configuration_of_dit():
    config = load_dit(weights_of("dit_toca_ddim50"), heads=HEADS).config
    wanted = {
        "num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 4, "in_channels": 4, "out_channels": 8,
        "patch_size": 2, "sample_size": 16, "num_embeds_ada_norm": 10, "norm_eps": 1e-6,
    }  # fmt: skip
    assert wanted.items() <= dict(config).items()


def test_configuration_of_pixart():
    config = load_pixart(weights_of("pixart_toca_20"), heads=HEADS).config
    wanted = {
        "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 28, "in_channels": 4, "out_channels": 8,
        "patch_size": 2, "sample_size": 16, "caption_channels": 32, "cross_attention_dim": 32, "norm_eps": 1e-6,
        "use_additional_conditions": False, "interpolation_scale": 1.0,
    }  # fmt: skip
    assert wanted.items() <= dict(config).items()


def test_null_embedding():
    found = pixart_null_embedding(weights_of("pixart_toca_20"))
    assert torch.equal(found, DATA["pixart_toca_20"]["null"][0, 0].float())


def sized(width: int = 96, text: int = 20, scale: float = 2) -> dict[str, Tensor]:
    """Returns random weights of two blocks in the manner of PixArt-XL-2-1024-MS: told resolution and aspect ratio."""
    generator = torch.Generator().manual_seed(0)
    linears = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "t_block.1": (6 * width, width),
        "y_embedder.y_proj.fc1": (width, text), "y_embedder.y_proj.fc2": (width, width),
        "final_layer.linear": (32, width), "csize_embedder.mlp.0": (width // 3, 256),
        "csize_embedder.mlp.2": (width // 3, width // 3), "ar_embedder.mlp.0": (width // 3, 256),
        "ar_embedder.mlp.2": (width // 3, width // 3), "x_embedder.proj": (width, 4, 2, 2),
    }  # fmt: skip
    for layer in range(2):
        linears |= {
            f"blocks.{layer}.{name}": shape
            for name, shape in {
                "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                "mlp.fc2": (width, 4 * width), "cross_attn.q_linear": (width, width),
                "cross_attn.kv_linear": (2 * width, width), "cross_attn.proj": (width, width),
            }.items()
        }  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in linears.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in linears.items()}
    tables = {"blocks.0": 6, "blocks.1": 6, "final_layer": 2}
    tensors |= {f"{k}.scale_shift_table": torch.randn(n, width, generator=generator) for k, n in tables.items()}
    table = get_2d_sincos_pos_embed(width, 8, base_size=8, interpolation_scale=scale, output_type="pt")
    return tensors | {"pos_embed": table.float()[None], "y_embedder.y_embedding": torch.zeros(12, text)}


def test_weights_told_resolution_and_aspect_ratio():
    tensors = sized()
    model = load_pixart(tensors)
    assert model.config.use_additional_conditions
    assert model.config.interpolation_scale == 2
    embedders = model.adaln_single.emb
    assert torch.equal(embedders.resolution_embedder.linear_1.weight, tensors["csize_embedder.mlp.0.weight"])
    assert torch.equal(embedders.aspect_ratio_embedder.linear_2.bias, tensors["ar_embedder.mlp.2.bias"])
    keys, values = tensors["blocks.1.cross_attn.kv_linear.weight"].chunk(2)
    assert torch.equal(model.transformer_blocks[1].attn2.to_k.weight, keys)
    assert torch.equal(model.transformer_blocks[1].attn2.to_v.weight, values)
    sizes = {"resolution": torch.full((1, 2), 128.0), "aspect_ratio": torch.ones(1, 1)}
    with torch.no_grad():
        out = model(torch.randn(1, 4, 16, 16), torch.randn(1, 5, 20), torch.tensor([3]), sizes).sample
    assert out.shape == (1, 8, 16, 16)


@pytest.mark.parametrize("scale", [0.5, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions(scale, dtype):
    """diffusers computes them anew for other sizes and after saving; both need the scale."""
    tensors = {k: v.to(dtype) for k, v in sized(scale=scale).items()}
    model = load_pixart(tensors)
    assert model.config.interpolation_scale == scale
    again = PixArtTransformer2DModel(**dict(model.config))
    assert error(again.pos_embed.pos_embed, model.pos_embed.pos_embed) < (1e-6 if dtype == torch.float32 else 1e-3)


@NAMES
@pytest.mark.parametrize("nested", [None, "state_dict", "ema", "model"])
def test_files(tmp_path, name, nested):
    tensors = weights_of(name)
    wanted = LOAD[name](tensors, heads=HEADS).state_dict()
    path = tmp_path / "weights.pt"
    if nested is None:
        torch.save(tensors, path)
        save_file(tensors, tmp_path / "weights.safetensors")
        found = LOAD[name](str(tmp_path / "weights.safetensors"), heads=HEADS).state_dict()
        assert all(torch.equal(found[k], v) for k, v in wanted.items())
    else:
        torch.save({nested: tensors, "args": argparse.Namespace(epochs=3), "steps": 7}, path)
    found = LOAD[name](path, heads=HEADS).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())


def test_the_averaged_weights_of_a_training_checkpoint_are_taken(tmp_path):
    tensors = weights_of("dit_toca_ddim50")
    torch.save({"model": {k: 2 * v for k, v in tensors.items()}, "ema": tensors}, tmp_path / "weights.pt")
    model = load_dit(tmp_path / "weights.pt", heads=HEADS)
    assert torch.equal(model.proj_out_2.bias, tensors["final_layer.linear.bias"])


@NAMES
def test_the_given_weights_stay_apart_from_the_model(name):
    tensors = weights_of(name)
    model = LOAD[name](tensors, heads=HEADS)
    before = {k: v.clone() for k, v in tensors.items()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)
    assert all(torch.equal(tensors[k], v) for k, v in before.items())
    if name.startswith("dit"):  # an embedder a block: one changed leaves the others
        first, second, *_ = model.transformer_blocks
        first.norm1.emb.timestep_embedder.linear_1.bias.data.add_(1)
        assert error(first.norm1.emb.timestep_embedder.linear_1.bias, second.norm1.emb.timestep_embedder.linear_1.bias)


def test_saved_models_read_back(tmp_path):
    """All of PixArt; DiT but for the timestep frequencies, which its configuration cannot hold."""
    load_pixart(weights_of("pixart_toca_20"), heads=HEADS).save_pretrained(tmp_path / "pixart")
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "pixart").double()
    assert error(output(again, "pixart_toca_20"), DATA["pixart_toca_20"]["call/000/out"]) < 1e-6
    load_dit(weights_of("dit_toca_ddim50"), heads=HEADS).save_pretrained(tmp_path / "dit")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "dit").double()
    assert error(output(again, "dit_toca_ddim50"), DATA["dit_toca_ddim50"]["call/000/out"]) > 0.01
    for block in again.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert error(output(again, "dit_toca_ddim50"), DATA["dit_toca_ddim50"]["call/000/out"]) < 1e-6


# ---- refusals ---------------------------------------------------------------------------------------------------------

BROKEN: dict[str, Callable[[dict[str, Tensor]], None]] = {
    r"missing blocks\.1\.attn\.proj\.bias\.": lambda w: w.pop("blocks.1.attn.proj.bias"),
    r"missing final_layer.* and \d more": lambda w: [w.pop(k) for k in list(w) if k.startswith(("final", "x_", "t_embed"))][:0],
    r"missing pos_embed\.": lambda w: w.pop("pos_embed"),
    r"unknown blocks\.0\.attn\.sr\.weight": lambda w: w.update({"blocks.0.attn.sr.weight": torch.zeros(2)}),
    r"missing blocks\.1\.": lambda w: w.update({"blocks.77.attn.qkv.weight": w.pop("blocks.1.attn.qkv.weight")}),
    r"blocks\.0\.mlp\.fc1\.weight has the shape": lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.zeros(7, 48)}),
    r"pos_embed has the shape \[1, 63, ": lambda w: w.update(pos_embed=w["pos_embed"][:, 1:]),
    r"x_embedder\.proj\.weight has the shape": lambda w: w.update({"x_embedder.proj.weight": torch.zeros(48, 16)}),
    r"has 33 outputs": lambda w: w.update({"final_layer.linear.weight": torch.zeros(33, 48)}),
    r"weights of torch\.int8": lambda w: w.update({"x_embedder.proj.weight": w["x_embedder.proj.weight"].char()}),
    r"expected tensors by name": lambda w: w.update(pos_embed=3),
}  # fmt: skip


@NAMES
@pytest.mark.parametrize("message", BROKEN)
def test_weights_of_another_network(name, message):
    tensors = weights_of(name)
    BROKEN[message](tensors)
    with pytest.raises(FormatError, match=message):
        LOAD[name](tensors, heads=HEADS)


def test_each_loader_refuses_the_other_network():
    with pytest.raises(FormatError, match=r"unknown blocks\.0\.adaLN_modulation.*Expected \d+ tensors under the orig"):
        load_pixart(weights_of("dit_toca_ddim50"), heads=HEADS)
    with pytest.raises(FormatError, match=r"missing blocks\.0\.adaLN_modulation.*unknown blocks\.0\.cross_attn"):
        load_dit(weights_of("pixart_toca_20"), heads=HEADS)
    with pytest.raises(FormatError, match=r"no y_embedder\.y_embedding"):
        pixart_null_embedding(weights_of("dit_toca_ddim50"))


@NAMES
def test_heads_that_do_not_divide_the_width(name):
    for heads in (0, 5, 64):
        with pytest.raises(FormatError, match=rf"does not divide into {heads} heads"):
            LOAD[name](weights_of(name), heads=heads)


@NAMES
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_hold_no_weights(tmp_path, name, suffix):
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(FormatError, match="no such file"):
        LOAD[name](path)
    for content in (b"", b"not a checkpoint", b"\x80\x02."):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="not readable as weights"):
            LOAD[name](path)
    with pytest.raises(FormatError, match="no such file"):
        LOAD[name](tmp_path)


def test_files_that_would_run_code(tmp_path):
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(FormatError, match="not readable as weights"):
        load_dit(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [{}, [], {"state_dict": {}}, {"state_dict": [1]}, {"epoch": 3}, torch.zeros(3)], ids=str
)
def test_files_of_other_things(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(FormatError, match="expected tensors by name"):
        load_dit(tmp_path / "weights.pt")
