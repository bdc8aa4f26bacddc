"""The state update at work: the scheduler's own is the plain pipeline, others are what arithmetic says, under every runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from msgspec.structs import replace

import sodaprof
from sodaprof.errors import MismatchError, UnsupportedModelError
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.runtime.compiled.engine import Compiled
from sodaprof.runtime.sampler.update import Jump, Ring, jumps
from tests.runtime.hooks.test_stack import skipping
from tests.runtime.test_two_transformers import draw as draw_wan
from tests.runtime.test_two_transformers import schedule_of, wan  # noqa: F401
from tests.tape import Tapes
from tests.tape import runtime as runtime_of
from tests.tiny_pipelines import STEPS, TwoPassPipeline, mixed_schedule, tiny_pipe, with_known_programs
from tests.updated import CALLED, RESTING, sample, set_sampler, updated, with_update

SAMPLERS = ("ddim", "ddpm", "dpm", "unipc", "rectified")
BOTH = [(cls, s) for cls in (DiTPipeline, TwoPassPipeline) for s in SAMPLERS] + [(TwoPassPipeline, "flow")]


def pipe_of(cls=DiTPipeline, sampler="ddim", layers=2):
    pipe = tiny_pipe(layers, cls=cls)
    set_sampler(pipe, sampler)
    return pipe


def apart(found, wanted):
    return abs(found - wanted).max() / abs(wanted).max()


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
        if hasattr(pipe.scheduler, "step_index"):
            assert pipe.scheduler.step_index == STEPS
    assert np.array_equal(sample(pipe), plain)


def test_an_update_goes_with_cells_that_reuse():
    pipe = pipe_of()
    schedule = mixed_schedule(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = sample(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    with sodaprof.apply(pipe, with_update(pipe, schedule)) as handle:
        assert apart(sample(pipe), wanted) < 1e-5
        assert handle.report().executed == handle.report().planned


def test_an_update_goes_with_skipped_stacks():
    """Outputs of forecast steps are outputs: the update weighs them; a rest between changes nothing of that."""
    pipe = pipe_of()
    whole = skipping(pipe, first=("CCC-C--C",) * 4)
    with sodaprof.apply(pipe, whole):
        wanted = sample(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    own = replace(whole, update=with_update(pipe, whole, history=1).update)
    with sodaprof.apply(pipe, own) as handle:
        assert apart(sample(pipe), wanted) < 1e-5
        assert handle.report().executed == handle.report().planned
    plan = whole.transformers["transformer"]
    assert plan.stack[5:7] == "SS"
    rests = replace(plan, stack=plan.stack[:6] + "-" + plan.stack[7:], stack_forecasts=plan.stack_forecasts[:2])
    resting = replace(own, transformers={"transformer": rests})
    with sodaprof.apply(pipe, resting):
        for expected, answered in by_hand(pipe, resting, lambda t, x, output: output):
            assert (answered - expected).abs().max() < 2e-5 * expected.abs().max()
        wanted = sample(pipe)
    for runtime in ("compiled", "whole-steps"):
        with with_known_programs(sodaprof.apply(pipe, resting, runtime=runtime_of(runtime))) as handle:
            for _ in range(3):
                assert apart(sample(pipe), wanted) < 1e-5
                assert handle.report().executed == handle.report().planned


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def by_hand(pipe, schedule, basis_of):
    """Returns what the pipeline's scheduler was given and answered at each step, and the update of it in float64."""
    seen = []
    step = pipe.scheduler.step

    def listen(output, t, x, *args, **kwargs):
        result = step(output, t, x, *args, **kwargs)
        seen.append((output.double(), x.double(), (result[0] if isinstance(result, tuple) else result.prev_sample)))
        return result

    pipe.scheduler.step = listen
    sample(pipe)
    pipe.scheduler.step = step
    newest, stack = [], schedule.transformers["transformer"].stack
    for t, (output, x, answered) in enumerate(seen):
        if stack[t] != "-":
            newest.insert(0, basis_of(t, x, output))
        own, *weights = schedule.update.coefficients[t]
        wanted = own * x + sum(c * v for c, v in zip(weights, newest, strict=False))
        yield wanted, answered


