"""The schedulers' own steps as updates: against their own runs, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from sodaprof.errors import UnsupportedModelError
from sodaprof.formats.files import decode
from sodaprof.formats.sampler import OwnUpdate
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.pipelines.clock import Clock
from sodaprof.pipelines.sampler_steps import advance, own_update, table_of
from tests.conftest import build_sampler

SHAPE = (2, 4, 8, 8)
DDIM, DDPM, DPM = DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
FLOW, RECTIFIED = FlowMatchEulerDiscreteScheduler, RectifiedFlowScheduler
UNIPC, EULER = UniPCMultistepScheduler, EulerDiscreteScheduler
FP32 = (DPM, FLOW, EULER)  # these cast the sample to fp32 at each step
SIZE = {"height": 240, "width": 426, "num_frames": 51}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
ALMOST_FLAT = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
CASES = [  # class, config, set_timesteps
    (DDIM, {}, {"num_inference_steps": 50}),
    (DDIM, {"prediction_type": "v_prediction", "set_alpha_to_one": False, "steps_offset": 1}, {"num_inference_steps": 7}),
    (DDIM, {"prediction_type": "sample", "beta_schedule": "scaled_linear"}, {"num_inference_steps": 20}),
    (DDIM, ZERO_SNR, {"num_inference_steps": 10}),
    (DDIM, {"timestep_spacing": "linspace"}, {"num_inference_steps": 1}),
    (DDPM, {}, {"num_inference_steps": 25}),
    (DDPM, {"prediction_type": "v_prediction", "variance_type": "fixed_large"}, {"num_inference_steps": 10}),
    (DDPM, {"prediction_type": "sample", "variance_type": "fixed_small_log"}, {"timesteps": [900, 500, 77, 3]}),
    (DDPM, {"beta_schedule": "scaled_linear"}, {"num_inference_steps": 250}),
    (DPM, {}, {"num_inference_steps": 20}),
    (DPM, {"solver_type": "heun"}, {"num_inference_steps": 10}),
    (DPM, {"solver_type": "heun", "final_sigmas_type": "sigma_min"}, {"num_inference_steps": 20}),
    (DPM, {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}, {"num_inference_steps": 30}),
    (DPM, {"final_sigmas_type": "sigma_min", "lower_order_final": False}, {"num_inference_steps": 8}),
    (DPM, {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {"num_inference_steps": 16}),
    (DPM, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, {"num_inference_steps": 20}),
    (DPM, ALMOST_FLAT, {"num_inference_steps": 12}),
    (DPM, ZERO_SNR, {"num_inference_steps": 10}),
    (DPM, {"prediction_type": "sample"}, {"timesteps": [901, 640, 320, 5]}),
    (DPM, {}, {"num_inference_steps": 1}),
    (FLOW, {"shift": 3.0}, {"num_inference_steps": 28}),
    (FLOW, {"use_dynamic_shifting": True}, {"sigmas": [1.0, 0.75, 0.5, 0.1], "mu": 0.8}),
    (FLOW, {"invert_sigmas": True}, {"num_inference_steps": 12}),
    (FLOW, {"use_karras_sigmas": True, "shift_terminal": 0.1}, {"num_inference_steps": 12}),
    (RECTIFIED, {}, {"num_inference_steps": 30, **SIZE}),
    (RECTIFIED, {"use_timestep_transform": False}, {"num_inference_steps": 9}),
    (DPM, {"solver_order": 3}, {"num_inference_steps": 12}),
    (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {"num_inference_steps": 12}),
    (DPM, {"timestep_spacing": "trailing"}, {"num_inference_steps": 14}),
    (DPM, {"timestep_spacing": "leading", "steps_offset": 1}, {"num_inference_steps": 14}),
    (UNIPC, {}, {"num_inference_steps": 20}),
    (UNIPC, {"solver_order": 3}, {"num_inference_steps": 20}),
    (UNIPC, {"solver_order": 1}, {"num_inference_steps": 7}),
    (UNIPC, {"disable_corrector": [0, 3], "timestep_spacing": "trailing"}, {"num_inference_steps": 10}),
    (UNIPC, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {"num_inference_steps": 10}),
    (UNIPC, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, {"num_inference_steps": 20}),
    (EULER, {}, {"num_inference_steps": 20}),
    (EULER, {"prediction_type": "v_prediction", "use_karras_sigmas": True}, {"num_inference_steps": 12}),
]  # fmt: skip
IDS = [f"{i}-{case[0].__name__}" for i, case in enumerate(CASES)]


def scheduler_for(make, config, steps):
    plain = {"clip_sample": False} if make in (DDIM, DDPM) else {}
    scheduler = make(**plain, **config)
    scheduler.set_timesteps(**steps)
    return scheduler


def outputs_for(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=generator).to(dtype)
    return x, [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(count)]


def own_run(scheduler, timesteps, x, outputs):
    """Returns the samples after each step, as the scheduler makes them; noise is drawn from seed 11."""
    scheduler, generator, made = copy.deepcopy(scheduler), torch.Generator().manual_seed(11), []
    more = {"generator": generator} if isinstance(scheduler, DDPM) else {}
    for t, v in zip(timesteps, outputs, strict=True):
        x = scheduler.step(v, t, x, return_dict=False, **more)[0]
        made.append(x)
    return made


def tabled_run(own, table, x, outputs):
    """Returns the samples after each step, as `advance` makes them; noise is drawn from seed 11."""
    generator, ring, made = torch.Generator().manual_seed(11), torch.zeros(own.history, *SHAPE, dtype=table.dtype), []
    for s, v in enumerate(outputs):
        noise = torch.zeros_like(x)
        if own.noise[s]:
            noise = own.noise[s] * torch.randn(SHAPE, generator=generator, dtype=v.dtype)
        x, ring = advance(table, torch.tensor([s]), x, v, ring, noise)
        made.append(x)
    return made


def table(own, dtype=torch.float64):
    return table_of(own.coefficients, own.data).to(dtype)


def apart(one, other):
    """Returns the largest difference at any step, relative to the largest element of that step's sample."""
    return max(((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in zip(one, other, strict=True))


def history(make, config, count):
    """How many outputs the scheduler's step weighs: UniPC's corrector uses one more; at most the steps of the run."""
    order = config.get("solver_order", 2) if make in (DPM, UNIPC) else 1
    return min(order + (make is UNIPC), count)


@pytest.mark.parametrize(("make", "config", "steps"), CASES, ids=IDS)
def test_the_update_makes_the_schedulers_own_run(make, config, steps):
    scheduler = scheduler_for(make, config, steps)
    timesteps = scheduler.timesteps
    before = {key: copy.deepcopy(value) for key, value in vars(scheduler).items()}
    own = own_update(scheduler, timesteps)
    assert str(vars(scheduler)) == str(before)
    assert own.steps == len(timesteps)
    assert own.history == history(make, config, len(timesteps))
    assert own.basis == ("data" if make in (DPM, UNIPC) else "output")
    assert any(own.noise) == (make is DDPM)
    assert decode(own.to_json(), OwnUpdate, "") == own

    x, outputs = outputs_for(len(timesteps))
    wide = apart(tabled_run(own, table(own), x, outputs), own_run(scheduler, timesteps, x, outputs))
    assert wide < (2e-6 if make in FP32 else 1e-9)
    x, outputs = outputs_for(len(timesteps), torch.float32)
    narrow = apart(tabled_run(own, table(own, torch.float32), x, outputs), own_run(scheduler, timesteps, x, outputs))
    assert narrow < 1e-5
    print(f"{make.__name__} {config} {steps}: fp64 {wide:.1e} fp32 {narrow:.1e}")


@pytest.mark.parametrize(("make", "config", "steps"), [case for case in CASES if case[0] is not UNIPC])
def test_coefficients_are_exact_for_steps_with_exact_numbers(make, config, steps):
    """Signed powers of two pass the cast to fp32, so a step of its own agrees to fp64, in all its coefficients.

    UniPC's corrector goes on from the sample of the step before, not from the one it is given: its runs are compared above.
    """
    scheduler = scheduler_for(make, config, steps)
    own, generator = own_update(scheduler, scheduler.timesteps), torch.Generator().manual_seed(5)

    def powers():
        return (torch.randint(0, 2, SHAPE, generator=generator) * 2.0 - 1) * 2.0 ** torch.randint(
            -3, 4, SHAPE, generator=generator
        ).double()

    ring = torch.zeros(own.history, *SHAPE, dtype=torch.float64)
    draws, more = torch.Generator().manual_seed(11), {}
    if make is DDPM:
        more = {"generator": torch.Generator().manual_seed(11)}
    for s, t in enumerate(scheduler.timesteps):
        x, v = powers(), powers()
        noise = torch.zeros_like(x)
        if own.noise[s]:
            noise = own.noise[s] * torch.randn(SHAPE, generator=draws, dtype=torch.float64)
        found, ring = advance(table(own), torch.tensor([s]), x, v, ring, noise)
        expected = scheduler.step(v, t, x, return_dict=False, **more)[0]
        assert apart([found], [expected]) < (1e-7 if make is EULER else 1e-12)  # which divides the sample in fp32
        if make is DPM:
            assert apart([ring[0]], [scheduler.model_outputs[-1]]) < 1e-12


def test_flow_matching_coefficients_are_the_differences_of_its_sigmas():
    scheduler = scheduler_for(FLOW, {"shift": 3.0}, {"num_inference_steps": 28})
    own = own_update(scheduler, scheduler.timesteps)
    expected = [(1.0, float(d)) for d in scheduler.sigmas.diff()]
    assert torch.allclose(torch.tensor(own.coefficients), torch.tensor(expected), rtol=1e-12, atol=0)
    assert (set(own.data), set(own.noise)) == ({(0.0, 1.0)}, {0.0})


def test_outputs_before_the_first_step_have_no_weight():
    for make in (DPM, UNIPC):
        scheduler = scheduler_for(make, {"solver_order": 3}, {"num_inference_steps": 9})
        own = own_update(scheduler, scheduler.timesteps)
        for step, row in enumerate(own.coefficients[:-1]):  # the last step is of first order
            assert not any(row[2 + step :])
            assert all(row[1 : 2 + min(step, 1)])  # what does exist does, from the second step on


@pytest.mark.parametrize(("make", "config"), [(DDIM, {}), (DPM, {}), (FLOW, {}), (DDPM, {})])
@pytest.mark.parametrize("begin", [True, False])
def test_a_run_may_start_at_a_later_timestep(make, config, begin):
    scheduler = scheduler_for(make, config, {"num_inference_steps": 20})
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(8)
    timesteps = scheduler.timesteps[8:]
    x, outputs = outputs_for(12, torch.float32)
    own = own_update(scheduler, timesteps)
    assert (
        apart(tabled_run(own, table(own, torch.float32), x, outputs), own_run(scheduler, timesteps, x, outputs)) < 1e-5
    )
    assert not any(own.coefficients[0][2:])


def test_a_scheduler_in_use_is_probed_as_before_its_first_step():
    scheduler = scheduler_for(DPM, {}, {"num_inference_steps": 20})
    fresh, late = (own_update(scheduler, scheduler.timesteps[i:]) for i in (0, 8))
    x, outputs = outputs_for(3, torch.float32)
    for t, v in zip(scheduler.timesteps, outputs, strict=False):
        x = scheduler.step(v, t, x, return_dict=False)[0]
    clock = Clock(scheduler, build_sampler(), lambda: None, lambda: None)
    clock.attach()
    held = [id(m) for m in scheduler.model_outputs]
    assert own_update(scheduler, scheduler.timesteps.tolist()) == fresh
    assert own_update(scheduler, scheduler.timesteps[8:]) == late != fresh
    assert (scheduler.step_index, held) == (3, [id(m) for m in scheduler.model_outputs])
    assert clock.step is None
    assert "step" in vars(scheduler)


def test_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    scheduler = scheduler_for(DDPM, {}, {"num_inference_steps": 5})
    assert [bool(n) for n in own_update(scheduler, scheduler.timesteps).noise] == [True] * 4 + [False]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "config", "says"),
    [
        (DDIM, {"clip_sample": True}, "Set clip_sample=False"),
        (DDPM, {"clip_sample": True}, "Set clip_sample=False"),
        (DDIM, {"clip_sample": False, "thresholding": True}, "Set thresholding=False"),
        (DPM, {"thresholding": True}, "Set thresholding=False"),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, "Set algorithm_type='dpmsolver\\+\\+'"),
        (UNIPC, {"thresholding": True}, "Set thresholding=False"),
        (UNIPC, {"solver_p": DDIM()}, "Set solver_p=None"),
        (UNIPC, {"predict_x0": False}, "not finite"),
        (DPM, {"variance_type": "learned_range"}, "Set variance_type='fixed_small'"),
        (DDPM, {"clip_sample": False, "variance_type": "learned"}, "Set variance_type='fixed_small'"),
        (FLOW, {"stochastic_sampling": True}, "Set stochastic_sampling=False"),
        (HeunDiscreteScheduler, {}, "Take one of DDIMScheduler"),
        (DDPM, {"clip_sample": False, "variance_type": "fixed_large_log"}, "not finite"),
        (DDIM, {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "not finite"),
    ],
)
def test_settings_whose_steps_are_no_weighted_sums_are_refused_by_name(make, config, says):
    scheduler = make(**config)
    scheduler.set_timesteps(10)
    with pytest.raises(UnsupportedModelError, match=says):
        own_update(scheduler, scheduler.timesteps)


