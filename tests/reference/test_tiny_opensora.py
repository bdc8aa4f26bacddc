"""What ships of tiny-opensora: a whole text-to-video pipeline, small, that follows prompts it was not trained on."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import sodaprof
from sodaprof.pipelines.entries import default_prompts
from sodaprof.pipelines.load import REFERENCE, call, default_steps, load_pipeline, pictures_of
from tests.reference import motions
from tests.reference.train_tiny_opensora import shares

MODEL = REFERENCE / "tiny-opensora"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("tiny-opensora", device="cpu")


def test_it_ships_small_and_in_bfloat16():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 5_300_000
    for part in ("transformer", "text_encoder", "vae"):
        (weights,) = (MODEL / part).glob("*.safetensors")
        assert {t.dtype for t in load_file(weights).values()} == {torch.bfloat16}


def test_it_is_an_open_sora_pipeline(pipe):
    names = {name: type(part).__name__ for name, part in pipe.components.items()}
    assert names == {
        "tokenizer": "T5Tokenizer", "text_encoder": "T5EncoderModel", "vae": "AutoencoderKLOpenSora",
        "transformer": "STDiT3", "scheduler": "RectifiedFlowScheduler",
    }  # fmt: skip
    assert pipe.transformer.config.depth >= 8
    assert default_steps(pipe) == 30
    assert len(default_prompts(pipe)) == 100


def test_it_follows_prompts_that_are_held_out(pipe):
    generator = torch.Generator().manual_seed(1)
    asked = motions.sample(12, generator, unseen=True)
    captions = [motions.caption(asked, row, generator) for row in range(12)]
    clips = torch.from_numpy(pictures_of(call(pipe, captions, range(3_000_000, 3_000_012), 15)))
    assert clips.shape == (12, 17, 32, 32, 3)
    found = shares(clips.permute(0, 4, 1, 2, 3) * 2 - 1, asked)
    assert found["direction"] >= 0.75
    assert found["shape"] >= 0.5
    turned = motions.Motions(asked.shape, asked.colour, asked.direction.roll(1), asked.ground)
    assert shares(clips.permute(0, 4, 1, 2, 3) * 2 - 1, turned)["direction"] < 0.75  # the check can fail


def test_a_schedule_runs_through_it(pipe, tmp_path):
    sodaprof.profile(pipe, tmp_path / "p", steps=8, samples=1, max_interval=3, prompts=["a red disk moves right"])
    schedule = sodaprof.compile_schedule(tmp_path / "p", budget="1.5x")
    with sodaprof.apply(pipe, schedule) as handle:
        call(pipe, ["a red disk moves right"], [5], 8)
        assert handle.report().executed == handle.report().planned
