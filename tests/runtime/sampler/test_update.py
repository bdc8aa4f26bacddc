"""State updates: the scheduler's own gives the plain pipeline, others the sums that they say, under every runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from msgspec.structs import replace

import sodaprof
from sodaprof.errors import MismatchError, UnsupportedModelError
from sodaprof.pipelines.patch import patched
from sodaprof.runtime.sampler.update import Jump, Ring, jumps
from tests.tape import runtime as runtime_of
from tests.tiny_pipelines import (
    STEPS,
    TwoPassPipeline,
    mixed_schedule,
    skipping_schedule,
    tiny_pipe,
    with_known_programs,
)
from tests.two_transformers import draw as draw_wan
from tests.two_transformers import schedule_of, small_wan
from tests.updated import CALLED, RESTING, apart, pipe_of, sample, updated, with_update

SAMPLERS = ("ddim", "ddpm", "dpm", "unipc", "rectified")
BOTH = [(cls, s) for cls in (DiTPipeline, TwoPassPipeline) for s in SAMPLERS] + [(TwoPassPipeline, "flow")]


def applied(pipe, schedule, runtime="hooks"):
    return with_known_programs(sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime)))


def check_runtime(pipe, schedule, runtime, wanted):
    """Three runs give the wanted latents and execute the planned cells; returns the path."""
    with applied(pipe, schedule, runtime) as handle:
        for _ in range(3):
            assert apart(sample(pipe), wanted) < 1e-5
            assert handle.report().executed == handle.report().planned
        return handle.report().path


# ---- the schedulers' own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "sampler"), [*BOTH, (TwoPassPipeline, "euler")])
def test_the_own_update_is_the_plain_pipeline(cls, sampler):
    pipe = pipe_of(cls, sampler)
    plain, others, weaker = sample(pipe), sample(pipe, (7, 3), seed=5), sample(pipe, guidance_scale=1.5)
    with sodaprof.apply(pipe, updated(pipe, stir=0.05)):
        assert apart(sample(pipe), plain) > 1e-3  # another update is another picture
    with sodaprof.apply(pipe, updated(pipe)) as handle:
        assert apart(sample(pipe), plain) < 1e-5
        assert apart(sample(pipe, (7, 3), seed=5), others) < 1e-5
        assert apart(sample(pipe, guidance_scale=1.5), weaker) < 1e-5
        assert handle.report().executed == handle.report().planned
        assert getattr(pipe.scheduler, "step_index", STEPS) == STEPS
    assert np.array_equal(sample(pipe), plain)


def test_an_update_goes_with_cells_that_reuse():
    pipe = pipe_of()
    schedule = mixed_schedule(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = sample(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    check_runtime(pipe, with_update(pipe, schedule), "hooks", wanted)


def test_an_update_goes_with_skipped_stacks():
    """Outputs of forecast steps are outputs, which the update weighs; a skipped step between them changes nothing of that."""
    pipe = pipe_of()
    whole = skipping_schedule(pipe)
    with sodaprof.apply(pipe, whole):
        wanted = sample(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    own = replace(whole, update=with_update(pipe, whole, history=1).update)
    check_runtime(pipe, own, "hooks", wanted)
    plan = whole.transformers["transformer"]
    assert plan.stack[5:7] == "SS"
    plan = replace(plan, stack=plan.stack[:6] + "-" + plan.stack[7:], stack_forecasts=plan.stack_forecasts[:2])
    resting = replace(own, transformers={"transformer": plan})
    with sodaprof.apply(pipe, resting):
        for expected, found in by_hand(pipe, resting, lambda t, x, output: output):
            assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
        wanted = sample(pipe)
    for runtime in ("compiled", "whole-steps"):
        check_runtime(pipe, resting, runtime, wanted)


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def by_hand(pipe, schedule, basis_of):
    """Yields the latents after each step: those of the update in float64, and those that the scheduler returned."""
    newest, stack = [], schedule.transformers["transformer"].stack
    seen = []

    def note(step, output, t, x, *args, **kwargs):
        result = step(output, t, x, *args, **kwargs)
        seen.append((output.double(), x.double(), (result[0] if isinstance(result, tuple) else result.prev_sample)))
        return result

    with patched(pipe.scheduler, "step", note):
        sample(pipe)
    for t, (output, x, found) in enumerate(seen):
        if stack[t] != "-":
            newest.insert(0, basis_of(t, x, output))
        own, *weights = schedule.update.coefficients[t]
        yield own * x + sum(c * v for c, v in zip(weights, newest, strict=False)), found


@pytest.mark.parametrize(("sampler", "cls"), [("ddim", DiTPipeline), ("dpm", TwoPassPipeline), ("unipc", DiTPipeline)])
def test_the_sums_are_those_of_the_coefficients(sampler, cls):
    pipe = pipe_of(cls, sampler)
    schedule = updated(pipe, RESTING, history=3, stir=0.3)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)

    def basis(t, x, output):
        if sampler == "ddim":
            return output
        scheduler._step_index = t
        return scheduler.convert_model_output(output, sample=x)

    with sodaprof.apply(pipe, schedule):
        steps = list(by_hand(pipe, schedule, basis))
    assert len(steps) == STEPS
    for wanted, found in steps:
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_jumps_are_the_updates_between_two_calls():
    rng = np.random.default_rng(0)
    rows, noise = rng.normal(size=(6, 3)), [0.5, 0.25, 0.0, 2.0, 3.0, 0.0]
    found = jumps(rows.tolist(), noise, [True, False, False, True, True, False])
    assert [jump.start for jump in found] == [0, 3, 4]
    x, old, new, n = rng.normal(size=4)
    moved = x
    for step in range(3):
        moved = rows[step] @ [moved, new, old] + noise[step] * n
    assert np.isclose(np.dot(found[0].coefficients, [x, new, old]) + sum(found[0].noise) * n, moved, rtol=1e-12)
    assert np.allclose(found[0].noise, [0.5 * rows[1, 0] * rows[2, 0], 0.25 * rows[2, 0]])
    assert found[1] == Jump(3, tuple(rows[3]), (2.0,))
    assert len(found[2].noise) == 1


def test_a_ring_holds_the_newest_and_rounds_once():
    ring = Ring(2)
    x = torch.full((4,), 3.0, dtype=torch.bfloat16)
    for value in (1.0, 2.0, 4.0):
        ring.add((0.5, 2.0), x, torch.full((4,), value, dtype=torch.bfloat16))
    assert [(v[0].item(), v.dtype) for v in ring.newest] == [(9.5, torch.float32), (5.5, torch.float32)]
    moved = ring.moved((1.0, 0.001, 0.01), x, None, x.dtype)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, torch.full((4,), 3.0 + 0.0095 + 0.055).bfloat16())
    output = torch.ones(4)
    ring.add((0.0, 1.0), torch.ones(4), output)
    output.zero_()  # a pipeline may overwrite its tensor
    assert ring.newest[0].sum() == 4


# ---- steps without network ----------------------------------------------------------------------------------------------


EVERY = ("compiled", "graphs", "whole-steps")  # under the first two the update takes the steps as under hooks
ONE = ("whole-steps",)
PATHS = {"whole-steps": "whole steps", "graphs": f"{CALLED}/{CALLED} steps replayed"}
GUIDED = [(cls, 4.0, *more) for cls in (DiTPipeline, TwoPassPipeline) for more in (("ddpm", EVERY), ("unipc", ONE))]


@pytest.mark.parametrize(("cls", "scale", "sampler", "runtimes"), [*GUIDED, (TwoPassPipeline, 1.0, "ddpm", ONE)])
def test_the_network_is_not_called_at_skipped_steps(cls, scale, sampler, runtimes):
    pipe = pipe_of(cls, sampler, layers=1)
    schedule = updated(pipe, RESTING, stir=0.1, guidance_scale=scale)
    assert schedule.sampler.guidance_form == {DiTPipeline: "halves", TwoPassPipeline: "passes"}[cls] or scale == 1
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with sodaprof.apply(pipe, schedule) as handle:
        wanted = sample(pipe, guidance_scale=scale)
        branches = 2 if cls is TwoPassPipeline and scale > 1 else 1
        assert len(calls) == CALLED * branches
        cells = {"C": 2 * CALLED * branches, "-": 2 * RESTING.count("-") * branches}
        assert handle.report().executed == handle.report().planned == cells
        assert handle.report().complete
        others = sample(pipe, (7, 3), seed=5, guidance_scale=scale)
        assert np.array_equal(sample(pipe, guidance_scale=scale), wanted)
    for runtime in runtimes:
        with applied(pipe, schedule, runtime) as handle:
            for _ in range(3):
                assert apart(sample(pipe, guidance_scale=scale), wanted) < 1e-5
                assert handle.report().executed == handle.report().planned
            assert apart(sample(pipe, (7, 3), seed=5, guidance_scale=scale), others) < 1e-5
            assert apart(sample(pipe, guidance_scale=scale), wanted) < 1e-5
            assert handle.report().path.endswith(PATHS.get(runtime, "on cpu when the schedule was applied"))


@pytest.mark.parametrize(("sampler", "stack"), [("ddpm", ".--.-..-"), ("ddim", "." + "-" * (STEPS - 1))])
def test_whole_steps_run_if_the_second_step_is_skipped(sampler, stack):
    pipe = pipe_of(DiTPipeline, sampler, layers=1)
    schedule = updated(pipe, stack, stir=0.1)
    with sodaprof.apply(pipe, schedule):
        wanted = sample(pipe)
    path = check_runtime(pipe, schedule, "whole-steps", wanted)
    assert path.endswith("whole steps") or stack.count(".") == 1


def test_an_interrupted_run_has_no_effect_on_the_next():
    pipe = pipe_of()
    plain, schedule = sample(pipe), updated(pipe, RESTING, stir=0.1)
    with sodaprof.apply(pipe, schedule) as handle:
        wanted, count = sample(pipe), iter(range(STEPS))

        def fail(step, *args, **kwargs):
            if next(count) == 4:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        with patched(pipe.scheduler, "step", fail), pytest.raises(KeyboardInterrupt):
            sample(pipe, (7, 3), seed=5)
        assert np.array_equal(sample(pipe), wanted)
        assert not handle.executor.update.ring.newest  # nothing is kept between pictures
        assert not handle.executor.turns[0].latest
    assert np.array_equal(sample(pipe), plain)


def test_noise_is_that_of_the_generators():
    """If only the first step calls the network, the latents are the update of it and of what the generators drew."""
    pipe = pipe_of(TwoPassPipeline, "ddpm")
    schedule = updated(pipe, "." + "-" * (STEPS - 1))
    scheduler, start = pipe.scheduler, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with sodaprof.apply(pipe, schedule):
        scheduler.set_timesteps(STEPS)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        x = start
        for t in scheduler.timesteps:
            call_network(pipe, x, t)
            x = scheduler.step(torch.zeros_like(x), t, x, generator=generators, return_dict=False)[0]
    again = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    plain, wanted = type(scheduler).from_config(scheduler.config), start
    plain.set_timesteps(STEPS)
    for t in plain.timesteps:
        wanted = plain.step(torch.zeros_like(wanted), t, wanted, generator=again).prev_sample
    assert (x - wanted).abs().max() < 1e-5 * wanted.abs().max()


def call_network(pipe, x, t):
    """Calls the network on both branches, as guidance in passes does before each step."""
    for _ in range(2):
        pipe.transformer(x, timestep=t.expand(len(x)), class_labels=torch.ones(len(x), dtype=torch.int64))


def first_step(pipe, schedule, x, **options):
    """Returns what the scheduler's first step returns under the schedule, for the output x and the latents x."""
    with sodaprof.apply(pipe, schedule):
        pipe.scheduler.set_timesteps(STEPS)
        t = pipe.scheduler.timesteps[0]
        call_network(pipe, x.float(), t)
        torch.manual_seed(5)  # the noise of the one that draws any
        return pipe.scheduler.step(x, t, x, **options)