@pytest.mark.parametrize(("sampler", "cls"), [("ddim", DiTPipeline), ("dpm", TwoPassPipeline), ("unipc", DiTPipeline)])
def test_any_coefficients_are_taken_as_they_stand(sampler, cls):
    pipe = pipe_of(cls, sampler)
    schedule = updated(pipe, RESTING, history=3, stir=0.3)
    pipe.scheduler.set_timesteps(STEPS)
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
    for wanted, answered in steps:
        assert answered.dtype == torch.float32
        assert (answered - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_jumps_are_the_updates_between_two_calls():
    rng = np.random.default_rng(0)
    rows, noise = rng.normal(size=(6, 3)), [0.5, 0.25, 0.0, 2.0, 3.0, 0.0]
    found = jumps(rows.tolist(), noise, [True, False, False, True, True, False])
    assert [(j.start, j.end) for j in found] == [(0, 3), (3, 4), (4, 6)]
    x, old, new, n = rng.normal(size=4)
    moved = x
    for step in range(3):
        moved = rows[step] @ [moved, new, old] + noise[step] * n
    whole = found[0]
    assert np.isclose(np.dot(whole.coefficients, [x, new, old]) + sum(whole.noise) * n, moved, rtol=1e-12)
    assert np.allclose(whole.noise, [0.5 * rows[1, 0] * rows[2, 0], 0.25 * rows[2, 0]])
    assert found[1] == Jump(3, 4, tuple(rows[3]), (2.0,))
    assert len(found[2].noise) == 1


def test_a_ring_holds_the_newest_and_rounds_once():
    ring = Ring(2)
    x = torch.full((4,), 3.0, dtype=torch.bfloat16)
    for value in (1.0, 2.0, 4.0):
        ring.add((0.5, 2.0), x, torch.full((4,), value, dtype=torch.bfloat16))
    assert [v[0].item() for v in ring.newest] == [9.5, 5.5]
    assert {v.dtype for v in ring.newest} == {torch.float32}
    moved = ring.moved((1.0, 0.001, 0.01), x, None, x.dtype)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, torch.full((4,), 3.0 + 0.0095 + 0.055).bfloat16())
    output = torch.ones(4)
    ring.add((0.0, 1.0), torch.ones(4), output)
    output.zero_()  # a pipeline may do with its tensor what it likes
    assert ring.newest[0].sum() == 4


# ---- steps without network ----------------------------------------------------------------------------------------------


EVERY = ("compiled", "graphs", "whole-steps")  # to the first two the sampler's step is the pipeline's affair
ONE = ("whole-steps",)
GUIDED = [(cls, 4.0, *more) for cls in (DiTPipeline, TwoPassPipeline) for more in (("ddpm", EVERY), ("unipc", ONE))]


@pytest.mark.parametrize(("cls", "scale", "sampler", "runtimes"), [*GUIDED, (TwoPassPipeline, 1.0, "ddpm", ONE)])
def test_the_network_rests_under_every_form_of_guidance_and_runtime(cls, scale, sampler, runtimes):
    """A step without network whose update stands still is a step less of the pipeline's; nothing leaks between pictures."""
    pipe = pipe_of(cls, sampler, layers=1)
    schedule = updated(pipe, RESTING, stir=0.1, guidance_scale=scale)
    assert schedule.sampler.guidance_form == {DiTPipeline: "halves", TwoPassPipeline: "passes"}[cls] or scale == 1
    calls = []
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    with sodaprof.apply(pipe, schedule) as handle:
        wanted = sample(pipe, guidance_scale=scale)
        assert len(calls) == RESTING.count(".") * (2 if cls is TwoPassPipeline and scale > 1 else 1)
        assert handle.report().executed == {"C": 2 * RESTING.count("."), "-": 2 * RESTING.count("-")}
        assert handle.report().executed == handle.report().planned
        assert handle.report().complete
        others = sample(pipe, (7, 3), seed=5, guidance_scale=scale)
        assert np.array_equal(sample(pipe, guidance_scale=scale), wanted)
    for runtime in runtimes:
        with with_known_programs(sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime))) as handle:
            for _ in range(3):
                assert apart(sample(pipe, guidance_scale=scale), wanted) < 1e-5
                assert handle.report().executed == handle.report().planned
            assert apart(sample(pipe, (7, 3), seed=5, guidance_scale=scale), others) < 1e-5
            assert apart(sample(pipe, guidance_scale=scale), wanted) < 1e-5
            path = handle.report().path
        wanted_path = {"whole-steps": "whole steps", "graphs": f"{CALLED}/{CALLED} steps replayed"}
        assert path.endswith(
            wanted_path.get(runtime, "no CUDA graphs: the pipeline was on cpu when the schedule was applied")
        )


def test_the_loop_takes_over_after_a_run_begins_with_a_rest():
    pipe = pipe_of(DiTPipeline, "ddpm", layers=1)
    schedule = updated(pipe, ".--.-..-", stir=0.1)
    with sodaprof.apply(pipe, schedule):
        wanted = sample(pipe)
    with with_known_programs(
        sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=Tapes(), whole_steps=True))
    ) as handle:
        for _ in range(3):
            assert apart(sample(pipe), wanted) < 1e-5
        assert handle.report().path.endswith("whole steps")
        assert handle.report().executed == handle.report().planned


