"""Forms of guidance in real pipelines: both branches in one batch, one call each, none, embedded, embedded and true."""

from __future__ import annotations

import pytest
import torch

import sodaprof
from sodaprof.errors import MismatchError
from tests.zoo.zoo_pipelines import PIPELINES, STEPS, no_text, pooled


def flux_with_true_guidance():
    return PIPELINES["FluxPipeline"]().changed(
        lambda entries: {
            "negative_prompt_embeds": no_text(entries), "negative_pooled_prompt_embeds": pooled(entries) * 0,
            "true_cfg_scale": 3.0,
        }
    )  # fmt: skip


FORMS = {
    "DiTPipeline": "halves", "PixArtAlphaPipeline": "halves", "StableDiffusion3Pipeline": "halves", "WanPipeline": "passes",
    "QwenImagePipeline": "passes", "FluxPipeline": "none", "flux_with_true_guidance": "passes",
}  # fmt: skip


def case_of(name):
    return flux_with_true_guidance() if name == "flux_with_true_guidance" else PIPELINES[name]()


@pytest.mark.parametrize(("name", "form"), FORMS.items())
def test_the_form_is_found_and_nothing_changes(name, form):
    case = case_of(name)
    plain = case.draw()
    schedule = case.schedule()
    assert schedule.sampler.guidance_form == form
    with sodaprof.apply(case.pipe, schedule) as handle:
        assert torch.equal(case.draw(), plain)
        assert handle.report().executed == handle.report().planned


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form != "none" and name != "DiTPipeline"])
def test_another_negative_prompt_changes_its_branch_alone(name):
    case = case_of(name)
    schedule = case.schedule("CRRCRR")
    key = "negative_prompt_embeds"
    negated = case.changed(lambda entries: {key: case.arguments(entries)[key] + 1})
    seen = []
    hook = next(iter(case.pipe.components["transformer"].children())).register_forward_hook(lambda *_: seen.append(1))
    with sodaprof.apply(case.pipe, schedule) as handle:
        one, before = case.draw(), len(seen)
        other = negated.draw()
        assert len(seen) == 2 * before
        assert not torch.equal(one, other)
        assert torch.equal(case.draw(), one)  # nothing of the other run is left
        assert handle.report().executed == handle.report().planned
    hook.remove()


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "WanPipeline"])
def test_guidance_switched_off_is_refused(name):
    case = case_of(name)
    with sodaprof.apply(case.pipe, case.schedule("CRRCRR")), pytest.raises(MismatchError, match="guidance"):
        case.changed(lambda entries: {"guidance_scale": 1.0}).draw()


def test_true_guidance_does_not_match_embedded_guidance():
    case, schedule = flux_with_true_guidance(), PIPELINES["FluxPipeline"]().schedule("CRRCRR")
    with sodaprof.apply(case.pipe, schedule), pytest.raises(MismatchError, match="guidance"):
        case.draw()


def test_branches_of_true_guidance_keep_their_own_caches():
    case = flux_with_true_guidance()
    network, kept = case.pipe.transformer, []
    schedule = case.schedule("CRRRRR")
    with sodaprof.apply(case.pipe, schedule):
        hook = network.transformer_blocks[0].attn.register_forward_hook(lambda m, a, out: kept.append(out[0].clone()))
        case.draw()
        hook.remove()
    assert len(kept) == 2 * STEPS
    assert not torch.equal(kept[0], kept[1])
    for step in range(STEPS):
        assert torch.equal(kept[2 * step], kept[0])
        assert torch.equal(kept[2 * step + 1], kept[1])
