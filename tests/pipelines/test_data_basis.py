"""The data basis of samplers, read off their own steps."""

import diffusers
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from sodaprof.errors import UnsupportedModelError
from sodaprof.formats.data_basis import in_data_basis, noise_levels, second_order_weights
from sodaprof.opensora import RectifiedFlowScheduler
from sodaprof.pipelines.sampler_steps import own_update

STEPS = 12
DDIM, EULER, DPM = diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def started(cls, **config):
    scheduler = cls(**config)
    scheduler.set_timesteps(STEPS)
    return scheduler


SAMPLERS = [
    (started(DDIM, clip_sample=False), False),
    (started(DDIM, clip_sample=False, prediction_type="v_prediction"), False),
    (started(DDIM, clip_sample=False, prediction_type="sample"), False),
    (started(EULER), False),
    (started(FLOW, shift=3.0), True),
    (started(RectifiedFlowScheduler, use_timestep_transform=False), True),
]


@pytest.mark.parametrize(("scheduler", "flow"), SAMPLERS)
def test_the_steps_are_the_samplers(scheduler, flow):
    own = own_update(scheduler, scheduler.timesteps)
    data = own_update(scheduler, scheduler.timesteps, "data")
    assert data == in_data_basis(own, flow)
    assert own.basis == "output"
    assert data.basis == "data"
    source = np.random.default_rng(0)
    x, outputs = source.standard_normal(5), source.standard_normal((STEPS, 5))
    for row, own_row, (of_state, of_output), v in zip(
        data.coefficients, own.coefficients, data.data, outputs, strict=True
    ):
        after = own_row[0] * x + own_row[1] * v
        assert np.allclose(row[0] * x + row[1] * (of_state * x + of_output * v), after, rtol=1e-6, atol=1e-9)
        x = after


def test_a_data_prediction_is_the_schedulers_own():
    scheduler = started(DDIM, clip_sample=False, prediction_type="v_prediction")
    x, v = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    for step, t in enumerate(scheduler.timesteps):
        of_state, of_output = own_update(scheduler, scheduler.timesteps, "data").data[step]
        found = scheduler.step(v, t, x).pred_original_sample
        assert torch.allclose(of_state * x + of_output * v, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_second_order_weights_are_those_of_dpm_solver(prediction):
    scheduler = started(DPM, prediction_type=prediction)
    own = own_update(scheduler, scheduler.timesteps, "data")
    levels = noise_levels(own, flow=False)
    for step in range(1, STEPS - 1):
        assert np.allclose(
            second_order_weights(levels, step, step + 1, [step, step - 1]), own.coefficients[step], rtol=1e-5
        )
    assert np.allclose(second_order_weights(levels, STEPS - 1, STEPS, [STEPS - 1]), [0, 1])
    assert np.allclose(second_order_weights(levels, STEPS - 1, STEPS, [STEPS - 1, STEPS - 2]), [0, 1, 0])


def test_levels_of_a_flow_begin_at_pure_noise():
    scheduler = started(FLOW)
    levels = noise_levels(own_update(scheduler, scheduler.timesteps, "data"), flow=True)
    assert np.allclose(levels[0], (0, 1))
    assert levels[-1] == (1.0, 0.0)
    assert np.isfinite(second_order_weights(levels, 1, 4, [1, 0])).all()


@pytest.mark.parametrize(
    "scheduler", [started(diffusers.DDPMScheduler, clip_sample=False), started(EULER, prediction_type="v_prediction")]
)
def test_other_samplers_have_none(scheduler):
    with pytest.raises(UnsupportedModelError, match="no data basis"):
        own_update(scheduler, scheduler.timesteps, "data")


def test_several_outputs_have_none():
    own = own_update(SAMPLERS[0][0], SAMPLERS[0][0].timesteps)
    with pytest.raises(UnsupportedModelError, match="several outputs"):
        in_data_basis(replace(own, coefficients=tuple((*row, 0.0) for row in own.coefficients)), flow=False)
