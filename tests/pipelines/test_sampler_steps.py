"""The schedulers' own steps as updates: against their own runs, what is refused, and steps from a table (`advance`)."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler as DDIM
from diffusers import DDPMScheduler as DDPM
from diffusers import DPMSolverMultistepScheduler as DPM
from diffusers import EulerDiscreteScheduler as EULER
from diffusers import FlowMatchEulerDiscreteScheduler as FLOW
from diffusers import HeunDiscreteScheduler
from diffusers import UniPCMultistepScheduler as UNIPC
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sodaprof.errors import UnsupportedModelError
from sodaprof.formats.files import decode
from sodaprof.formats.sampler import OwnUpdate
from sodaprof.opensora.scheduler import RectifiedFlowScheduler as RECTIFIED
from sodaprof.pipelines.clock import Clock
from sodaprof.pipelines.patch import owner_of
from sodaprof.pipelines.sampler_steps import advance, own_update, table_of
from tests.conftest import build_sampler

SHAPE = (2, 4, 8, 8)
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


def seeded():
    return torch.Generator().manual_seed(11)


def drawing(make):
    """Returns the options of a step that draws noise."""
    return {"generator": seeded()} if make is DDPM else {}


def noise_of(own, step, x, generator):
    """Returns the weighted noise that the scheduler adds at a step, of x's shape and dtype."""
    drawn = torch.randn(SHAPE, generator=generator, dtype=x.dtype) if own.noise[step] else torch.zeros_like(x)
    return own.noise[step] * drawn


def own_run(scheduler, timesteps, x, outputs):
    """Returns the samples after each step, as the scheduler makes them; noise is drawn from seed 11."""
    scheduler, made = copy.deepcopy(scheduler), []
    more = drawing(type(scheduler))
    for t, v in zip(timesteps, outputs, strict=True):
        x = scheduler.step(v, t, x, return_dict=False, **more)[0]
        made.append(x)
    return made


def tabled_run(own, table, x, outputs):
    """Returns the samples after each step, as `advance` makes them; noise is drawn from seed 11."""
    generator, ring, made = seeded(), torch.zeros(own.history, *SHAPE, dtype=table.dtype), []
    for s, v in enumerate(outputs):
        x, ring = advance(table, torch.tensor([s]), x, v, ring, noise_of(own, s, x, generator))
        made.append(x)
    return made


def table(own, dtype=torch.float64):
    return table_of(own.coefficients, own.data).to(dtype)


def clock_of(scheduler):
    return Clock(scheduler, build_sampler(), lambda: None, lambda: None)


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


@pytest.mark.parametrize(("make", "config", "steps"), [case for case in CASES if case[0] is not UNIPC])
def test_coefficients_are_exact_for_steps_with_exact_numbers(make, config, steps):
    """Signed powers of two pass the cast to fp32, so a step of its own agrees to fp64, in all its coefficients.

    UniPC's corrector goes on from the sample of the step before, not from the one it is given: its runs are compared above.
    """
    scheduler = scheduler_for(make, config, steps)
    own, generator = own_update(scheduler, scheduler.timesteps), torch.Generator().manual_seed(5)

    def powers():
        signs, exponents = (torch.randint(*ends, SHAPE, generator=generator) for ends in ((0, 2), (-3, 4)))
        return (signs * 2.0 - 1) * 2.0 ** exponents.double()

    ring = torch.zeros(own.history, *SHAPE, dtype=torch.float64)
    draws, more = seeded(), drawing(make)
    for s, t in enumerate(scheduler.timesteps):
        x, v = powers(), powers()
        found, ring = advance(table(own), torch.tensor([s]), x, v, ring, noise_of(own, s, x, draws))
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
    tabled = tabled_run(own, table(own, torch.float32), x, outputs)
    assert apart(tabled, own_run(scheduler, timesteps, x, outputs)) < 1e-5
    assert not any(own.coefficients[0][2:])


def test_a_scheduler_in_use_is_probed_as_before_its_first_step():
    scheduler = scheduler_for(DPM, {}, {"num_inference_steps": 20})
    fresh, late = (own_update(scheduler, scheduler.timesteps[i:]) for i in (0, 8))
    x, outputs = outputs_for(3, torch.float32)
    for t, v in zip(scheduler.timesteps, outputs, strict=False):
        x = scheduler.step(v, t, x, return_dict=False)[0]
    clock = clock_of(scheduler)
    clock.attach()
    held = [id(m) for m in scheduler.model_outputs]
    assert own_update(scheduler, scheduler.timesteps.tolist()) == fresh
    assert own_update(scheduler, scheduler.timesteps[8:]) == late != fresh
    assert (scheduler.step_index, held) == (3, [id(m) for m in scheduler.model_outputs])
    assert clock.step is None
    assert owner_of(scheduler) is clock


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


