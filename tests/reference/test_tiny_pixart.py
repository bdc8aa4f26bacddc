"""What ships of tiny-pixart: a whole text-to-image pipeline, small, that follows prompts it was not trained on."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sodaprof.measure.classifier import load_classifier
from sodaprof.pipelines.load import REFERENCE, call, load_pipeline, pictures_of, reference_models
from tests.reference import scenes

MODEL = REFERENCE / "tiny-pixart"
PROMPT = "a large red ring left of a small blue disk on a grey background"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("tiny-pixart", device="cpu")


def test_it_ships_small_and_in_bfloat16():
    assert "tiny-pixart" in reference_models()
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 5_600_000
    for part in ("transformer", "text_encoder", "vae"):
        (weights,) = (MODEL / part).glob("*.safetensors")
        assert {t.dtype for t in load_file(weights).values()} == {torch.bfloat16}


def test_it_is_a_real_pixart_pipeline(pipe):
    assert type(pipe).__name__ == "PixArtAlphaPipeline"
    names = {name: type(part).__name__ for name, part in pipe.components.items()}
    assert names == {
        "tokenizer": "T5Tokenizer",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKL",
        "transformer": "PixArtTransformer2DModel",
        "scheduler": "DPMSolverMultistepScheduler",
    }
    config, scheduler = pipe.transformer.config, pipe.scheduler.config
    assert config.num_layers >= 8
    assert (config.sample_size // config.patch_size) ** 2 >= 64
    assert config.norm_type == "ada_norm_single"
    assert (scheduler.algorithm_type, scheduler.solver_order) == ("dpmsolver++", 2)


def test_it_loads_without_sentencepiece():
    code = (
        "import sys; sys.modules['sentencepiece'] = None\n"  # an import of it raises from here on
        "from sodaprof.pipelines.load import load_pipeline\n"
        f"ids = load_pipeline('tiny-pixart', device='cpu').tokenizer({PROMPT!r}).input_ids\n"
        "assert len(ids) == 15 and 2 not in ids, ids"  # a token a word and the end; none unknown
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_word_of_the_captions_is_one_token(pipe):
    words = scenes.vocabulary()
    ids = pipe.tokenizer(words).input_ids
    assert all(len(i) == 2 and i[0] > 2 for i in ids)
    assert len({i[0] for i in ids}) == len(words)


def test_the_judge_knows_held_out_drawings():
    generator = torch.Generator().manual_seed(77_777)
    asked = scenes.sample(500, generator, unseen=True)
    found = load_classifier(MODEL).predictions(scenes.draw(asked, generator))
    assert (found == scenes.answers(asked)).float().mean(0).min() >= 0.99


def test_it_follows_prompts_that_are_held_out(pipe):
    generator = torch.Generator().manual_seed(3_000_000)
    asked = scenes.sample(24, generator, unseen=True)
    captions = [scenes.caption(asked, row, generator) for row in range(len(asked))]
    pictures = pictures_of(call(pipe, [c.text for c in captions], range(3_000_000, 3_000_024), 10))
    assert pictures.shape == (24, 32, 32, 3)
    found = load_classifier(MODEL).predictions(torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1)
    followed = scenes.followed(asked, torch.tensor([c.says_size for c in captions]), found)
    shares = {what: right.float().mean().item() for what, right in followed.items()}
    assert min(shares[what] for what in ("shape", "colour", "relation", "size")) >= 0.8, shares  # chance: below 0.5
    # the same pictures, held against other prompts: the judge says no
    others = scenes.followed(asked[torch.arange(24).roll(1)], torch.ones(24, 2, dtype=torch.bool), found)
    assert others["all"].float().mean() < 0.2


def test_without_the_prompt_it_draws_something_else(pipe):
    told, untold = (pictures_of(call(pipe, [text], [3_000_000], 20)) for text in (PROMPT, ""))
    assert abs(told - untold).mean() > 0.05


class Binning:
    """Stands in for a pipeline that rounds picture sizes; returns what it is called with."""

    def __init__(self, sample_size):
        self.transformer = SimpleNamespace(config={"sample_size": sample_size})
        self.vae_scale_factor = 8

    def __call__(self, prompt, generator, num_inference_steps, output_type, use_resolution_binning=True):
        return use_resolution_binning


@pytest.mark.parametrize(("sample_size", "bins"), [(4, False), (31, False), (32, True), (128, True), (None, True)])
def test_sizes_are_rounded_only_by_pipelines_that_are_as_large(sample_size, bins):
    assert call(Binning(sample_size), ["a"], [0], 1) is bins


def test_a_longer_text_window_changes_nothing(pipe):
    def picture(length):
        return pipe(
            PROMPT, generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np",
            use_resolution_binning=False, max_sequence_length=length,
        ).images  # fmt: skip

    assert abs(picture(16) - picture(120)).max() < 1e-3
