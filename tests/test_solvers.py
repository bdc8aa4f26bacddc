"""Tables of coefficients against the schedulers' own runs; what cannot be tabled; what `advance` does to a device."""

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
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sodaprof.errors import UnsupportedModelError
from sodaprof.models.clock import Clock
from sodaprof.models.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.runtime.solvers import COLUMNS, Solver, advance, solver_of

from .conftest import build_sampler

SHAPE = (2, 4, 8, 8)
DDIM, DDPM, DPM = DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
FLOW, RECTIFIED = FlowMatchEulerDiscreteScheduler, RectifiedFlowScheduler
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


def tabled_run(solver, table, x, outputs):
    generator, m, made = torch.Generator().manual_seed(11), torch.zeros(SHAPE, dtype=table.dtype), []
    for s, v in enumerate(outputs):
        noise = torch.randn(SHAPE, generator=generator, dtype=v.dtype) if solver.draws[s] else None
        x, m = advance(table, torch.tensor([s]), x, v, m if solver.remembers else None, noise)
        made.append(x)
    return made


def apart(one, other):
    """Returns the largest difference at any step, relative to the largest element of that step's sample."""
    return max(((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("make", "config", "steps"), CASES, ids=IDS)
def test_the_table_makes_the_schedulers_own_run(make, config, steps):
    scheduler = scheduler_for(make, config, steps)
    timesteps = scheduler.timesteps
    before = {key: copy.deepcopy(value) for key, value in vars(scheduler).items()}
    solver = solver_of(scheduler, timesteps)
    assert str(vars(scheduler)) == str(before)
    assert solver.coefficients.shape == (len(timesteps), len(COLUMNS))
    assert solver.coefficients.dtype == torch.float64
    assert solver.remembers == (make is DPM and len(timesteps) > 1)
    assert any(solver.draws) == (make is DDPM)

    x, outputs = outputs_for(len(timesteps))
    wide = apart(tabled_run(solver, solver.coefficients, x, outputs), own_run(scheduler, timesteps, x, outputs))
    assert wide < (2e-6 if make in (DPM, FLOW) else 1e-12)  # these two cast the sample to fp32 at each step
    x, outputs = outputs_for(len(timesteps), torch.float32)
    narrow = apart(tabled_run(solver, solver.to("cpu"), x, outputs), own_run(scheduler, timesteps, x, outputs))
    assert narrow < 1e-5
    print(f"{make.__name__} {config} {steps}: fp64 {wide:.1e} fp32 {narrow:.1e}")


@pytest.mark.parametrize(("make", "config", "steps"), CASES, ids=IDS)
def test_coefficients_are_exact_where_a_step_takes_exact_numbers(make, config, steps):
    """Signed powers of two pass the cast to fp32, so a step of its own agrees to fp64, in all its coefficients."""
    scheduler = scheduler_for(make, config, steps)
    solver, generator = solver_of(scheduler, scheduler.timesteps), torch.Generator().manual_seed(5)

    def powers():
        return (torch.randint(0, 2, SHAPE, generator=generator) * 2.0 - 1) * 2.0 ** torch.randint(
            -3, 4, SHAPE, generator=generator
        ).double()

    m = torch.zeros(SHAPE, dtype=torch.float64)
    draws, more = torch.Generator().manual_seed(11), {}
    own = torch.Generator().manual_seed(11)
    if make is DDPM:
        more = {"generator": own}
    for s, t in enumerate(scheduler.timesteps):
        x, v = powers(), powers()
        noise = torch.randn(SHAPE, generator=draws, dtype=torch.float64) if solver.draws[s] else None
        found, m = advance(solver.coefficients, torch.tensor([s]), x, v, m, noise)
        expected = scheduler.step(v, t, x, return_dict=False, **more)[0]
        assert apart([found], [expected]) < 1e-12
        if make is DPM:
            assert apart([m], [scheduler.model_outputs[-1]]) < 1e-12


def test_flow_matching_coefficients_are_the_differences_of_its_sigmas():
    scheduler = scheduler_for(FLOW, {"shift": 3.0}, {"num_inference_steps": 28})
    expected = torch.zeros(28, len(COLUMNS), dtype=torch.float64)
    expected[:, 0], expected[:, 1] = 1, scheduler.sigmas.diff().double()
    assert torch.equal(solver_of(scheduler, scheduler.timesteps).coefficients, expected)


@pytest.mark.parametrize(("make", "config"), [(DDIM, {}), (DPM, {}), (FLOW, {}), (DDPM, {})])
@pytest.mark.parametrize("begin", [True, False])
def test_a_run_that_starts_late(make, config, begin):
    scheduler = scheduler_for(make, config, {"num_inference_steps": 20})
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(8)
    timesteps = scheduler.timesteps[8:]
    x, outputs = outputs_for(12, torch.float32)
    solver = solver_of(scheduler, timesteps)
    assert apart(tabled_run(solver, solver.to("cpu"), x, outputs), own_run(scheduler, timesteps, x, outputs)) < 1e-5
    if make is DPM:
        assert not solver.coefficients[0, 2]


def test_a_scheduler_in_use_is_probed_as_before_its_first_step():
    scheduler = scheduler_for(DPM, {}, {"num_inference_steps": 20})
    fresh, late = (solver_of(scheduler, scheduler.timesteps[i:]) for i in (0, 8))
    x, outputs = outputs_for(3, torch.float32)
    for t, v in zip(scheduler.timesteps, outputs, strict=False):
        x = scheduler.step(v, t, x, return_dict=False)[0]
    clock = Clock(scheduler, build_sampler(), lambda: None, lambda: None)
    clock.attach()
    held = [id(m) for m in scheduler.model_outputs]
    assert torch.equal(solver_of(scheduler, scheduler.timesteps.tolist()).coefficients, fresh.coefficients)
    assert torch.equal(solver_of(scheduler, scheduler.timesteps[8:]).coefficients, late.coefficients)
    assert (scheduler.step_index, held) == (3, [id(m) for m in scheduler.model_outputs])
    assert clock.step is None
    assert "step" in vars(scheduler)


def test_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    scheduler = scheduler_for(DDPM, {}, {"num_inference_steps": 5})
    assert solver_of(scheduler, scheduler.timesteps).draws == [True] * 4 + [False]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [DDIM, DDPM, DPM, FLOW, RECTIFIED])
def test_half_precision_is_fp32_rounded_once(make):
    steps = {"num_inference_steps": 10} | (SIZE if make is RECTIFIED else {})
    scheduler = scheduler_for(make, {}, steps)
    solver = solver_of(scheduler, scheduler.timesteps)
    x, outputs = outputs_for(10, torch.bfloat16)
    m, noise = torch.randn(SHAPE), torch.randn(SHAPE).bfloat16()
    for s in range(10):
        found, kept = advance(solver.to("cpu"), torch.tensor([s]), x, outputs[s], m, noise)
        wide, memory = advance(solver.to("cpu"), torch.tensor([s]), x.float(), outputs[s].float(), m, noise.float())
        assert (found.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(found, wide.bfloat16())
        assert torch.equal(kept, memory)
    ours, own = tabled_run(solver, solver.to("cpu"), x, outputs), own_run(scheduler, scheduler.timesteps, x, outputs)
    print(f"{make.__name__} bf16 {apart(ours, own):.1e}")
    assert apart(ours, own) < 5e-2  # the scheduler itself sums in bf16


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
    table = solver_of(scheduler, scheduler.timesteps).to("meta")  # a place where nothing can be read back
    step = torch.zeros(1, dtype=torch.int64, device="meta")
    x, v, noise = (torch.empty(SHAPE, dtype=dtype, device="meta") for _ in range(3))
    m = torch.empty(SHAPE, device="meta")
    with Watched("meta") as watched:
        moved, kept = advance(table, step, x, v, m, noise)
        alone, none = advance(table, step, x, v)
    assert (moved.dtype, kept.dtype, alone.dtype, none) == (dtype, torch.float32, dtype, None)
    assert moved.shape == kept.shape == alone.shape == SHAPE
    assert torch.ops.aten.index_select.default in watched.ops


def test_a_trace_of_one_step_is_right_at_all_others():
    scheduler = scheduler_for(DPM, {}, {"num_inference_steps": 20})
    table, (x, (v, m)) = solver_of(scheduler, scheduler.timesteps).to("cpu"), outputs_for(2, torch.float32)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))

    def both(*args):
        return [out for out in (*advance(*args), advance(*args[:4])[0]) if out is not None]

    traced = make_fx(both)(table, torch.tensor([0]), x, v, m, noise)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]  # no numbers were baked in
    for s in range(20):
        at = table, torch.tensor([s]), x, v, m, noise
        assert all(torch.equal(one, other) for one, other in zip(traced(*at), both(*at), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_of_one_step_replays_the_whole_run():
    scheduler = scheduler_for(DPM, {}, {"num_inference_steps": 20})
    solver, (x, outputs) = solver_of(scheduler, scheduler.timesteps), outputs_for(20, torch.float32)
    table, step = solver.to("cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    place, v, m = x.cuda(), torch.zeros(SHAPE, device="cuda"), torch.zeros(SHAPE, device="cuda")

    def work():
        moved, kept = advance(table, step, place, v, m)
        place.copy_(moved)
        m.copy_(kept)
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


@pytest.mark.parametrize(
    ("make", "config", "says"),
    [
        (DDIM, {"clip_sample": True}, "Set clip_sample=False"),
        (DDPM, {"clip_sample": True}, "Set clip_sample=False"),
        (DDIM, {"clip_sample": False, "thresholding": True}, "Set thresholding=False"),
        (DPM, {"thresholding": True}, "Set thresholding=False"),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, "Set algorithm_type='dpmsolver\\+\\+'"),
        (DPM, {"solver_order": 3}, "Set solver_order=2"),
        (DPM, {"variance_type": "learned_range"}, "Set variance_type='fixed_small'"),
        (DDPM, {"clip_sample": False, "variance_type": "learned"}, "Set variance_type='fixed_small'"),
        (FLOW, {"stochastic_sampling": True}, "Set stochastic_sampling=False"),
        (EulerDiscreteScheduler, {}, "Take one of DDIMScheduler"),
        (DDPM, {"clip_sample": False, "variance_type": "fixed_large_log"}, "not finite"),
        (DDIM, {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "not finite"),
    ],
)
def test_what_is_no_weighted_sum_is_refused_by_name(make, config, says):
    scheduler = make(**config)
    scheduler.set_timesteps(10)
    with pytest.raises(UnsupportedModelError, match=says):
        solver_of(scheduler, scheduler.timesteps)


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
def test_a_step_that_only_looks_like_a_sum_is_found_out(make):
    """A class of the same name, whose settings say nothing: the random numbers of the probe tell."""
    scheduler = type("DDIMScheduler", (make,), {})(clip_sample=False)
    scheduler.set_timesteps(10)
    with pytest.raises(UnsupportedModelError, match=r"step 0 of 10 .*no weighted sum"):
        solver_of(scheduler, scheduler.timesteps)


def test_a_replaced_step_is_refused_also_below_the_clock():
    scheduler = scheduler_for(DDIM, {}, {"num_inference_steps": 10})
    own = scheduler.step
    scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"del scheduler\.step"):
            solver_of(scheduler, scheduler.timesteps)
        Clock(scheduler, build_sampler(), lambda: None, lambda: None).attach()


@pytest.mark.parametrize("timesteps", [[], [900, 500], [900, 0], list(range(1000))])
def test_timesteps_that_are_not_the_schedulers_are_refused(timesteps):
    scheduler = scheduler_for(DDIM, {}, {"num_inference_steps": 10})
    with pytest.raises(UnsupportedModelError, match="call set_timesteps first"):
        solver_of(scheduler, timesteps)


def test_timesteps_from_elsewhere_than_the_begin_index_are_refused():
    scheduler = scheduler_for(FLOW, {}, {"num_inference_steps": 10})
    scheduler.set_begin_index(4)
    with pytest.raises(UnsupportedModelError, match="from index 4"):
        solver_of(scheduler, scheduler.timesteps)


def test_a_scheduler_without_timesteps_is_refused():
    scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(UnsupportedModelError, match="set_timesteps"):
        solver_of(scheduler, scheduler.timesteps)


def test_solvers_are_looked_up_by_identity():
    table = torch.zeros(2, len(COLUMNS), dtype=torch.float64)
    assert Solver(table) != Solver(table)
    assert not Solver(table).remembers
