"""`advance`: a step from a table of coefficients, without a host sync."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sodaprof.pipelines.sampler_steps import advance, own_update
from tests.pipelines.test_own_update import (
    DDIM,
    DDPM,
    DPM,
    FLOW,
    RECTIFIED,
    SHAPE,
    SIZE,
    UNIPC,
    apart,
    outputs_for,
    own_run,
    scheduler_for,
    table,
    tabled_run,
)


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
    print(f"{make.__name__} bf16 {apart(ours, theirs):.1e}")
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
    narrow, (x, (v, m, n)) = (
        table(own_update(scheduler, scheduler.timesteps), torch.float32),
        outputs_for(3, torch.float32),
    )
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    ring = torch.stack((m, n))
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
