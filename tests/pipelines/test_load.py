"""Discovery and FLOPs, against what is known of the blocks."""

from __future__ import annotations

from contextlib import nullcontext

import diffusers
import pytest
import torch
import transformers
from diffusers import PixArtTransformer2DModel, UNet2DModel
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import progress_bar_states

import sodaprof
from sodaprof.errors import SodaprofError, UnsupportedModelError
from sodaprof.pipelines import load
from sodaprof.pipelines.discover import Step as RecordedStep
from sodaprof.pipelines.discover import find_sites, inspect_pipeline
from sodaprof.pipelines.entries import check_entries, default_entries, read_prompts
from sodaprof.pipelines.flops import count_flops
from sodaprof.pipelines.load import call, find_model, load_pipeline, transformers_of
from sodaprof.tuning.refine import refine
from tests.tiny_pipelines import SITES, STEPS, schedule_for, tiny_pipe


def test_sites_of_dit():
    model, sampler, _ = inspect_pipeline(tiny_pipe(), "m", STEPS, 4.0, 0)
    sites = model.transformers["transformer"].sites
    assert [s.key for s in sites] == list(SITES)
    assert [s.kind for s in sites] == ["attn", "mlp"] * 2
    assert all((s.tokens, s.width, s.prunable) == (16, 16, True) for s in sites)
    assert sampler.guidance_form == "halves"
    assert sampler.timesteps == (875, 750, 625, 500, 375, 250, 125, 0)
    assert model.shape == {"latent": [4, 8, 8], "tokens": 16, "batch_profiled": 1, "dtype": "float32"}


def test_sites_of_pixart_have_their_kinds():
    torch.manual_seed(0)
    part = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 7, 12), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    pipe = type("P", (), {"components": {"transformer": part}})()
    with torch.no_grad():
        found = find_sites(pipe, "transformer", RecordedStep([("transformer", (), inputs)]))
    assert [(s.module, s.kind, s.prunable) for s in found.sites[:3]] == [
        ("attn1", "attn", True), ("attn2", "cross_attn", True), ("ff", "mlp", True),
    ]  # fmt: skip


def test_flops_are_the_closed_form_of_a_dit_block():
    pipe = tiny_pipe()
    model, _, step = inspect_pipeline(pipe, "m", STEPS, 4.0, 0)
    cost = count_flops(pipe, model, step).transformers["transformer"]
    b, n, d = 2, 16, 16  # both halves, tokens, width
    attn, mlp = cost.sites["transformer_blocks.0.attn1"], cost.sites["transformer_blocks.0.ff"]
    assert 4 * 2 * b * n * d * d + 2 * 2 * b * n * n * d == attn.C
    assert 2 * 2 * b * n * d * 4 * d == mlp.C
    for k in (1, 5, 16):  # keys and values of all tokens; queries, products and projection of k
        assert attn.prune(k) == 2 * 2 * b * n * d * d + 2 * 2 * b * k * d * d + 2 * 2 * b * k * n * d
        assert mlp.prune(k) == mlp.C * k / n
    assert attn.prune(0) == mlp.prune(0) == 0
    assert tuple(2.0 * k * b * n * d for k in (1, 2, 3, 4)) == mlp.F
    blocks = 2 * 2 * b * (6 * d * d + 256 * d + d * d)  # two layers' adaLN and timestep embedder
    head = 2 * b * (256 * d + d * d) + 2 * b * 2 * d * d  # the final embedder and modulation
    patches = 2 * b * n * d * (4 * 4) * 2  # patch embedding and output projection, 4 channels x 2 x 2
    assert cost.step.fixed == blocks + head + patches


def test_a_model_without_attention_blocks_is_refused():
    unet = UNet2DModel(
        8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=1
    )
    pipe = type("P", (), {"components": {"transformer": unet, "unet": unet}})()
    with pytest.raises(UnsupportedModelError, match="no stack of blocks with attention"):
        find_sites(pipe, "transformer", RecordedStep([("transformer", (), {})]))
    with pytest.raises(UnsupportedModelError, match="no transformer"):
        transformers_of(type("P", (), {"components": {"unet": unet}})())


