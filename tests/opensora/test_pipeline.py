"""Open-Sora's pipeline: text, sizes, the loop against a loop by hand, folders, schedules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import sodaprof
from sodaprof.errors import FormatError, MismatchError, SodaprofError
from sodaprof.formats.schedule import Plan, Schedule
from sodaprof.opensora import prompts as text
from sodaprof.opensora import weights as published
from sodaprof.opensora.autoencoder import AutoencoderKLOpenSora
from sodaprof.opensora.network import STDiT3
from sodaprof.opensora.pipeline import OpenSoraPipeline
from sodaprof.opensora.prompts import RATIOS, SIZES, size_of
from sodaprof.opensora.weights import AUTOENCODER, NETWORK, TEXT, load_autoencoder, load_published, load_stdit3
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.runtime.compiled.engine import Compiled
from tests.recorded import recording
from tests.tape import Tapes
from tests.video_pipelines import LENGTH, draw, tiny_video_pipe

TEXTS = recording("opensora_rflow")[1]["text"]
SCORES = [(6.5, None, None)] * 5 + [(6.5, 5.0, "pan left")]
PROMPT = "a red disk moves left"
STEPS = 6


@pytest.fixture
def pipe() -> OpenSoraPipeline:
    return tiny_video_pipe()


# ---- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recorded", "scores"), list(zip(TEXTS, SCORES, strict=True)), ids=lambda x: str(x[0])[:12])
def test_prompts_are_the_recorded_ones(recorded, scores):
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    prompt, scored, clean = recorded
    assert text.with_scores(prompt, *scores) == scored
    assert text.cleaned(scored) == clean


def test_scores_that_a_prompt_names_are_kept():
    prompt = "a cat aesthetic score: 4.0. camera motion: static."
    assert text.with_scores(prompt, 6.5, 2, "zoom in") == prompt + " motion score: 2.0."
    assert text.with_scores("a cat", None, None, None) == "a cat"


def test_without_the_cleaner_the_message_says_what_to_install(pipe, monkeypatch):
    monkeypatch.setattr(text, "is_ftfy_available", lambda: False)
    with pytest.raises(SodaprofError, match="pip install ftfy beautifulsoup4"):
        pipe(PROMPT, clean_caption=True)
    assert draw(pipe, steps=1).shape == (2, 17, 16, 24, 3)  # this one was not trained on cleaned captions


def test_prompts_are_padded_and_cut_to_the_length_of_the_network(pipe):
    embeds, mask = pipe.encode_prompt([PROMPT, "A RED disk"], aes=None)
    assert embeds.shape == (2, LENGTH, 12)
    assert mask.tolist() == [[1] * 6 + [0] * 6, [1] * 4 + [0] * 8]  # the end token counts
    assert torch.equal(pipe.encode_prompt("a red disk", aes=None)[0][0, :4], embeds[1, :4])
    assert pipe.encode_prompt(PROMPT)[1].sum() == LENGTH  # scores behind it, then cut off


# ---- sizes ------------------------------------------------------------------------------------------------------------


def test_names_of_sizes():
    assert size_of("240p", "9:16") == (240, 426)
    assert size_of("480p", "2:1") == (906, 454)
    assert all(len(row) == len(RATIOS) for row in SIZES.values())
    with pytest.raises(SodaprofError, match="No size 1080p 9:16; expected 144p"):
        size_of("1080p", "9:16")


def test_a_size_by_name_or_by_number_is_the_same(pipe, monkeypatch):
    monkeypatch.setitem(SIZES, "144p", ((14, 26), *SIZES["144p"][1:]))
    named = draw(pipe, steps=2, resolution="144p", aspect_ratio="9:16", num_frames=18)
    assert named.shape == (2, 18, 14, 26, 3)
    assert np.array_equal(named, draw(pipe, steps=2, height=14, width=26, num_frames=18))
    assert draw(pipe, steps=1, height=15, width=27, num_frames=1).shape == (2, 1, 14, 26, 3)  # whole latent cells


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 16}, "Half a size"),
        ({"resolution": "240p"}, "Half a size"),
        ({"height": 16, "width": 16, "resolution": "240p", "aspect_ratio": "1:1"}, "Two sizes"),
        ({"height": 1, "width": 16}, "expected 2 or more"),
        ({"num_frames": 16}, "16 frames is undefined: give 1, or 17 and more"),
        ({"prompt_embeds": torch.zeros(1, LENGTH, 12)}, "Give a prompt, or prompt_embeds with"),
        ({"prompt": None}, "Give a prompt"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 12), "prompt_attention_mask": torch.ones(1, 3)}, "padded"),
        ({"latents": torch.zeros(1, 4, 4, 8, 12)}, r"start from \[1, 4, 5, 8, 12\]"),
        ({"output_type": "gif"}, "expected np, pt, pil, latent"),
        ({"callback_on_step_end_tensor_inputs": ["mask"]}, "cannot receive mask"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(pipe, options, message):
    with pytest.raises(SodaprofError, match=message):
        pipe(**{"prompt": PROMPT, "num_inference_steps": 2} | options)


def test_few_frames_run_if_timesteps_are_not_transformed():
    assert draw(tiny_video_pipe(transform=False), steps=2, num_frames=5).shape == (2, 5, 16, 24, 3)


# ---- the loop ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(pipe, embeds, mask, z, fps, size, guidance):
    """The loop of the specification, with the network's own arguments."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS, height=size[0], width=size[1], num_frames=size[2])
    null = pipe.transformer.y_embedder.y_embedding.repeat(len(z), 1, 1)
    y = torch.cat([embeds, null])[:, None]
    ends = [*scheduler.timesteps.tolist(), 0.0]
    for i, t in enumerate(scheduler.timesteps):
        out = pipe.transformer(
            torch.cat([z, z]), t.repeat(2 * len(z)), y, mask, fps, float(size[0]), float(size[1])
        ).sample
        cond, uncond = out[:, :4].chunk(2)
        z = z + (uncond + guidance * (cond - uncond)) * ((ends[i] - ends[i + 1]) / 1000)
    return z