def test_one_call_of_the_network_is_enough():
    pipe = pipe_of(layers=1)
    schedule = updated(pipe, "." + "-" * (STEPS - 1))
    with sodaprof.apply(pipe, schedule):
        wanted = sample(pipe)
    with with_known_programs(
        sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=Tapes(), whole_steps=True))
    ) as handle:
        for _ in range(3):
            assert apart(sample(pipe), wanted) < 1e-5
        assert handle.report().executed == handle.report().planned == {"C": 2, "-": 2 * (STEPS - 1)}


def test_an_aborted_run_harms_nothing():
    pipe = pipe_of()
    plain, schedule = sample(pipe), updated(pipe, RESTING, stir=0.1)
    with sodaprof.apply(pipe, schedule) as handle:
        wanted = sample(pipe)
        step, count = pipe.scheduler.step, iter(range(STEPS))

        def fails(*args, **kwargs):
            if next(count) == 4:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        pipe.scheduler.step = fails
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, (7, 3), seed=5)
        pipe.scheduler.step = step
        assert np.array_equal(sample(pipe), wanted)
        assert not handle.executor.update.ring.newest  # nothing is held between pictures
        assert not handle.executor.turns[0].latest
    assert np.array_equal(sample(pipe), plain)


def test_noise_is_that_of_the_generators():
    """Without network at all but the first step, the latents are the update of it and of what the generators drew."""
    pipe = pipe_of(TwoPassPipeline, "ddpm")
    schedule = updated(pipe, "." + "-" * (STEPS - 1))
    scheduler, start = pipe.scheduler, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with sodaprof.apply(pipe, schedule):
        scheduler.set_timesteps(STEPS)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        x = start
        for t in scheduler.timesteps:
            out = pipe.transformer(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample
            pipe.transformer(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2]))
            x = scheduler.step(torch.zeros_like(out), t, x, generator=generators, return_dict=False)[0]
    again = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    plain, wanted = type(scheduler).from_config(scheduler.config), start
    plain.set_timesteps(STEPS)
    for t in plain.timesteps:
        wanted = plain.step(torch.zeros_like(wanted), t, wanted, generator=again).prev_sample
    assert (x - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_half_precision_is_summed_in_fp32():
    pipe = pipe_of()
    wide, schedule = sample(pipe), updated(pipe, RESTING)
    with sodaprof.apply(pipe, schedule):
        wide = sample(pipe)
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    seen = []
    with sodaprof.apply(pipe, schedule) as handle:
        step = pipe.scheduler.step

        def listen(*args, **kwargs):
            result = step(*args, **kwargs)
            seen.append((args[2].dtype, result.prev_sample.dtype, {v.dtype for v in handle.executor.update.ring.newest}))
            return result

        pipe.scheduler.step = listen
        found = sample(pipe)
    assert seen[:-1] == [(torch.bfloat16, torch.bfloat16, {torch.float32})] * (STEPS - 1)
    assert apart(found, wide) < 0.1


@pytest.mark.parametrize("sampler", [*SAMPLERS, "flow", "euler"])
def test_latents_are_of_the_dtype_of_the_schedulers_own_step(sampler):
    pipe = pipe_of(TwoPassPipeline, sampler)
    x, labels = torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([1])
    own = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own.set_timesteps(STEPS)
    torch.manual_seed(5)  # the noise of the one that draws any
    wanted = own.step(x, own.timesteps[0], x, return_dict=False)[0]
    schedule = updated(pipe)
    with sodaprof.apply(pipe, schedule):
        pipe.scheduler.set_timesteps(STEPS)
        for _ in range(2):
            pipe.transformer(x.float(), timestep=torch.tensor([1]), class_labels=labels)
        torch.manual_seed(5)
        found = pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x, return_dict=False)[0]
    plain = sodaprof.scheduler(schedule)
    plain.set_timesteps(STEPS)
    also = plain.step(x, plain.timesteps[0], x, return_dict=False)[0]
    assert found.dtype == also.dtype == wanted.dtype
    assert (found.float() - wanted.float()).abs().max() < 2e-2 * wanted.abs().max()


def test_answers_are_of_the_schedulers_kind():
    pipe = pipe_of(TwoPassPipeline)
    x, labels = torch.randn(1, 4, 8, 8), torch.tensor([1])
    for return_dict in (True, False):
        with sodaprof.apply(pipe, updated(pipe)):
            pipe.scheduler.set_timesteps(STEPS)
            t = pipe.scheduler.timesteps[0]
            for _ in range(2):
                pipe.transformer(x, timestep=t[None], class_labels=labels)
            result = pipe.scheduler.step(x, t, x, return_dict=return_dict)
        if return_dict:
            assert type(result) is DDIMSchedulerOutput
            assert result.pred_original_sample is None
            result = (result.prev_sample, None)
        assert isinstance(result, tuple)
        assert len(result) == 2
        plain = DDIMScheduler.from_config(pipe.scheduler.config)
        plain.set_timesteps(STEPS)
        assert torch.allclose(result[0], plain.step(x, t, x).prev_sample, rtol=1e-5, atol=1e-6)