def test_half_precision_is_summed_in_fp32():
    pipe = pipe_of()
    schedule, seen = updated(pipe, RESTING), []
    with sodaprof.apply(pipe, schedule):
        wanted = sample(pipe)
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    with sodaprof.apply(pipe, schedule) as handle:

        def note(step, *args, **kwargs):
            result = step(*args, **kwargs)
            seen.append(
                (args[2].dtype, result.prev_sample.dtype, {v.dtype for v in handle.executor.update.ring.newest})
            )
            return result

        with patched(pipe.scheduler, "step", note):
            found = sample(pipe)
    assert seen[:-1] == [(torch.bfloat16, torch.bfloat16, {torch.float32})] * (STEPS - 1)
    assert apart(found, wanted) < 0.1


@pytest.mark.parametrize("sampler", [*SAMPLERS, "flow", "euler"])
def test_latents_have_the_dtype_of_the_schedulers_own_step(sampler):
    pipe, x = pipe_of(TwoPassPipeline, sampler), torch.randn(1, 4, 8, 8).bfloat16()
    own = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own.set_timesteps(STEPS)
    torch.manual_seed(5)
    wanted = own.step(x, own.timesteps[0], x, return_dict=False)[0]
    schedule = updated(pipe)
    found = first_step(pipe, schedule, x, return_dict=False)[0]
    plain = sodaprof.scheduler(schedule)
    plain.set_timesteps(STEPS)
    also = plain.step(x, plain.timesteps[0], x, return_dict=False)[0]
    assert found.dtype == also.dtype == wanted.dtype
    assert (found.float() - wanted.float()).abs().max() < 2e-2 * wanted.abs().max()


