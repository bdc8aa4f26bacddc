"""The runtime `hooks`: bit-identity, actions by hand arithmetic, no state from one run to the next, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverSinglestepScheduler,
)

import sodaprof
from sodaprof.errors import MismatchError
from tests.tiny_pipelines import (
    MIXED_FORECASTS,
    MIXED_K,
    MIXED_ROWS,
    SITES,
    STEPS,
    TwoPassPipeline,
    draw,
    mixed_schedule,
    schedule_for,
    tiny_pipe,
)


@pytest.fixture
def pipe():
    return tiny_pipe()


def outputs_of(pipe, path):
    """Returns a list that fills with (input, output) of a module as its block sees them, the schedule's hook included."""
    seen = []
    pipe.transformer.get_submodule(path).register_forward_hook(
        lambda m, args, kwargs, out: seen.append(((args[0] if args else kwargs["hidden_states"]).clone(), out.clone())),
        with_kwargs=True,
    )
    return seen


def test_all_compute_is_bit_identical(pipe):
    plain = draw(pipe)
    with sodaprof.apply(pipe, schedule_for(pipe)):
        assert np.array_equal(draw(pipe), plain)


def test_a_schedule_changes_the_picture_and_its_cells_run_as_planned(pipe):
    plain, schedule = draw(pipe), mixed_schedule(pipe)
    with sodaprof.apply(pipe, schedule) as handle:
        first, second = draw(pipe), draw(pipe)
        report = handle.report()
    assert np.array_equal(first, second)
    assert not np.array_equal(first, plain)
    assert report.complete
    assert report.executed == report.planned == dict(schedule.counts()) == {"C": 13, "R": 12, "P": 5, "F": 2}


def test_reuse_runs_exactly_the_other_sites(pipe):
    schedule, ran = mixed_schedule(pipe), dict.fromkeys(SITES, 0)
    for site in SITES:
        inner = pipe.transformer.get_submodule(site)
        part = inner.to_q if "attn" in site else inner.net[2]
        part.register_forward_hook(lambda *_, site=site: ran.__setitem__(site, ran[site] + 1))
    with sodaprof.apply(pipe, schedule):
        draw(pipe)
    for site, row in MIXED_ROWS.items():
        skipped_prunes = sum(k == 0 for k in MIXED_K[site])
        assert ran[site] == row.count("C") + row.count("P") - skipped_prunes


def test_reuse_returns_the_last_computed_output(pipe):
    schedule = schedule_for(pipe, {SITES[0]: "CRRCRRCR"})
    seen = outputs_of(pipe, SITES[0])
    with sodaprof.apply(pipe, schedule):
        draw(pipe)
    for step, source in enumerate((0, 0, 0, 3, 3, 3, 6, 6)):
        assert torch.equal(seen[step][1], seen[source][1])


def test_forecast_is_the_weighted_sum_of_its_sources(pipe):
    schedule, seen = mixed_schedule(pipe), outputs_of(pipe, SITES[0])
    with sodaprof.apply(pipe, schedule):
        draw(pipe)
    (cell,) = MIXED_FORECASTS[SITES[0]]
    assert torch.equal(seen[-STEPS + 6][1], cell.weights[0] * seen[-STEPS + 3][1] + cell.weights[1] * seen[-STEPS][1])


@pytest.mark.parametrize("site", [SITES[0], SITES[1]])
def test_pruning_recomputes_the_top_tokens_and_keeps_the_rest(pipe, site):
    k = 5
    schedule = schedule_for(pipe, {site: "CPRCCCCC"}, {site: (k,)})
    seen = outputs_of(pipe, site)
    with sodaprof.apply(pipe, schedule):
        draw(pipe)
    cache, (x, out) = seen[0][1], seen[1]
    module = pipe.transformer.get_submodule(site)
    fresh = module.forward(x)
    top = cache.abs().mean(-1).topk(k, dim=1).indices
    kept = torch.zeros(out.shape[:2], dtype=torch.bool).scatter(1, top, True)
    assert kept.sum() == k * len(out)
    torch.testing.assert_close(out[kept], fresh[kept], rtol=1e-5, atol=1e-6)
    assert torch.equal(out[~kept], cache[~kept])
    assert torch.equal(seen[2][1], out)  # the recomputed rows were written to the cache


def test_pruning_all_tokens_equals_computing(pipe):
    with sodaprof.apply(pipe, schedule_for(pipe, {SITES[3]: "CPPPPPPP"}, {SITES[3]: (16,) * 7})):
        pruned = draw(pipe)
    np.testing.assert_allclose(pruned, draw(pipe), atol=1e-5)