@pytest.mark.parametrize(("frames", "fps"), [(17, 24), (1, 120), (34, 12)])
def test_the_loop_equals_the_loop_by_hand(pipe, frames, fps):
    z = torch.randn(2, *(4, pipe.vae.latent_size(frames, 16, 24)[0], 8, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt([PROMPT, "a blue square moves up"])
    wanted = by_hand(pipe, embeds, mask, z, fps, (16, 24, frames), 7.0)
    options = {"num_frames": frames, "num_inference_steps": STEPS, "fps": 12 if frames == 34 else 24}
    found = pipe([PROMPT, "a blue square moves up"], latents=z, output_type="latent", **options).frames
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "latents": z}
    video = pipe(**given, **options).frames
    with torch.no_grad():
        decoded = pipe.vae.decode(found, frames)
    shown = ((decoded.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1).numpy()
    assert np.array_equal(video, shown)
    assert 0.01 < video.std() < 0.5


def test_sizes_reach_the_network_as_the_scheduler_rounds_them(pipe):
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, kw: seen.append((kw["height"], kw["width"])), with_kwargs=True
    )
    pipe.scheduler = type(pipe.scheduler)(size_dtype="bfloat16")
    pipe(PROMPT, height=20, width=1030, num_frames=1, num_inference_steps=1, output_type="latent")
    assert seen == [(20.0, 1032.0)]


def test_a_video_does_not_depend_on_its_batch(pipe):
    both, alone = draw(pipe, steps=3), draw(pipe, [PROMPT], steps=3)
    np.testing.assert_allclose(both[:1], alone, atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3
    assert not np.array_equal(alone, draw(pipe, [PROMPT], steps=3, seed=1))


def test_output_types_hold_the_same_video(pipe):
    array, tensor = draw(pipe, steps=2), draw(pipe, steps=2, output_type="pt")
    assert tensor.shape == (2, 17, 3, 16, 24)
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    pictures = draw(pipe, steps=2, output_type="pil")
    assert (len(pictures), len(pictures[0]), pictures[0][0].size) == (2, 17, (24, 16))
    assert isinstance(pipe(PROMPT, num_inference_steps=1, return_dict=False), tuple)


def test_a_callback_sees_and_changes_latents(pipe):
    seen = []

    def callback(own, i, t, tensors):
        seen.append((own, i, float(t), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else {}

    options = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"], "output_type": "latent"}
    found = draw(pipe, steps=2, callback_on_step_end=callback, **options)
    assert [(a, b) for a, b, *_ in seen] == [(pipe, 0), (pipe, 1)]
    assert seen[0][2:] == (pytest.approx(1000), ["latents", "prompt_embeds"])
    assert not found.any()


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: numbers read off tensors, and sizes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return func(*args, **kwargs or {})


def test_the_loop_has_no_host_sync(pipe):
    waits = Waits()
    with waits:
        draw(pipe, steps=1, output_type="latent")
        once = waits.count
        draw(pipe, steps=5, output_type="latent")
    assert waits.count == 2 * once


def test_latents_are_single_precision_after_the_first_step_of_half_precision(pipe):
    seen = []
    pipe.to(torch.bfloat16)
    pipe.transformer.register_forward_pre_hook(lambda m, a, kw: seen.append(a[0].dtype), with_kwargs=True)
    frames = draw(pipe, steps=3)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]  # the noise alone is drawn in half precision
    assert frames.dtype == np.float32


# ---- folders ----------------------------------------------------------------------------------------------------------


def dtypes_of(pipe) -> list[torch.dtype]:
    return [part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)]


def test_a_saved_folder_is_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "own")
    loaded = sodaprof.load_pipeline(str(tmp_path / "own"), device="cpu")
    assert isinstance(loaded, OpenSoraPipeline)
    assert (loaded.config.height, loaded.config.num_frames, loaded.config.clean_caption) == (16, 17, False)
    assert np.array_equal(draw(loaded, steps=2), draw(pipe, steps=2))
    half = sodaprof.load_pipeline(str(tmp_path / "own"), dtype="bfloat16", device="cpu")
    assert dtypes_of(half) == [torch.bfloat16, torch.bfloat16, torch.float32]


PARTS = {"transformer": "STDiT3", "vae": "AutoencoderKLOpenSora", "scheduler": "RectifiedFlowScheduler"}
OLD_MODULES = [dict(zip(PARTS, modules, strict=True)) for modules in (
    ("sodaprof.models.opensora.stdit3", "sodaprof.models.opensora.vae", "sodaprof.models.opensora.scheduler"),
    ("sodaprof.opensora.network", "sodaprof.opensora.autoencoder", "sodaprof.opensora.scheduler"),
)]  # fmt: skip


@pytest.mark.parametrize("load", [sodaprof.load_pipeline, OpenSoraPipeline.from_pretrained])
@pytest.mark.parametrize("modules", OLD_MODULES)
def test_a_saved_pipeline_names_the_package_and_folders_that_name_modules_are_loaded(pipe, tmp_path, load, modules):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # diffusers registers it again
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    assert {name: index[name] for name in PARTS} == {name: ["sodaprof.opensora", cls] for name, cls in PARTS.items()}
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    path.write_text(json.dumps(index | {name: [modules[name], cls] for name, cls in PARTS.items()}))
    loaded = load(str(tmp_path))
    assert isinstance(loaded, OpenSoraPipeline)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(loaded, steps=1), draw(pipe, steps=1))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["vae"][0] == "sodaprof.opensora"


