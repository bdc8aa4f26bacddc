"""The clips that tiny-opensora is trained on, and the reading that judges it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sodaprof
from sodaprof.opensora.autoencoder import AutoencoderKLOpenSora
from sodaprof.opensora.prompts import with_scores
from tests.reference import motions, scenes
from tests.reference.linear_start import start_linear, start_linear_in_time
from tests.reference.motions import Motions, Reading, caption, draw, held_out, read, sample, vocabulary
from tests.reference.train_tiny_opensora import (
    AES,
    LENGTH,
    VAE,
    Trained,
    export,
    make_network,
    make_text_encoder,
    make_tokenizer,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(batch: Motions, row: int) -> Reading:
    return Reading(
        scenes.SHAPES[int(batch.shape[row])],
        list(scenes.COLOURS)[int(batch.colour[row])],
        list(motions.DIRECTIONS)[int(batch.direction[row])],
    )


@pytest.mark.parametrize("unseen", [False, True])
def test_combinations_are_kept_apart(unseen):
    batch = sample(400, generator(), unseen)
    assert len(batch) == 400
    assert (held_out(batch) == unseen).all()
    for values in (batch.shape, batch.colour, batch.direction, batch.ground):
        assert len(values.unique()) == int(values.max()) + 1 > 2  # every value occurs on both sides
    total = len(scenes.SHAPES) * len(scenes.COLOURS) * len(motions.DIRECTIONS)
    every = torch.cartesian_prod(*(torch.arange(n) for n in (5, 6, 4))).unbind(1)
    assert held_out(Motions(*every, every[0])).sum() * 6 == total


def test_clips_repeat_themselves_and_move():
    batch = sample(6, generator())
    clips = draw(batch, generator(1))
    assert clips.shape == (6, 3, motions.FRAMES, motions.SIZE, motions.SIZE)
    assert clips.abs().max() <= 1
    assert torch.equal(clips, draw(batch, generator(1)))
    assert not torch.equal(clips, draw(batch, generator(2)))
    assert (clips.diff(dim=2).abs().amax((1, 3, 4)) > 0.01).all()


def softened(clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns the clips [B, 3, T, H, W] as an autoencoder may return them: blurred, and with noise."""
    flat = clips.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(flat, scale_factor=0.6, mode="bilinear")
    flat = F.interpolate(small, motions.SIZE, mode="bilinear")
    noisy = flat + 0.08 * torch.randn(flat.shape, generator=generator)
    return noisy.unflatten(0, (len(clips), -1)).transpose(1, 2)


@pytest.mark.parametrize("spoil", [lambda x: x, lambda x: softened(x, generator(3))], ids=["drawn", "softened"])
def test_what_was_drawn_is_read(spoil):
    batch = sample(60, generator(), unseen=True)
    clips = spoil(draw(batch, generator(1)))
    found = [read(clip) for clip in clips]
    assert found == [asked(batch, row) for row in range(len(batch))]


def test_what_shows_nothing_is_read_as_nothing():
    batch = sample(1, generator())
    clip = draw(batch, generator(1))[0]
    nothing = Reading(None, None, None)
    assert read(torch.zeros_like(clip)) == nothing
    assert read(0.1 * torch.randn(clip.shape, generator=generator())) == nothing
    gone = clip.clone()
    gone[:, 5] = gone[:, 5, :1, :1]
    assert read(gone) == nothing
    still = clip[:, :1].expand_as(clip)
    assert read(still) == Reading(asked(batch, 0).shape, asked(batch, 0).colour, None)
    assert (
        read(clip.flip(1)).direction
        == {"left": "right", "right": "left", "up": "down", "down": "up"}[str(asked(batch, 0).direction)]
    )


def test_captions_say_what_is_drawn():
    batch, words = sample(200, generator()), generator(4)
    said = [caption(batch, row, words) for row in range(len(batch))]
    for row, text in enumerate(said):
        wanted = asked(batch, row)
        assert text.split()[1:3] == [wanted.colour, wanted.shape]
        assert text.split()[4] == wanted.direction
    assert {word for text in said for word in text.split()} == set(vocabulary())


def test_the_tokenizer_knows_every_caption():
    batch, words, tokenizer = sample(300, generator(), unseen=True), generator(5), make_tokenizer()
    texts = [with_scores(caption(batch, row, words), AES, None, None) for row in range(len(batch))]
    tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True)
    assert tokenizer.unk_token_id not in {token for ids in tokens.input_ids for token in ids}
    assert all(
        ids[sum(mask) - 1] == tokenizer.eos_token_id
        for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)
    )
    assert max(map(sum, tokens.attention_mask)) < LENGTH  # none is cut off


def test_the_folder_is_small_and_its_clips_are_those_trained_on(tmp_path):
    torch.manual_seed(0)
    AutoencoderKLOpenSora(**VAE).save_pretrained(tmp_path / "vae")
    tokenizer = make_tokenizer()
    export(tmp_path, Trained(make_text_encoder(len(tokenizer)), make_network()), tokenizer)
    assert sum(p.stat().st_size for p in (tmp_path / "pipeline").rglob("*") if p.is_file()) < 5.2e6
    pipe = sodaprof.load_pipeline(str(tmp_path / "pipeline"), device="cpu")
    frames = pipe("a red disk moves right", num_inference_steps=1).frames
    assert frames.shape == (1, motions.FRAMES, motions.SIZE, motions.SIZE, 3)


def test_a_linear_start_repeats_averages():
    vae = AutoencoderKLOpenSora(**VAE).spatial_vae.module
    start_linear(vae)
    x = draw(sample(2, generator()), generator(1))[:, :, 0]
    with torch.no_grad():
        found = vae.decode(vae.encode(x).latent_dist.mean).sample
    wanted = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)
    assert (found - wanted).square().mean() < 1e-3 < (x - wanted).square().mean()


def test_a_linear_start_in_time_repeats_averages():
    half = AutoencoderKLOpenSora(**VAE).temporal_vae
    start_linear_in_time(half)
    x = torch.randn(2, 4, motions.FRAMES, 8, 8, generator=generator())
    with torch.no_grad():
        found = half(x)
    averages = F.pad(x, (0, 0, 0, 0, 3, 0)).unflatten(2, (5, 4)).mean(3)
    wanted = averages.repeat_interleave(4, 2)[:, :, 3:]
    assert (found - wanted).square().mean() < 0.01 * wanted.square().mean()
