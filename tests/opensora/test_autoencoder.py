"""Open-Sora's autoencoder, against numbers recorded with the authors' code."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders import vae as diffusers_vae

from sodaprof.errors import SodaprofError
from sodaprof.opensora.autoencoder import AutoencoderKLOpenSora
from tests.parity.shrink_recordings import PIXELS
from tests.recorded import error, recording

DATA, META, WEIGHTS = recording("opensora_vae")
NAMES = ("block_out_channels", "layers_per_block", "norm_num_groups", "filters", "channel_multipliers", "num_res_blocks",
         "temporal_downsample", "num_groups", "micro_frame_size", "micro_batch_size", "spatial_factor")  # fmt: skip
CONFIG = {name: (META["spatial"] | META["temporal"] | META)[name] for name in NAMES}
CONFIG |= {"latents_mean": META["shift"], "latents_std": META["scale"]}
in_precisions = pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


def autoencoder(dtype: torch.dtype = torch.float64, **changes) -> AutoencoderKLOpenSora:
    vae = AutoencoderKLOpenSora(**CONFIG | changes)
    vae.load_state_dict(WEIGHTS)
    return vae.to(dtype).eval()


@in_precisions
@pytest.mark.parametrize("case", [k.split("/")[2] for k in DATA if k.startswith("in/temporal/") and k.endswith("/x")])
@torch.no_grad()
def test_temporal_half(case, dtype, limit):
    half, given, wanted = autoencoder(dtype).temporal_vae, f"in/temporal/{case}/", f"out/temporal/{case}/"
    assert error(half.moments(DATA[given + "x"].to(dtype)), DATA[wanted + "moments"]) < limit
    assert error(half.decode(DATA[given + "z"].to(dtype), int(case[1:])), DATA[wanted + "x"]) < limit


@in_precisions
@pytest.mark.parametrize("case", [k.split("/")[2] for k in DATA if k.startswith("in/pipe/") and k.endswith("/video")])
@torch.no_grad()
def test_encoding_with_the_recorded_noise(case, dtype, limit, monkeypatch):
    noise, frame_axis = f"in/pipe/{case}/noise_", {4: 0, 5: 2}  # by the axes of a draw: frames, or chunks
    frames = {4: iter(DATA[noise + "spatial"]), 5: iter(DATA[noise + "temporal"].unbind(2))}

    def recorded(shape, dtype, **options):
        axis = frame_axis[len(shape)]
        return torch.stack([next(frames[len(shape)]) for _ in range(shape[axis])], axis).to(dtype)

    monkeypatch.setattr(diffusers_vae, "randn_tensor", recorded)
    found = autoencoder(dtype).encode(DATA[f"in/pipe/{case}/video"].to(dtype))
    assert error(found, DATA[f"out/pipe/{case}/z"]) < limit


@in_precisions
@pytest.mark.parametrize("case", [k.split("/")[2] for k in DATA if k.startswith("in/pipe/") and k.endswith("/z")])
@torch.no_grad()
def test_decode(case, dtype, limit):
    video = autoencoder(dtype).decode(DATA[f"in/pipe/{case}/z"].to(dtype), int(case[1:]))
    assert error(video[PIXELS], DATA[f"out/pipe/{case}/video"]) < max(limit, 1e-7)  # stored in single precision
    assert video.shape[3:] == (16, 24)  # of 20 × 28 pixels


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
    vae, whole, one_chunk = autoencoder(), autoencoder(micro_batch_size=7), autoencoder(micro_frame_size=None)
    assert error(whole.decode(z, 20), vae.decode(z, 20)) < 1e-12
    assert error(whole.encode(video, sample=False), vae.encode(video, sample=False)) < 1e-12
    assert error(one_chunk(video), vae(video)) > 1e-3


@torch.no_grad()
def test_encoding_draws_from_the_generator():
    vae, video = autoencoder(), DATA["in/pipe/F001/video"].double()
    first, again, other = (vae.encode(video, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_latents_of_another_number_of_frames_are_refused():
    with pytest.raises(SodaprofError, match="5 latent frames for 20 frames, which have 6"):
        autoencoder().decode(torch.zeros(1, 4, 5, 2, 3, dtype=torch.float64), 20)


def test_levels_and_halvings_must_agree():
    with pytest.raises(SodaprofError, match="one fewer"):
        AutoencoderKLOpenSora(**CONFIG | {"temporal_downsample": (True, True)})