def publish(pipe, folder: Path, rope: bool = True, old_attention: bool = False) -> None:
    """Writes the pipeline's weights as the authors' repositories have theirs."""
    network, vae = pipe.transformer.state_dict(), pipe.vae.state_dict()
    if not rope:
        del network["rope.freqs"]
    if old_attention:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            vae = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in vae.items()}
        assert any("proj_attn" in name for name in vae)
    for name, tensors in ((NETWORK, network), (AUTOENCODER, vae)):
        (folder / name).mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name / "model.safetensors")
    pipe.text_encoder.save_pretrained(folder / TEXT)
    pipe.tokenizer.save_pretrained(folder / TEXT)


@pytest.fixture
def uniform() -> OpenSoraPipeline:
    """One number of groups for all norms, as the published autoencoder has."""
    pipe = tiny_video_pipe()
    config = dict(pipe.vae.config) | {"num_groups": 2, "norm_num_groups": 2, "spatial_factor": 0.18215}
    pipe.vae = AutoencoderKLOpenSora.from_config(config).eval()
    return pipe


@pytest.mark.parametrize("stored", [True, False])
def test_published_files_give_the_same_videos(uniform, tmp_path, stored):
    publish(uniform, tmp_path, rope=stored, old_attention=not stored)
    loaded = load_published(tmp_path, groups=2)
    loaded.set_progress_bar_config(disable=True)
    assert not loaded.transformer.training
    options = {"clean_caption": False, "height": 16, "width": 24, "num_frames": 17}
    # the widths are read off the shapes; the size of the positions' square is not in them
    loaded.transformer.register_to_config(input_sq_size=16)
    assert np.array_equal(draw(loaded, steps=2, **options), draw(uniform, steps=2, **options))