def test_remove_restores_the_pipeline_bit_for_bit(pipe):
    plain = draw(pipe)
    before = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    scheduler_before = set(vars(pipe.scheduler))
    handle = sodaprof.apply(pipe, mixed_schedule(pipe))
    draw(pipe)
    handle.remove()
    handle.remove()  # twice is once
    assert np.array_equal(draw(pipe), plain)
    assert set(vars(pipe.scheduler)) == scheduler_before
    for name, module in pipe.transformer.named_modules():
        assert set(vars(module)) - before[name] <= {"_diffusers_hook", "forward"}
        assert not getattr(module, "_diffusers_hook", None) or not module._diffusers_hook.hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_a_step_has_no_effect_on_later_runs(pipe, error):
    plain = draw(pipe)

    def interrupted():
        calls = iter(range(4))

        def fail(*_):
            if next(calls) == 3:
                raise error("stop")

        trip = pipe.transformer.transformer_blocks[1].ff.register_forward_hook(fail)
        with pytest.raises(error):
            draw(pipe)
        trip.remove()

    with sodaprof.apply(pipe, mixed_schedule(pipe)) as handle:
        scheduled = draw(pipe)
        interrupted()
        assert not handle.report().complete
        assert np.array_equal(draw(pipe), scheduled)  # the next run starts anew
        interrupted()
    assert np.array_equal(draw(pipe), plain)


def test_other_batch_sizes_and_labels_run_and_stay_apart(pipe):
    with sodaprof.apply(pipe, mixed_schedule(pipe)):
        three = draw(pipe, labels=(3, 7, 9))
        alone = draw(pipe, labels=(3,))
    np.testing.assert_allclose(three[:1], alone, atol=1e-5)


def test_another_guidance_scale_runs_and_the_report_names_the_fitted_one(pipe):
    with sodaprof.apply(pipe, mixed_schedule(pipe)) as handle:
        draw(pipe, guidance_scale=2.0)
        assert handle.report().complete
        assert "profiled at guidance 4.0" in str(handle.report())


def test_two_pipelines_at_once(pipe):
    other, alone = tiny_pipe(seed=5), []
    for p in (pipe, other):
        with sodaprof.apply(p, mixed_schedule(p)):
            alone.append(draw(p))
    with sodaprof.apply(pipe, mixed_schedule(pipe)), sodaprof.apply(other, mixed_schedule(other)):
        for p, wanted in ((pipe, alone[0]), (other, alone[1]), (pipe, alone[0])):
            assert np.array_equal(draw(p), wanted)


def test_a_second_schedule_starts_without_caches_of_the_first(pipe):
    first, second = mixed_schedule(pipe), schedule_for(pipe, {SITES[2]: "CRRRRRRR"})
    pictures = []
    for schedule in (second, first, second):
        with sodaprof.apply(pipe, schedule):
            pictures.append(draw(pipe))
    assert np.array_equal(pictures[0], pictures[2])


def test_a_second_schedule_on_the_same_pipeline_is_refused(pipe):
    with sodaprof.apply(pipe, schedule_for(pipe)), pytest.raises(MismatchError, match=r"sodaprof\.remove\(pipe\)"):
        sodaprof.apply(pipe, schedule_for(tiny_pipe()))


def test_another_number_of_steps_is_refused_and_says_what_to_type(pipe):
    with sodaprof.apply(pipe, mixed_schedule(pipe)):
        with pytest.raises(MismatchError, match=f"num_inference_steps={STEPS}"):
            draw(pipe, steps=STEPS + 2)
        assert draw(pipe) is not None  # and the handle still works


@pytest.mark.parametrize(("profiled", "called"), [(4.0, 1.0), (1.0, 4.0)])
def test_another_form_of_guidance_is_refused(pipe, profiled, called):
    schedule = schedule_for(pipe, guidance_scale=profiled)
    assert schedule.sampler.guidance_form == ("halves" if profiled > 1 else "none")
    with sodaprof.apply(pipe, schedule), pytest.raises(MismatchError, match="guidance"):
        draw(pipe, guidance_scale=called)


def test_two_labels_from_one_seed_are_no_guidance(pipe):
    def from_one_seed():
        seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
        return pipe([1, 2], guidance_scale=1.0, num_inference_steps=STEPS, generator=seeds, output_type="np").images

    plain = from_one_seed()
    with (
        sodaprof.apply(pipe, schedule_for(pipe)),
        pytest.raises(MismatchError, match="found one branch a network call"),
    ):
        from_one_seed()
    with sodaprof.apply(pipe, schedule_for(pipe, guidance_scale=1.0)):
        assert np.array_equal(from_one_seed(), plain)


def test_another_model_is_refused(pipe):
    with pytest.raises(MismatchError, match="layers 3"):
        sodaprof.apply(tiny_pipe(layers=3), mixed_schedule(pipe))