def test_a_model_that_cannot_be_found_or_read_is_named(tmp_path, monkeypatch):
    for name in ("no-such-model", "./missing", "/missing/folder"):
        with pytest.raises(SodaprofError, match=f"{name}: no such folder and no reference model"):
            find_model(name)
    with pytest.raises(SodaprofError, match=r"without model_index\.json"):
        find_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(SodaprofError, match="not loadable"):
        load_pipeline(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SodaprofError, match="not in this machine's cache"):
        load_pipeline("nobody/nothing")


def process_settings():
    """Returns the settings that loading changes for a while."""
    ours, theirs = diffusers.utils.logging, transformers.utils.logging
    timeouts = constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT
    bars = ours.is_progress_bar_enabled(), theirs.is_progress_bar_enabled()
    return timeouts, dict(progress_bar_states), ours.get_verbosity(), *bars


@pytest.mark.parametrize("model", ["tiny-dit", "nobody/nothing"])
def test_loading_leaves_the_settings_of_the_process_as_they_were(model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 77)
    monkeypatch.setitem(progress_bar_states, "a.group", False)
    logging = diffusers.utils.logging
    for library in (diffusers, transformers):
        monkeypatch.setattr(library.utils.logging, "_tqdm_active", True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        before, read, seen = process_settings(), load._read_pipeline, []
        monkeypatch.setattr(load, "_read_pipeline", lambda *args: seen.append(process_settings()) or read(*args))
        with nullcontext() if model == "tiny-dit" else pytest.raises(SodaprofError):
            load_pipeline(model)
        assert process_settings() == before
    finally:
        logging.set_verbosity(verbosity)
    assert seen == [((10, 10), {"_global": False}, logging.ERROR, False, False)]


def test_prompt_files_are_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\n3\n a red ball \n\n-1\n", encoding="utf-8")
    assert read_prompts(path) == [3, "a red ball", -1]
    path.write_text("# nothing\n")
    with pytest.raises(SodaprofError, match="no prompts"):
        read_prompts(path)
    with pytest.raises(SodaprofError, match="not readable"):
        read_prompts(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("a ball", "integer labels"),
        *((n, f"Found the label {n}; this model knows 0 to 9") for n in (-1, 1000, 99999)),
    ],
)
def test_entries_that_the_model_does_not_take_are_refused(entry, says):
    with pytest.raises(SodaprofError, match=says):
        call(tiny_pipe(), [1, entry], [0, 1], STEPS)


def test_names_of_labels_are_taken_where_the_model_has_them():
    pipe = tiny_pipe()
    assert check_entries(pipe, ["class 3", 1, " class 0 "]) == [3, 1, 0]
    assert default_entries(pipe) == ([*range(10)], "the names that the model has for its labels")
    pipe.labels = None
    assert check_entries(pipe, ["class 3"]) == [3]  # of the config


def test_the_default_labels_are_among_those_of_the_model():
    pipe = tiny_pipe()
    pipe.labels = {f"class {i}": 2 * i for i in range(150)}
    entries, _ = default_entries(pipe)
    assert len(entries) == 75
    assert check_entries(pipe, entries) == entries
    with pytest.raises(SodaprofError, match=r"knows 0, 2, 4, 6, 8, …, 298"):
        check_entries(pipe, [1])
    pipe.labels = {f"class {i}": i for i in range(1000)} | {"golden retriever": 207}
    assert default_entries(pipe) == (read_prompts("imagenet-labels"), "the shipped list imagenet-labels")


def test_a_model_of_labels_without_names_is_asked_about(tmp_path):
    pipe = tiny_pipe()
    pipe.labels, schedule = None, schedule_for(pipe)
    pipe.register_to_config(id2label=None)
    for refused in (
        lambda: sodaprof.profile(pipe, tmp_path / "p", steps=STEPS, samples=2),
        lambda: sodaprof.evaluate(pipe, [schedule], samples=2),
        lambda: refine(pipe, schedule, tmp_path / "s.json", evaluations=1),
    ):
        with pytest.raises(SodaprofError, match=r"--labels 0-9, or --prompts FILE .* prompts=range\(10\)"):
            refused()
    sodaprof.profile(pipe, tmp_path / "p", steps=STEPS, samples=2, max_interval=4, prompts=range(10))
    inspect_pipeline(pipe, "tiny", STEPS)  # any label does
    with pytest.raises(SodaprofError, match="found 'star', and it has no names for them"):
        check_entries(pipe, ["star"])