@pytest.mark.parametrize(
    "changed",
    [
        lambda step, v, t, x: (step(v, t, x, return_dict=False)[0].clamp(-100, 100),),
        lambda step, v, t, x: (step(v, t, x, return_dict=False)[0] + 1e-3,),
        lambda step, v, t, x: step(v - v.mean(), t, x, return_dict=False),
    ],
    ids=["clamped", "shifted", "mixed"],
)
def test_a_step_that_is_no_weighted_sum_is_found_by_random_numbers(changed):
    """A class of the same name, whose settings show nothing."""
    step = lambda self, v, t, x, **options: changed(super(type(self), self).step, v, t, x)  # noqa: E731
    scheduler = type("DDIMScheduler", (DDIM,), {"step": step})(clip_sample=False)
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
        clock_of(scheduler).attach()


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
    scheduler = DPM()
    with pytest.raises(UnsupportedModelError, match="set_timesteps"):
        own_update(scheduler, scheduler.timesteps)


# ---- steps from a table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [DDIM, DDPM, DPM, FLOW, RECTIFIED, UNIPC])
def test_half_precision_is_fp32_rounded_once(make):
    scheduler = scheduler_for(make, {}, {"num_inference_steps": 10} | (SIZE if make is RECTIFIED else {}))
    own = own_update(scheduler, scheduler.timesteps)
    narrow = table(own, torch.float32)
    x, outputs = outputs_for(10, torch.bfloat16)
    ring, noise = torch.randn(own.history, *SHAPE), torch.randn(SHAPE).bfloat16()
    for s in range(10):
        found, kept = advance(narrow, torch.tensor([s]), x, outputs[s], ring, noise)
        wide, memory = advance(narrow, torch.tensor([s]), x.float(), outputs[s].float(), ring, noise.float())
        assert (found.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(found, wide.bfloat16())
        assert torch.equal(kept, memory)
    ours, theirs = tabled_run(own, narrow, x, outputs), own_run(scheduler, scheduler.timesteps, x, outputs)
    assert apart(ours, theirs) < 5e-2  # the scheduler itself sums in bf16


class Watched(TorchDispatchMode):
    """Notes operators, and refuses what leaves the device: host copies, `item`, tensors that lie elsewhere."""

    def __init__(self, device):
        super().__init__()
        self.device, self.ops = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert torch.Tag.data_dependent_output not in func.tags, func
        assert torch.Tag.dynamic_output_shape not in func.tags, func
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)}
        assert devices <= {self.device}, (func, devices)
        self.ops.append(func)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_advance_stays_on_the_device(dtype):
    scheduler = scheduler_for(DPM, {}, {"num_inference_steps": 20})
    there = table(own_update(scheduler, scheduler.timesteps), torch.float32).to("meta")  # on which no value can be read
    step = torch.zeros(1, dtype=torch.int64, device="meta")
    x, v, noise = (torch.empty(SHAPE, dtype=dtype, device="meta") for _ in range(3))
    ring = torch.empty(2, *SHAPE, device="meta")
    with Watched("meta") as watched:
        moved, kept = advance(there, step, x, v, ring, noise)
    assert (moved.dtype, kept.dtype) == (dtype, torch.float32)
    assert (moved.shape, kept.shape) == (SHAPE, ring.shape)
    assert torch.ops.aten.index_select.default in watched.ops


def test_a_trace_of_one_step_is_right_at_all_others():
    scheduler = scheduler_for(DPM, {}, {"num_inference_steps": 20})
    narrow = table(own_update(scheduler, scheduler.timesteps), torch.float32)
    x, (v, *kept, noise) = outputs_for(4, torch.float32)
    ring = torch.stack(kept)
    traced = make_fx(advance)(narrow, torch.tensor([0]), x, v, ring, noise)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]  # no numbers were baked in
    for s in range(20):
        at = narrow, torch.tensor([s]), x, v, ring, noise
        assert all(torch.equal(one, other) for one, other in zip(traced(*at), advance(*at), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_of_one_step_replays_the_whole_run():
    scheduler = scheduler_for(DPM, {}, {"num_inference_steps": 20})
    own, (x, outputs) = own_update(scheduler, scheduler.timesteps), outputs_for(20, torch.float32)
    there, step = table(own, torch.float32).cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")
    place, v, ring = x.cuda(), torch.zeros(SHAPE, device="cuda"), torch.zeros(2, *SHAPE, device="cuda")
    noise = torch.zeros(SHAPE, device="cuda")

    def work():
        moved, kept = advance(there, step, place, v, ring, noise)
        place.copy_(moved)
        ring.copy_(kept)
        step.add_(1)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    made = []
    for output in outputs:
        v.copy_(output)
        graph.replay()
        made.append(place.cpu())
    assert apart(made, own_run(scheduler, scheduler.timesteps, x, outputs)) < 1e-5
