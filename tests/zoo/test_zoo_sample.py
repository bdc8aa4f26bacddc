"""The checks of `zoo_check` and `zoo_pipelines` on a few that differ: streams, text or none, video, layouts, guidance."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from msgspec.structs import replace

import sodaprof
from sodaprof.runtime.hooks.sites import SiteRow
from tests.tiny_pipelines import with_known_programs
from tests.zoo import zoo_check, zoo_pipelines
from tests.zoo.zoo import ZOO, at, other
from tests.zoo.zoo_check import CHECKS, cells, check, same, tensors

ONE_STREAM = {"attn1": "attn", "attn2": "cross_attn", "ff": "mlp"}
JOINT = {"attn": "joint_attn", "ff": "mlp", "ff_context": "mlp"}
SAMPLE = {  # class -> stack -> module -> kind
    "DiTTransformer2DModel": {"transformer_blocks": {"attn1": "attn", "ff": "mlp"}},
    "PixArtTransformer2DModel": {"transformer_blocks": ONE_STREAM},
    "SD3Transformer2DModel": {"transformer_blocks": JOINT | {"attn2": "attn"}},
    "FluxTransformer2DModel": {
        "transformer_blocks": JOINT, "single_transformer_blocks": {"attn": "attn", "proj_out": "fused"}
    },
    "WanTransformer3DModel": {"blocks": {"attn1": "attn", "attn2": "cross_attn", "ffn": "mlp"}},
    "CogVideoXTransformer3DModel": {"transformer_blocks": {"attn1": "joint_attn", "ff": "mlp"}},
}  # fmt: skip
PRUNABLE = {
    "DiTTransformer2DModel": {"attn1", "ff"}, "PixArtTransformer2DModel": {"attn1", "attn2", "ff"},
    "SD3Transformer2DModel": {"ff"},
}  # fmt: skip
PIPELINES = {  # by what is only there
    "FluxPipeline": "none", "LattePipeline": "halves", "QwenImagePipeline": "passes",
}  # fmt: skip
LONG = ("FLOPs", "lowers", "collapses")  # the checks that take long
COVERED = {  # class -> checks that tell nothing more of it
    "DiTTransformer2DModel": LONG,  # most tests of these three are about it
    # blocks that compute in part, traced: those of PixArt have the same sites, those of SD3 and FLUX the same streams
    "WanTransformer3DModel": ("lowers",), "CogVideoXTransformer3DModel": ("lowers",),
}  # fmt: skip


@cache
def checked(name):
    """The row of a class. Its checks trace a block under the same cells once: handles have their programs in common."""
    apply = sodaprof.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sodaprof, "apply", lambda *args, **kwargs: with_known_programs(apply(*args, **kwargs)))
        for heading in COVERED.get(name, ()):
            patch.delitem(CHECKS, heading)
        return check(name)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_is_scheduled(name):
    row = checked(name)
    assert list(row.results) == [heading for heading in CHECKS if heading not in COVERED.get(name, ())]
    assert False not in row.results.values(), row.notes
    assert not row.refused
    kinds = {(stack, m): kind for stack, modules in SAMPLE[name].items() for m, kind in modules.items()}
    assert row.kinds == kinds
    if name in PRUNABLE:
        assert {module for _, module in row.prunable} == PRUNABLE[name]
    assert "yes" in cells(row)


@pytest.mark.parametrize("name", SAMPLE)
@torch.no_grad()
def test_calls_differ_as_they_should(name):
    network, call = ZOO[name]()
    latents = at(call, 1)["hidden_states"]
    assert torch.equal(latents[0], latents[1])
    apart = at(call, 1, halves=False)["hidden_states"]
    assert not torch.equal(apart[0], apart[1])
    outputs = [tensors(network(**c, return_dict=False)) for c in (call, at(call, 1), at(call, 2), other(call, 1), call)]
    assert same(outputs[0], outputs[-1])
    assert not any(same(outputs[0], changed) for changed in outputs[1:-1])
    assert not same(outputs[1], outputs[2])


@pytest.fixture
def few(monkeypatch):
    """Leaves out the checks that take long."""
    for heading in LONG:
        monkeypatch.delitem(CHECKS, heading)


def test_what_is_raised_is_in_the_notes(monkeypatch, few):
    def broken(case):
        raise ValueError("of\nsome kind")

    monkeypatch.setitem(CHECKS, "reuse exact", broken)
    row = check("DiTTransformer2DModel")
    assert not row.passed
    assert row.results == dict.fromkeys(CHECKS, True) | {"reuse exact": False}
    assert row.notes == ["reuse exact: ValueError: of some kind"]


def test_another_site_in_half_precision_is_seen(monkeypatch, few):
    find = zoo_check.find_sites

    def by_dtype(pipe, name, step):
        found = find(pipe, name, step)
        half = pipe.components[name].dtype != torch.float32
        return replace(found, sites=found.sites[1:]) if half else found

    monkeypatch.setattr(zoo_check, "find_sites", by_dtype)
    row = check("DiTTransformer2DModel")
    assert row.results == dict.fromkeys(CHECKS, True) | {"dtypes, backends": False}
    assert "dtypes, backends: other sites in torch.bfloat16 with native" in row.notes


@pytest.fixture
def brief(monkeypatch):
    """Takes fewer steps."""
    monkeypatch.setattr(zoo_pipelines, "STEPS", 4)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_profiled_compiled_and_run(name, brief):
    row = zoo_pipelines.check(name)
    assert row.results == dict.fromkeys(zoo_pipelines.CHECKS, True), row.notes
    assert row.form == PIPELINES[name]


def test_a_pipeline_that_computes_everything_is_seen(monkeypatch, brief):
    act = SiteRow.act
    monkeypatch.setattr(SiteRow, "act", lambda self, step, *rest: act(self, 0, *rest))
    row = zoo_pipelines.check("FluxPipeline")
    assert row.results["all-C identical"]
    assert row.results["soda runs"] is False
    assert "soda runs: the picture is the plain pipeline's: nothing was reused" in row.notes


def test_a_schedule_that_stays_behind_is_seen(monkeypatch, brief):
    monkeypatch.setattr(zoo_pipelines.sodaprof.Handle, "remove", lambda self: None)
    row = zoo_pipelines.check("FluxPipeline")
    assert not row.passed


def test_sites_that_compute_in_place_of_reusing_are_seen(monkeypatch, few):
    act = SiteRow.act
    monkeypatch.setattr(SiteRow, "act", lambda self, step, *rest: act(self, 0, *rest))
    results = check("DiTTransformer2DModel").results
    assert results["all-C identical"]
    assert not results["reuse exact"]
    assert not results["branches apart"]


def test_branches_that_share_a_cache_are_seen(monkeypatch, few):
    read = SiteRow.read

    def first(self, moment):
        given = read(self, moment)
        return given._replace(cache=self.memory[0].cache) if given.cache is not None else given

    monkeypatch.setattr(SiteRow, "read", first)
    results = check("PixArtTransformer2DModel").results
    assert results["reuse exact"]
    assert not results["branches apart"]


def test_the_command_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zoo_check", "PixArtTransformer2DModel", "--markdown"])
    monkeypatch.setattr(zoo_check, "check", checked)  # whose row is known
    with pytest.raises(SystemExit) as stop:
        zoo_check.main()
    assert stop.value.code == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == len(zoo_check.HEADINGS) + 1
