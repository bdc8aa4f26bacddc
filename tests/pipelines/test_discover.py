"""Discovery in models that differ: layouts, kinds by effect, inline MLPs, text among the tokens, two transformers."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.errors import MismatchError, SodaprofError, UnsupportedModelError
from sodaprof.formats.tables import MEAN
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.probe import LAYOUTS, as_tokens, layout_of
from sodaprof.pipelines.recording import is_halved, latents_of
from sodaprof.profiler.plan import plan_profile
from sodaprof.runtime.compiled.engine import Compiled
from tests.tape import Tapes
from tests.zoo.zoo_check import case_of
from tests.zoo.zoo_pipelines import PIPELINES, STEPS

X = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 20)  # [B, N, D]


HELD = {  # layout -> X in it
    "": X,
    "channels_last": X.reshape(2, 1, 3, 20),
    "channels_first": X.transpose(1, 2).reshape(2, 20, 3, 1),
    "heads": X.reshape(2, 3, 4, 5),
    "tokens_first": X.transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_read(layout):
    assert layout_of(tuple(HELD[layout].shape), 2, {20}, {(2, 3)}) == layout
    assert torch.equal(as_tokens(HELD[layout], layout), X)


def test_tokens_before_the_batch_are_recognised_by_the_attention_of_the_block():
    assert layout_of((22, 2, 20), 2, {20}, {(2, 22)}) == "tokens_first"
    assert layout_of((22, 2, 20), 2, {20}, {(22, 2)}) == ""  # 11 rows a sample, of 2 tokens
    assert layout_of((22, 1, 20), 1, {20}, {(1, 22)}) == ""  # one sample: 22 rows of one token come to the same


@pytest.mark.parametrize(
    "shape",
    [(2, 20), (3, 4, 20), (2, 7, 7, 7), (2, 20, 4, 20), (3, 20, 4, 4)],
    ids=["two axes", "batch", "no channels", "two channel axes", "batch of four axes"],
)
def test_ambiguous_layouts_have_no_name(shape):
    assert layout_of(shape, 2, {20}, ()) is None


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("StableAudio3DiTModel", "transformer_blocks.cross_attn", "cross_attn"),  # text comes as `context`
        ("StableAudio3DiTModel", "transformer_blocks.self_attn", "attn"),
        ("PRXTransformer2DModel", "blocks.attention", "joint_attn"),  # text and image keys, image out
        ("NucleusMoEImageTransformer2DModel", "transformer_blocks.attn", "joint_attn"),
        ("PRXTransformer2DModel", "blocks.down_proj", "mlp"),  # its layers are children of the block, like the next two
        ("MiniMaxMusic3Transformer1DModel", "transformer_blocks.ff_out", "mlp"),
        ("FluxTransformer2DModel", "single_transformer_blocks.proj_out", "fused"),
    ],
)
def test_the_kind_of_a_site_follows_from_what_it_computes(name, module, kind):
    assert case_of(name).found.fingerprint["kinds"][module] == kind


def test_layouts_of_the_zoo():
    found = case_of("SanaTransformer2DModel").found
    assert found.fingerprint["layouts"] == {"transformer_blocks.ff": "channels_first"}
    ff = next(s for s in found.sites if s.module == "ff")
    assert (ff.tokens, ff.width, ff.prunable) == (16, 32, False)
    assert case_of("ErnieImageTransformer2DModel").found.fingerprint["layouts"] == {"layers.mlp": "tokens_first"}
    assert "layouts" not in case_of("STDiT3").found.fingerprint  # its temporal attention folds positions into the batch


def test_latents_in_a_list_are_read():
    x = torch.randn(4, 1, 8, 8)
    assert is_halved([x, x])
    assert not is_halved([x, x + 1])
    assert not is_halved([x])
    network = nn.Linear(2, 2)
    assert latents_of(network, ([x],), {}) == [x]
    with pytest.raises(UnsupportedModelError, match="takes its latents as list"):
        latents_of(network, ([[x]],), {})
    with pytest.raises(UnsupportedModelError, match="takes its latents as NoneType"):
        latents_of(network, (), {})


# ---- pipelines --------------------------------------------------------------------------------------------------------


def profiled(case, folder, **settings):
    given = {"call": case.call, "steps": STEPS, "samples": 2, "max_interval": 4, "name": "tiny"} | settings
    return sodaprof.profile(case.pipe, folder, **given)


def outputs(case, path, entries, seed):
    """[T, ...] of one module in a plain run."""
    seen = []
    hook = case.pipe.transformer.get_submodule(path).register_forward_hook(
        lambda m, args, out: seen.append(out.clone())
    )
    case.call(entries, [torch.Generator().manual_seed(seed + i) for i in range(len(entries))])
    hook.remove()
    return torch.stack(seen).double()


@pytest.mark.parametrize(
    ("name", "site", "tokens"),
    [
        ("SanaPipeline", "transformer_blocks.1.ff", lambda x: x.flatten(-2).transpose(-1, -2)),  # [T, B, D, H, W]
        ("LattePipeline", "transformer_blocks.1.ff", lambda x: x),  # [T, B F, S, D]
        ("LattePipeline", "temporal_transformer_blocks.0.attn1", lambda x: x),  # [T, B S, F, D]
    ],
)
def test_errors_in_other_layouts_equal_the_direct_definition(tmp_path, name, site, tokens):
    case = PIPELINES[name]()
    profile = profiled(case, tmp_path / "p", seed=5, batch_size=2)
    keys = [s.key for s in profile.model.transformers["transformer"].sites]
    x = tokens(outputs(case, site, [0, 1], 5))
    for step, age in ((1, 1), (4, 3)):
        cos = 1 - torch.cosine_similarity(x[step], x[step - age], dim=-1)
        l1 = (x[step] - x[step - age]).abs().sum((1, 2)) / x[step].abs().sum((1, 2))
        for metric, wanted in (("cos", cos.mean()), ("l1", l1.mean())):
            found = profile.caching_error(metric)["transformer"][step, keys.index(site), age]
            np.testing.assert_allclose(found, wanted.item(), rtol=5e-4)
    table = pq.read_table(tmp_path / "p" / "caching.parquet").to_pylist()
    for row in table:  # a value a token, whose mean is the whole's
        if row["branch"] == MEAN:
            np.testing.assert_allclose(np.mean(row["token_cos"]), row["cos_mean"], rtol=5e-3, atol=1e-6)


def test_the_memory_of_frames_in_the_batch_is_planned(tmp_path):
    case = PIPELINES["LattePipeline"]()
    plan = plan_profile(
        case.pipe, "tiny", steps=STEPS, samples=1, max_interval=4, call=case.call, memory_bytes=1 << 30, gram=False
    )
    assert plan.step.folds["transformer", "transformer_blocks.0.attn1"] == 2  # frames
    assert plan.step.folds["transformer", "temporal_transformer_blocks.0.attn1"] == 16  # places
    ring = 3 * (2 * 2 * 16) * (32 * 4 + 12)  # ages, halves, frames, places
    assert plan.extra_bytes == len(plan.sites) * ring + 3 * (2 * 2 * 16) * 32 * 4


def test_the_call_must_run_the_requested_steps():
    case = PIPELINES["FluxPipeline"]()
    with pytest.raises(SodaprofError, match=f"runs {STEPS} timesteps, steps is 50"):
        plan_profile(case.pipe, "tiny", steps=50, samples=1, call=case.call)
    plan = plan_profile(case.pipe, "tiny", samples=1, max_interval=3, call=case.call)
    assert plan.sampler.steps == STEPS


def test_the_call_receives_entries_and_generators(tmp_path):
    received = []
    case = PIPELINES["FluxPipeline"]()

    def call(entries, generators):
        received.append((entries, [g.initial_seed() for g in generators]))
        return case.call([7] * len(entries), generators)

    settings = {"call": call, "samples": 3, "batch_size": 2, "max_interval": 3, "seed": 11}
    profile = profiled(case, tmp_path / "a", **settings)
    assert received == [([0], [0]), ([0, 1], [11, 12]), ([2], [13])]
    assert profile.manifest["prompts"] == [0, 1, 2]
    assert profile.sampler.guidance_scale is None
    received.clear()
    profile = profiled(case, tmp_path / "b", prompts=["a", "b"], guidance_scale=3.5, **settings)
    assert received == [(["a"], [0]), (["a", "b"], [11, 12]), (["a"], [13])]
    assert profile.sampler.guidance_scale == 3.5


def test_a_schedule_holds_for_text_of_another_length(tmp_path):
    case = PIPELINES["QwenImagePipeline"]()
    found = profiled(case, tmp_path / "p").model.transformers["transformer"]
    assert found.fingerprint["text"] == ["transformer_blocks.txt_mlp"]
    assert not any(s.prunable for s in found.sites if s.module == "txt_mlp")
    longer = case.with_text(lambda entries: 9)
    plain = longer.draw()
    with sodaprof.apply(case.pipe, compile_schedule(tmp_path / "p", "1.5x")) as handle:
        drawn = longer.draw()
        assert handle.report().executed == handle.report().planned
    assert not torch.equal(drawn, plain)


def test_text_in_one_call_of_a_module_and_the_picture_in_the_other():
    found = case_of("CogView4Transformer2DModel").found
    assert found.fingerprint["text"] == ["transformer_blocks.ff#1"]
    assert {(s.call, s.tokens, s.prunable) for s in found.sites if s.module == "ff"} == {(0, 16, True), (1, 5, False)}


def test_prompts_of_several_lengths_in_one_profile(tmp_path):
    case = PIPELINES["QwenImagePipeline"]().with_text(lambda entries: 4 + entries[0])
    profile = profiled(case, tmp_path / "p", batch_size=1)
    assert np.isfinite(profile.caching_error()["transformer"][3, :, 1]).all()
    table = pq.read_table(tmp_path / "p" / "caching.parquet").to_pylist()
    assert {row["module"] for row in table if row["branch"] == MEAN and row["token_cos"] is None} == {"txt_mlp"}


def test_pruned_text_of_another_length_is_refused():
    case = PIPELINES["FluxPipeline"]()
    site = "single_transformer_blocks.0.proj_out"  # text and image in one sequence
    with sodaprof.apply(case.pipe, case.schedule(rows={site: "CPCPCP"}, k={site: (4, 4, 4)})):
        case.draw()
        with pytest.raises(MismatchError, match=r"has 25 tokens here, 21 in the schedule: they hold the text"):
            case.with_text(lambda entries: 9).draw()


def test_another_resolution_is_refused():
    case = PIPELINES["SanaPipeline"]()
    # only the convolution's sites reuse: those whose tokens are no axis of their output
    schedule = case.schedule(rows={f"transformer_blocks.{i}.ff": "CRCRCR" for i in range(2)})
    with sodaprof.apply(case.pipe, schedule), pytest.raises(MismatchError, match="24 tokens here, 16 in the schedule"):
        case.changed(lambda entries: {"height": 192}).draw()


def test_another_resolution_is_refused_if_every_site_holds_text():
    case = case_of("ErnieImageTransformer2DModel")
    schedule = case.schedule({s.key: "CRCR" for s in case.found.sites}, "halves")
    larger = torch.cat([torch.randn(1, 4, 6, 4)] * 2)
    calls = [[call | {"hidden_states": larger}] for (call,) in case.halves()]
    with sodaprof.apply(case.pipe, schedule), pytest.raises(MismatchError, match="29 tokens here, 21 in the schedule"):
        case.sample(calls)


def test_latents_in_a_list_are_not_captured_and_the_report_says_so():
    case = PIPELINES["ZImagePipeline"]()
    schedule = case.schedule(rows={"layers.0.feed_forward": "CRCRCR"})
    with sodaprof.apply(case.pipe, schedule):
        wanted = case.draw()
    with sodaprof.apply(case.pipe, schedule, runtime=Compiled(graphs=Tapes())) as handle:
        assert torch.equal(case.draw(), wanted)
        assert handle.report().path == "compiled, no CUDA graphs: the pipeline passes its latents as a list"


def test_a_pipeline_that_carries_a_schedule_is_not_inspected():
    case = PIPELINES["FluxPipeline"]()
    with sodaprof.apply(case.pipe, case.schedule()):
        with pytest.raises(MismatchError, match="carries a schedule"):
            case.schedule()
        case.draw()


def test_two_transformers_are_both_found():
    case = PIPELINES["WanPipeline_two"]()
    ran = []
    hook = case.pipe.transformer.register_forward_hook(lambda *of_call: ran.append(1))
    model, sampler, step = inspect_pipeline(case.pipe, "tiny", STEPS, own=case.call)
    hook.remove()
    assert list(model.transformers) == ["transformer", "transformer_2"]
    first, second = model.transformers.values()
    assert [s.key for s in first.sites] == [s.key for s in second.sites] != []
    assert [name for name, *_ in step.calls] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert step.passes == 2
    assert sampler.guidance_form == "passes"
    high, low = (next(kwargs["timestep"] for n, _, kwargs in step.calls if n == name) for name in model.transformers)
    assert high[0] >= 600 > low[0]
    assert sampler.steps == STEPS
    plan = plan_profile(case.pipe, "tiny", steps=STEPS, samples=1, max_interval=4, call=case.call)
    assert plan.past == {"transformer": [0, 1, 2, -1, -1, -1], "transformer_2": [-1, -1, -1, 0, 1, 2]}