class Bending(DDIMScheduler):
    def step(self, model_output, timestep, sample, **kwargs):
        return (super().step(model_output, timestep, sample, **kwargs)[0].clamp(-100, 100),)


class Shifting(DDIMScheduler):
    def step(self, model_output, timestep, sample, **kwargs):
        return (super().step(model_output, timestep, sample, **kwargs)[0] + 1e-3,)


class Mixing(DDIMScheduler):
    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output - model_output.mean(), timestep, sample, **kwargs)


@pytest.mark.parametrize("make", [Bending, Shifting, Mixing])
def test_a_step_that_is_no_weighted_sum_is_found_by_random_numbers(make):
    """A class of the same name, whose settings say nothing: the random numbers of the probe tell."""
    scheduler = type("DDIMScheduler", (make,), {})(clip_sample=False)
    scheduler.set_timesteps(10)
    with pytest.raises(UnsupportedModelError, match=r"step 0 of 10 .*no weighted sum"):
        own_update(scheduler, scheduler.timesteps)


def test_a_replaced_step_is_refused_also_below_the_clock():
    scheduler = scheduler_for(DDIM, {}, {"num_inference_steps": 10})
    own = scheduler.step
    scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"del scheduler\.step"):
            own_update(scheduler, scheduler.timesteps)
        Clock(scheduler, build_sampler(), lambda: None, lambda: None).attach()


@pytest.mark.parametrize("timesteps", [[], [900, 500], [900, 0], list(range(1000))])
def test_timesteps_that_are_not_the_schedulers_are_refused(timesteps):
    scheduler = scheduler_for(DDIM, {}, {"num_inference_steps": 10})
    with pytest.raises(UnsupportedModelError, match="call set_timesteps first"):
        own_update(scheduler, timesteps)


def test_timesteps_that_do_not_start_at_the_begin_index_are_refused():
    scheduler = scheduler_for(FLOW, {}, {"num_inference_steps": 10})
    scheduler.set_begin_index(4)
    with pytest.raises(UnsupportedModelError, match="from index 4"):
        own_update(scheduler, scheduler.timesteps)


def test_a_scheduler_without_timesteps_is_refused():
    scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(UnsupportedModelError, match="set_timesteps"):
        own_update(scheduler, scheduler.timesteps)