def test_results_have_the_form_of_the_schedulers_own():
    pipe, x = pipe_of(TwoPassPipeline), torch.randn(1, 4, 8, 8)
    plain = DDIMScheduler.from_config(pipe.scheduler.config)
    plain.set_timesteps(STEPS)
    wanted = plain.step(x, plain.timesteps[0], x).prev_sample
    schedule = updated(pipe)
    result = first_step(pipe, schedule, x)
    assert type(result) is DDIMSchedulerOutput
    assert result.pred_original_sample is None
    pair = first_step(pipe, schedule, x, return_dict=False)
    assert isinstance(pair, tuple)
    assert len(pair) == 2
    for latents in (result.prev_sample, pair[0]):
        assert torch.allclose(latents, wanted, rtol=1e-5, atol=1e-6)


def test_steps_are_skipped_in_the_turns_of_two_transformers():
    wan = small_wan()
    plain, schedule = draw_wan(wan), schedule_of(wan)
    own = replace(schedule, update=with_update(wan, schedule).update)
    with sodaprof.apply(wan, own) as handle:
        assert (draw_wan(wan) - plain).abs().max() < 1e-5 * plain.abs().max()
        assert handle.report().executed == handle.report().planned
    stacks, plans = {"transformer": ".-.-.______", "transformer_2": "_____.--.-."}, {}
    for name, plan in schedule.transformers.items():
        rows = dict.fromkeys(plan.rows, stacks[name].replace(".", "C"))
        plans[name] = replace(plan, stack=stacks[name], rows=rows)
    resting = replace(own, transformers=plans)
    with sodaprof.apply(wan, resting):
        wanted = draw_wan(wan)
    assert (wanted - plain).abs().max() > 1e-3 * plain.abs().max()
    with applied(wan, resting, "graphs") as handle:
        for _ in range(3):
            assert torch.equal(draw_wan(wan), wanted)
            assert handle.report().executed == handle.report().planned
            assert handle.report().executed["-"] > 0
    assert torch.equal(draw_wan(wan), plain)


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_schedulers_that_are_not_linear_are_refused_by_setting(setting):
    pipe = pipe_of()
    schedule = updated(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **{setting: True})
    sampler = replace(schedule.sampler, config=schedule.sampler.config | {setting: True})
    with pytest.raises(UnsupportedModelError, match=f"{setting}=True"):
        sodaprof.apply(pipe, replace(schedule, sampler=sampler))