def test_load_pipeline_reads_published_folders(uniform, tmp_path, monkeypatch):
    publish(uniform, tmp_path)
    with pytest.raises(FormatError, match="shape"):  # 32 groups do not divide these widths
        sodaprof.load_pipeline(str(tmp_path), device="cpu")
    original = published.load_autoencoder
    monkeypatch.setattr(published, "load_autoencoder", lambda w, dtype, groups: original(w, dtype, 2))
    loaded = sodaprof.load_pipeline(str(tmp_path), dtype="bfloat16", device="cpu")
    assert dtypes_of(loaded) == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert loaded.config.num_frames == 51
    (tmp_path / AUTOENCODER / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="no such file"):
        sodaprof.load_pipeline(str(tmp_path), device="cpu")


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(SodaprofError, match=f"{NETWORK}/, {AUTOENCODER}/ and {TEXT}/"):
        sodaprof.load_pipeline(str(tmp_path), device="cpu")
    with pytest.raises(FormatError, match=f"expected the folders {NETWORK}"):
        load_published(tmp_path)


def test_weights_of_something_else_are_refused(pipe):
    network, vae = pipe.transformer.state_dict(), pipe.vae.state_dict()
    with pytest.raises(FormatError, match="no x_embedder"):
        load_stdit3(vae)
    with pytest.raises(FormatError, match="no spatial_vae"):
        load_autoencoder(network)
    del network["final_layer.linear.bias"]
    with pytest.raises(FormatError, match=r"missing final_layer\.linear\.bias"):
        load_stdit3(network)
    with pytest.raises(FormatError, match="unknown spatial_vae"):
        load_autoencoder(vae | {"spatial_vae.module.more": torch.zeros(1)}, groups=2)
    name = "temporal_vae.decoder.conv_out.conv.bias"
    with pytest.raises(FormatError, match=r"decoder\.conv_out\.conv\.bias has the shape \[9\], expected \[4\]"):
        load_autoencoder(vae | {name: torch.zeros(9)}, groups=2)


def config_of(model, absent=()) -> dict:
    return {key: value for key, value in model.config.items() if key[0] != "_" and key not in absent}


