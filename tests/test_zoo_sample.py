"""The checks of `zoo_check` on a few classes that differ: one stream and two, one text or none, pictures and video."""

from __future__ import annotations

import pytest
import torch

from sodaprof.runtime.actions import SiteRow

from . import zoo_check
from .zoo import ZOO, at, other
from .zoo_check import CHECKS, cells, check, same, tensors

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
PRUNABLE = {"DiTTransformer2DModel": {"attn1", "ff"}, "PixArtTransformer2DModel": {"attn1", "attn2", "ff"}}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_is_scheduled(name):
    row = check(name)
    assert row.passed, row.notes
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


def test_what_is_raised_is_in_the_notes(monkeypatch):
    def broken(case):
        raise ValueError("of\nsome kind")

    monkeypatch.setitem(CHECKS, "reuse exact", broken)
    row = check("DiTTransformer2DModel")
    assert not row.passed
    assert row.results == dict.fromkeys(CHECKS, True) | {"reuse exact": False}
    assert row.notes == ["2 of 2 blocks are sums", "reuse exact: ValueError: of some kind"]


def test_sites_that_compute_in_place_of_reusing_are_seen(monkeypatch):
    act = SiteRow.act
    monkeypatch.setattr(SiteRow, "act", lambda self, step, *rest: act(self, 0, *rest))
    results = check("DiTTransformer2DModel").results
    assert results["all-C identical"]
    assert not results["reuse exact"]
    assert not results["branches apart"]


def test_branches_that_share_a_cache_are_seen(monkeypatch):
    read = SiteRow.read

    def first(self, moment):
        given = read(self, moment)
        return given._replace(cache=self.stores[0].cache) if given.cache is not None else given

    monkeypatch.setattr(SiteRow, "read", first)
    results = check("PixArtTransformer2DModel").results
    assert results["reuse exact"]
    assert not results["branches apart"]


def test_the_command_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zoo_check", "DiTTransformer2DModel", "--markdown"])
    with pytest.raises(SystemExit) as stop:
        zoo_check.main()
    assert stop.value.code == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == len(zoo_check.HEADINGS) + 1
