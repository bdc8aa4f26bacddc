"""Open-Sora's autoencoder, against numbers recorded with the authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders import vae as diffusers_vae
from safetensors import safe_open
from safetensors.torch import load_file

from sodaprof.errors import SodaprofError
from sodaprof.opensora import autoencoder as module
from sodaprof.opensora.autoencoder import AutoencoderKLOpenSora, draw_from

FILE = Path(__file__).parents[1] / "data" / "opensora_vae.safetensors"
DATA = load_file(FILE)
with safe_open(FILE, "pt") as opened:
    META = json.loads(opened.metadata()["meta"])
WEIGHTS = {k.removeprefix("weights/"): v for k, v in DATA.items() if k.startswith("weights/")}
CONFIG = {k: META["spatial"][k] for k in ("block_out_channels", "layers_per_block", "norm_num_groups")}
CONFIG |= {
    k: META["temporal"][k]
    for k in ("filters", "channel_multipliers", "num_res_blocks", "temporal_downsample", "num_groups")
}
CONFIG |= {k: META[k] for k in ("micro_frame_size", "micro_batch_size", "spatial_factor")}
CONFIG |= {"latents_mean": META["shift"], "latents_std": META["scale"]}
TEMPORAL = sorted({k.split("/")[2] for k in DATA if k.startswith("in/temporal/")})
WHOLE = sorted({k.split("/")[2] for k in DATA if k.startswith("in/pipe/")})


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def autoencoder(dtype: torch.dtype = torch.float64, **changes) -> AutoencoderKLOpenSora:
    vae = AutoencoderKLOpenSora(**CONFIG | changes)
    vae.load_state_dict(WEIGHTS)
    return vae.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", TEMPORAL)
@torch.no_grad()
def test_temporal_half(case, dtype):
    half, limit = autoencoder(dtype).temporal_vae, 1e-12 if dtype == torch.float64 else 1e-5
    given, wanted = f"in/temporal/{case}/", f"out/temporal/{case}/"
    assert error(half.moments(DATA[given + "x"].to(dtype)), DATA[wanted + "moments"]) < limit
    assert error(half.decode(DATA[given + "z"].to(dtype), int(case[1:])), DATA[wanted + "x"]) < limit


def replay(monkeypatch, case: str) -> None:
    """Makes both halves draw the recorded noise: frame after frame, chunk after chunk."""
    spatial = list(DATA[f"in/pipe/{case}/noise_spatial"])
    temporal = list(DATA[f"in/pipe/{case}/noise_temporal"].unbind(2))

    def of_frames(shape, **kwargs):
        return torch.stack([spatial.pop(0) for _ in range(shape[0])]).to(kwargs["dtype"])

    def of_chunk(shape, **kwargs):
        return torch.stack([temporal.pop(0) for _ in range(shape[2])], 2).to(kwargs["dtype"])

    monkeypatch.setattr(diffusers_vae, "randn_tensor", of_frames)
    monkeypatch.setattr(module, "randn_tensor", of_chunk)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", WHOLE)
@torch.no_grad()
def test_encode(case, dtype, monkeypatch):
    vae, limit = autoencoder(dtype), 1e-12 if dtype == torch.float64 else 1e-5
    video = DATA[f"in/pipe/{case}/video"].to(dtype)
    replay(monkeypatch, case)
    assert error(vae.spatial_vae.encode(video), DATA[f"out/pipe/{case}/x_z"]) < limit
    replay(monkeypatch, case)
    assert error(vae.encode(video), DATA[f"out/pipe/{case}/z"]) < limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", WHOLE)
@torch.no_grad()
def test_decode(case, dtype):
    vae, frames = autoencoder(dtype), int(case[1:])
    z, wanted = DATA[f"in/pipe/{case}/z"].to(dtype), f"out/pipe/{case}/"
    between = torch.cat(list(vae.decode_spatial(z, frames)), 2)
    assert error(between, DATA[wanted + "dec_x_z"]) < (1e-12 if dtype == torch.float64 else 1e-5)
    video = vae.decode(z, frames)
    assert error(video, DATA[wanted + "video"]) < (
        1e-7 if dtype == torch.float64 else 1e-5
    )  # stored in single precision
    assert video.shape[3:] == vae.decoded_size(20, 28)


def test_latent_sizes():
    with torch.device("meta"):
        vae = AutoencoderKLOpenSora(**CONFIG)
    for given, wanted in META["latent_size"]:
        assert list(vae.latent_size(*given)) == wanted
    whole = AutoencoderKLOpenSora.from_config(vae.config | {"micro_frame_size": None})
    assert [whole.latent_size(f, 8, 8)[0] for f in (1, 17, 20, 34)] == [1, 5, 5, 9]


@torch.no_grad()
def test_micro_batches_change_nothing_and_chunks_do():
    z, video = DATA["in/pipe/F020/z"].double(), DATA["in/pipe/F020/video"].double()
    vae, whole = autoencoder(), autoencoder(micro_batch_size=7)
    assert error(whole.decode(z, 20), vae.decode(z, 20)) < 1e-12
    assert error(whole.encode(video, sample=False), vae.encode(video, sample=False)) < 1e-12
    one_chunk = autoencoder(micro_frame_size=None)
    assert one_chunk.encode(video, sample=False).shape[2] == 5
    assert error(one_chunk(video), vae(video)) > 1e-3


@torch.no_grad()
def test_encoding_without_draws_is_the_mean_of_draws():
    vae, video = autoencoder(), DATA["in/pipe/F001/video"].double()
    draws = [vae.encode(video, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    again = vae.encode(video, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws[0], again)
    assert not torch.equal(*draws)
    moments = torch.cat([torch.zeros(1, 4, 1, 1, 1), torch.full((1, 4, 1, 1, 1), -60.0)], 1)
    assert draw_from(moments, torch.ones(1, 4, 1, 1, 1)).flatten()[0] == pytest.approx(torch.e**-15)


@torch.no_grad()
def test_save_and_load(tmp_path):
    vae = autoencoder(torch.float32)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKLOpenSora.from_pretrained(tmp_path)
    assert not loaded.training
    assert set(loaded.state_dict()) == set(WEIGHTS)
    z = DATA["in/pipe/F020/z"]
    assert torch.equal(loaded.decode(z, 20), vae.decode(z, 20))


def test_size_of_the_published_autoencoder():
    with torch.device("meta"):
        vae = AutoencoderKLOpenSora()
    names = list(vae.state_dict())
    assert [sum(n.startswith(p) for n in names) for p in ("spatial_vae.module.", "temporal_vae.", "s")] == [
        248,
        267,
        250,
    ]
    assert len(names) == 517
    assert sum(p.numel() for p in vae.spatial_vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in vae.temporal_vae.parameters()) == 309_687_144
    assert vae.scale.shape == vae.shift.shape == (1, 4, 1, 1, 1)


def test_latents_of_another_number_of_frames_are_refused():
    with pytest.raises(SodaprofError, match="5 latent frames for 20 frames, which have 6"):
        autoencoder().decode(torch.zeros(1, 4, 5, 2, 3, dtype=torch.float64), 20)


def test_levels_and_halvings_must_agree():
    with pytest.raises(SodaprofError, match="one fewer"):
        AutoencoderKLOpenSora(**CONFIG | {"temporal_downsample": (True, True)})