def test_an_update_of_another_basis_is_refused():
    pipe = pipe_of(DiTPipeline, "dpm")
    schedule = updated(pipe)
    with pytest.raises(MismatchError, match=r"basis 'output', the steps of DPMSolver.* are of basis 'data'"):
        sodaprof.apply(pipe, replace(schedule, update=replace(schedule.update, basis="output")))


@pytest.mark.parametrize(
    "option", [{"eta": 0.5}, {"variance_noise": torch.zeros(1)}, {"use_clipped_model_output": True}]
)
def test_arguments_that_change_a_step_are_refused_by_name(option):
    pipe, x = pipe_of(TwoPassPipeline), torch.zeros(1, 4, 8, 8)
    schedule = updated(pipe)
    first_step(pipe, schedule, x, eta=0.0, generator=None)
    with pytest.raises(UnsupportedModelError, match=next(iter(option))):
        first_step(pipe, schedule, x, **option)


def test_guidance_that_begins_at_a_skipped_step_is_refused():
    class Late(TwoPassPipeline):
        @torch.no_grad()
        def __call__(self, class_labels, num_inference_steps=50, **_):
            x, labels = torch.randn(1, 4, 8, 8), torch.tensor(class_labels[:1])
            self.scheduler.set_timesteps(num_inference_steps)
            for step, t in enumerate(self.scheduler.timesteps):
                for _branch in range(3 if RESTING[step] == "-" else 2):
                    out = self.transformer(x, timestep=t[None], class_labels=labels).sample
                x = self.scheduler.step(out, t, x).prev_sample

    pipe, message = tiny_pipe(cls=Late), "Step 2 has network call 3, the first one had 2"
    schedule = updated(tiny_pipe(cls=TwoPassPipeline), RESTING)
    with sodaprof.apply(pipe, schedule), pytest.raises(MismatchError, match=message):
        pipe([1], num_inference_steps=STEPS)