def test_the_published_configurations_are_read_off_the_shapes():
    with torch.device("meta"):
        network, vae = STDiT3(), AutoencoderKLOpenSora()
    tensors = {k: torch.empty(v.shape, device="meta", dtype=torch.bfloat16) for k, v in network.state_dict().items()}
    del tensors["rope.freqs"]
    loaded = load_stdit3(tensors)
    assert sum(p.numel() for p in loaded.parameters()) == 1_207_643_936  # neither rope.freqs nor y_embedding is one
    assert len(loaded.state_dict()) == 973
    assert config_of(loaded) == config_of(network)
    tensors = {k: torch.empty(v.shape, device="meta") for k, v in vae.state_dict().items()}
    tensors |= {"shift": torch.zeros(1, 4, 1, 1, 1), "scale": torch.ones(1, 4, 1, 1, 1)}
    loaded = load_autoencoder(tensors)
    assert len(loaded.state_dict()) == 517
    assert sum(p.numel() for p in loaded.spatial_vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in loaded.temporal_vae.parameters()) == 309_687_144
    means = ("latents_mean", "latents_std")
    assert config_of(loaded, means) == config_of(vae, means)


# ---- schedules --------------------------------------------------------------------------------------------------------


def schedule_for(pipe, rows=None) -> Schedule:
    """A schedule of this pipeline: the given rows, C everywhere else."""
    model, sampler, _ = inspect_pipeline(pipe, "tiny", STEPS, 7.0, PROMPT)
    transformer = model.transformers["transformer"]
    all_rows = {site.key: "C" * STEPS for site in transformer.sites} | (rows or {})
    plan = Plan(transformer.class_name, transformer.fingerprint, all_rows, "." * STEPS, {}, {})
    return Schedule({"transformer": plan}, sampler, model.shape, {"name": "test", "knobs": {}})


def fora(pipe) -> Schedule:
    return schedule_for(pipe, dict.fromkeys(schedule_for(pipe).transformers["transformer"].rows, "CRRCRR"))


def test_sites_and_sampler_of_the_pipeline(pipe):
    model, sampler, _ = inspect_pipeline(pipe, "tiny", STEPS, 7.0, PROMPT)
    assert (sampler.class_name, sampler.guidance_form, sampler.steps) == ("RectifiedFlowScheduler", "halves", STEPS)
    assert model.shape == {"latent": [4, 5, 8, 12], "tokens": 120, "batch_profiled": 1, "dtype": "float32"}
    assert len(model.transformers["transformer"].sites) == 12


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
def test_all_compute_is_bit_identical(pipe, runtime):
    plain = draw(pipe)
    with sodaprof.apply(pipe, schedule_for(pipe), runtime=runtime) as handle:
        for _ in range(2):
            assert np.array_equal(draw(pipe), plain)
            assert handle.report().executed == handle.report().planned == {"C": 12 * STEPS}
    assert np.array_equal(draw(pipe), plain)


def test_reuse_executes_the_plan(pipe):
    plain, schedule = draw(pipe), fora(pipe)
    with sodaprof.apply(pipe, schedule) as handle:
        wanted = draw(pipe)
        report = handle.report()
        assert report.complete
        assert report.executed == report.planned == {"C": 24, "R": 48}
    assert not np.array_equal(wanted, plain)
    with sodaprof.apply(pipe, schedule, runtime="compiled") as handle:
        for _ in range(3):
            assert np.array_equal(draw(pipe), wanted)
            assert handle.report().executed == handle.report().planned
    assert np.array_equal(draw(pipe), plain)


def test_whole_steps_give_the_same_video(pipe):
    """Guidance and solver are read off this pipeline's first step."""
    schedule = fora(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe)
    with sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=Tapes(), whole_steps=True)) as handle:
        for _ in range(3):
            np.testing.assert_allclose(draw(pipe), wanted, atol=2e-5)
        assert handle.report().path.endswith("whole steps")
        assert handle.report().executed == handle.report().planned


def test_another_length_is_refused(pipe):
    with sodaprof.apply(pipe, fora(pipe)), pytest.raises(MismatchError):
        draw(pipe, num_frames=34)