def test_a_replaced_scheduler_is_refused(pipe):
    with sodaprof.apply(pipe, mixed_schedule(pipe)):
        own = pipe.scheduler
        pipe.scheduler = DDIMScheduler(clip_sample=False)
        with pytest.raises(MismatchError, match="replaced"):
            draw(pipe)
        pipe.scheduler = own
        draw(pipe)


def test_another_scheduler_class_or_setting_is_refused(pipe):
    schedule = mixed_schedule(pipe)
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    with pytest.raises(MismatchError, match=r"DDIMScheduler\.from_config"):
        sodaprof.apply(pipe, schedule)
    pipe.scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    with pytest.raises(MismatchError, match="beta_schedule"):
        sodaprof.apply(pipe, schedule)


def test_settings_that_a_scheduler_changes_as_it_starts_are_no_other_scheduler(pipe):
    given = pipe.scheduler.config
    pipe.scheduler = DPMSolverSinglestepScheduler.from_config(given)
    plain, schedule = draw(pipe), schedule_for(pipe)  # of a pipeline that has run
    assert schedule.sampler.config["lower_order_final"]
    pipe.scheduler = DPMSolverSinglestepScheduler.from_config(given, lower_order_final=False)
    with sodaprof.apply(pipe, schedule):
        assert np.array_equal(draw(pipe), plain)
    pipe.scheduler = DPMSolverSinglestepScheduler.from_config(given, solver_order=3)
    with pytest.raises(MismatchError, match="solver_order is 3, 2 in the schedule"):
        sodaprof.apply(pipe, schedule)


def test_a_transformer_call_outside_a_run_is_refused(pipe):
    with sodaprof.apply(pipe, mixed_schedule(pipe)):
        draw(pipe)
        with pytest.raises(MismatchError, match="outside a denoising loop"):
            pipe.transformer(torch.zeros(2, 4, 8, 8), timestep=torch.tensor([1, 1]), class_labels=torch.tensor([1, 1]))


def test_no_class_of_the_host_is_patched(pipe):
    classes = (DiTPipeline, DDIMScheduler, DiTTransformer2DModel, type(pipe.transformer.transformer_blocks[0].ff))
    before = [dict(vars(cls)) for cls in classes]
    with sodaprof.apply(pipe, mixed_schedule(pipe)):
        draw(pipe)
        assert [dict(vars(cls)) for cls in classes] == before
    assert [dict(vars(cls)) for cls in classes] == before


def test_two_pass_guidance_keeps_the_branches_apart():
    pipe = tiny_pipe(cls=TwoPassPipeline)
    plain, whole = draw(pipe), schedule_for(pipe)
    assert whole.sampler.guidance_form == "passes"
    with sodaprof.apply(pipe, whole):
        assert np.array_equal(draw(pipe), plain)
    schedule = schedule_for(pipe, {SITES[1]: "CRCCCCCC"})
    seen = outputs_of(pipe, SITES[1])
    with sodaprof.apply(pipe, schedule) as handle:
        draw(pipe)
        assert handle.report().executed == {"C": 62, "R": 2}  # on both branches
    cond, uncond, cond_reused, uncond_reused = (out for _, out in seen[:4])
    assert not torch.equal(cond, uncond)
    assert torch.equal(cond_reused, cond)
    assert torch.equal(uncond_reused, uncond)


def test_guidance_in_halves_and_in_passes_give_the_same_picture_under_the_same_rows():
    rows, k = {SITES[0]: "CRRCRRRC", SITES[3]: "CPRCPRCC"}, {SITES[3]: (6, 9)}
    latents = []
    for cls in (DiTPipeline, TwoPassPipeline):
        pipe = tiny_pipe(cls=cls)
        decode = pipe.vae.decode
        pipe.vae.decode = lambda z, *a, decode=decode, **kw: (latents.append(z.clone()), decode(z, *a, **kw))[1]
        with sodaprof.apply(pipe, schedule_for(pipe, rows, k)):
            draw(pipe)
    scaled = latents[-2] * pipe.vae.config.scaling_factor  # DiTPipeline divides before it decodes
    torch.testing.assert_close(scaled, latents[-1], rtol=1e-4, atol=1e-4)


def test_a_removed_schedule_can_be_attached_again(pipe):
    plain, handle = draw(pipe), sodaprof.apply(pipe, mixed_schedule(pipe))
    scheduled = draw(pipe)
    handle.remove()
    assert np.array_equal(draw(pipe), plain)
    with handle:
        assert np.array_equal(draw(pipe), scheduled)
    assert np.array_equal(draw(pipe), plain)
    with sodaprof.apply(pipe, schedule_for(pipe)), pytest.raises(MismatchError, match="carries a schedule"):
        handle.attach()