def test_two_transformers_rest_in_their_turns(wan):  # noqa: F811
    plain = draw_wan(wan)
    schedule = schedule_of(wan)
    own = replace(schedule, update=with_update(wan, schedule).update)
    with sodaprof.apply(wan, own) as handle:
        assert (draw_wan(wan) - plain).abs().max() < 1e-5 * plain.abs().max()
        assert handle.report().executed == handle.report().planned
    stacks, plans = {"transformer": ".-.-.______", "transformer_2": "_____.--.-."}, {}
    for name, plan in schedule.transformers.items():
        rows = dict.fromkeys(plan.rows, stacks[name].replace(".", "C"))
        plans[name] = replace(plan, stack=stacks[name], rows=rows)
    resting = replace(own, transformers=plans)
    with sodaprof.apply(wan, resting) as handle:
        wanted = draw_wan(wan)
        assert handle.report().executed == handle.report().planned
        assert handle.report().executed["-"] > 0
    assert (wanted - plain).abs().max() > 1e-3 * plain.abs().max()
    with sodaprof.apply(wan, resting, runtime=Compiled(graphs=Tapes())) as handle:
        for _ in range(3):
            assert torch.equal(draw_wan(wan), wanted)
            assert handle.report().executed == handle.report().planned
    assert torch.equal(draw_wan(wan), plain)


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"clip_sample": True}, "clip_sample=True"), ({"thresholding": True, "clip_sample": False}, "thresholding=True")],
)
def test_schedulers_that_are_not_linear_are_refused_by_setting(settings, says):
    pipe = pipe_of()
    schedule = updated(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    sampler = replace(schedule.sampler, config=schedule.sampler.config | settings)
    with pytest.raises(UnsupportedModelError, match=says):
        sodaprof.apply(pipe, replace(schedule, sampler=sampler))


def test_an_update_of_another_basis_is_refused():
    pipe = pipe_of(DiTPipeline, "dpm")
    schedule = updated(pipe)
    with pytest.raises(MismatchError, match=r"basis 'output', the steps of DPMSolver.* are of basis 'data'"):
        sodaprof.apply(pipe, replace(schedule, update=replace(schedule.update, basis="output")))


@pytest.mark.parametrize(
    "given", [{"eta": 0.5}, {"variance_noise": torch.zeros(1)}, {"use_clipped_model_output": True}]
)
def test_arguments_that_change_a_step_are_refused_by_name(given):
    pipe = pipe_of(TwoPassPipeline)
    x = torch.zeros(1, 4, 8, 8)
    with sodaprof.apply(pipe, updated(pipe)):
        for more in ({"eta": 0.0, "generator": None}, given):
            pipe.scheduler.set_timesteps(STEPS)
            t = pipe.scheduler.timesteps[0]
            for _ in range(2):
                pipe.transformer(x, timestep=t[None], class_labels=torch.tensor([1]))
            if more is given:
                with pytest.raises(UnsupportedModelError, match=next(iter(given))):
                    pipe.scheduler.step(x, t, x, **more)
            else:
                pipe.scheduler.step(x, t, x, **more)


def test_guidance_that_begins_while_the_network_rests_is_refused():
    class Late(TwoPassPipeline):
        @torch.no_grad()
        def __call__(self, class_labels, num_inference_steps=50, **_):
            x, labels = torch.randn(1, 4, 8, 8), torch.tensor(class_labels[:1])
            self.scheduler.set_timesteps(num_inference_steps)
            for step, t in enumerate(self.scheduler.timesteps):
                for _branch in range(3 if RESTING[step] == "-" else 2):
                    out = self.transformer(x, timestep=t[None], class_labels=labels).sample
                x = self.scheduler.step(out, t, x).prev_sample

    pipe = tiny_pipe(cls=Late)
    schedule = updated(tiny_pipe(cls=TwoPassPipeline), RESTING)
    with (
        sodaprof.apply(pipe, schedule),
        pytest.raises(MismatchError, match="3 times at step 2, which the schedule skips"),
    ):
        pipe([1], num_inference_steps=STEPS)


# ---- files ---------------------------------------------------------------------------------------------------------------


def test_an_update_is_kept_in_the_file(tmp_path):
    pipe = pipe_of(TwoPassPipeline, "dpm")
    schedule = updated(pipe, RESTING, stir=0.1)
    schedule.save(tmp_path / "s.json")
    assert load_schedule(tmp_path / "s.json") == schedule
    with sodaprof.apply(pipe, schedule):
        wanted = sample(pipe)
    with sodaprof.apply(pipe, tmp_path / "s.json"):
        assert np.array_equal(sample(pipe), wanted)
