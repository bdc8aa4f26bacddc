"""The kernel of cached sums against the sums of torch operators: bit-identical in order, fused equal except for rounding."""

from __future__ import annotations

import os

import pytest
import torch

from sodaprof.errors import UnsupportedModelError
from sodaprof.runtime.compiled import kernels, sums
from sodaprof.runtime.compiled.streams import Kept, Term

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_triton = pytest.mark.skipif(
    not kernels.available() or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs triton; runs on a GPU, or with TRITON_INTERPRET=1",
)
on_gpu = pytest.mark.skipif(DEVICE != "cuda" or not kernels.available(), reason="needs a CUDA device and triton")
# The interpreter casts to bf16 by cutting bits off, where GPU and torch round to nearest: a test of its own below.
NEAREST = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

REUSED = [([(2, None)], True), ([(0, None)], False), ([(1, None)], True), ([(3, None)], True), ([(4, None)], True)]
FORECAST = [
    ([(0, 1.75), (1, -0.75)], True),
    ([(2, None)], True),
    ([(1, 3.1), (3, -2.7), (2, 0.6)], True),  # slots 1 and 2 again
    ([(4, 0.3)], False),
    ([(3, 1 / 3), (0, 2 / 3)], False),
    ([(4, None)], False),
]
SHAPES = [(2, 13, 24), (1, 7, 200), (2, 20, 128), (3, 1, 1)]  # rows and columns that fill no tile, and that do


def tensors(terms, shape, dtype, slots=5):
    draw = torch.Generator().manual_seed(len(terms) + sum(shape))
    (b, n, d), wide = shape, torch.float32
    start, arena = torch.randn(b, n, d, generator=draw, dtype=wide), torch.randn(slots, b, n, d, generator=draw)
    gates = torch.randn(len(terms), b, d, generator=draw)
    for i, (_, gated) in enumerate(terms):
        if not gated:
            gates[i] = torch.nan  # must not be read
    return [t.to(DEVICE, dtype) for t in (start, arena, gates)]


def by_torch(start, arena, gates, terms, add):
    """The sum by torch operators."""
    total = sums._Total(start, sums.Scalars())
    for i, (sources, gated) in enumerate(terms):
        kept = tuple(Kept(slot, (), weight) for slot, weight in sources)
        term = Term(kept, i if gated else None, tuple(start.shape))
        add(total, [arena[slot] for slot, _ in sources], term, gates[i][:, None] if gated else None)
    return total.value.to(start.dtype)


def exact(start, arena, gates, terms):
    """The sum in fp64, and the sum of what its terms are in size."""
    total = start.double()
    size = total.abs()
    for i, (sources, gated) in enumerate(terms):
        for slot, weight in sources:
            one = (
                (1.0 if weight is None else weight)
                * arena[slot].double()
                * (gates[i][:, None].double() if gated else 1)
            )
            total, size = total + one, size + one.abs()
    return total, size


@needs_triton
@pytest.mark.parametrize("dtype", NEAREST)
@pytest.mark.parametrize("terms", [REUSED, FORECAST])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_order_the_bits_are_those_of_torch(shape, terms, dtype):
    start, arena, gates = tensors(terms, shape, dtype)
    found = kernels.sum_kept(start, arena, kernels.plan_of(terms, DEVICE), gates, ordered=True)
    wanted = by_torch(start, arena, gates, terms, sums._ordered)
    assert found.dtype == dtype
    assert wanted.isfinite().all()
    assert torch.equal(found, wanted)


@needs_triton
@pytest.mark.parametrize("terms", [REUSED, FORECAST])
def test_fused_differs_by_rounding_alone(terms):
    start, arena, gates = tensors(terms, (2, 13, 24), torch.float32)
    found = kernels.sum_kept(start, arena, kernels.plan_of(terms, DEVICE), gates, ordered=False)
    total, size = exact(start, arena, gates, terms)
    assert ((found - total).abs() <= 1e-6 * size).all()
    wanted = by_torch(start, arena, gates, terms, sums._fused)
    assert ((found - wanted).abs() <= 1e-6 * size).all()


@needs_triton
@pytest.mark.parametrize("dtype", NEAREST[1:])
def test_fused_rounds_narrow_types_once(dtype):
    start, arena, gates = tensors(FORECAST, (2, 13, 24), dtype)
    found = kernels.sum_kept(start, arena, kernels.plan_of(FORECAST, DEVICE), gates, ordered=False)
    total, size = exact(start, arena, gates, FORECAST)
    once = torch.finfo(dtype).eps / 2 * total.abs()
    assert ((found - total).abs() <= once * 1.001 + 1e-6 * size).all()
    assert not torch.equal(found, by_torch(start, arena, gates, FORECAST, sums._ordered))


@pytest.mark.skipif(not INTERPRETED or not kernels.available(), reason="of the interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("terms", [REUSED, FORECAST])
def test_bf16_is_rounded_in_the_same_places(terms):
    """Under the interpreter a cast to bf16 cuts off; with such a cast after every operation torch gives the same bits."""
    start, arena, gates = tensors(terms, (2, 13, 24), torch.bfloat16)
    found = kernels.sum_kept(start, arena, kernels.plan_of(terms, DEVICE), gates, ordered=True)

    def cut(x):
        return (x.view(torch.int32) & -65536).view(torch.float32)

    total = start.float()
    for i, (sources, gated) in enumerate(terms):
        parts = [arena[s].float() if w is None else cut(arena[s].float() * w) for s, w in sources]
        part = parts[0]
        for other in parts[1:]:
            part = cut(part + other)
        total = cut(total + (cut(gates[i][:, None].float() * part) if gated else part))
    assert torch.equal(found.float(), total)


@needs_triton
def test_a_sum_of_nothing_is_the_start():
    start, arena, gates = tensors(FORECAST, (2, 13, 24), torch.float32)
    nothing = kernels.sum_kept(start, arena, kernels.plan_of([], DEVICE), gates[:0], ordered=True)
    assert torch.equal(nothing, start)


@needs_triton
def test_signs_of_zero_and_infinities_are_those_of_torch():
    terms = [([(0, None)], True), ([(1, -0.0), (2, 2.0)], False), ([(3, 1.0)], True)]
    start, arena, gates = (torch.zeros_like(t) for t in tensors(terms, (1, 4, 8), torch.float16))
    start.fill_(-0.0)
    arena[:3, :, 1] = -0.0
    arena[3, :, 2], arena[2, :, 3] = torch.inf, 60000.0  # times 2.0 is infinite in fp16
    gates.fill_(1.0)
    found = kernels.sum_kept(start, arena, kernels.plan_of(terms, DEVICE), gates, ordered=True)
    assert torch.equal(found.view(torch.int16), by_torch(start, arena, gates, terms, sums._ordered).view(torch.int16))
    assert found.isinf().any()


@needs_triton
@pytest.mark.parametrize(
    "spoil",
    [
        lambda s, a, g: (s, a[:4], g),  # a slot too few
        lambda s, a, g: (s, a, g[1:]),
        lambda s, a, g: (s, a.half(), g),
        lambda s, a, g: (s[:, ::2], a[:, :, ::2].contiguous(), g),
        lambda s, a, g: (s.double(), a.double(), g.double()),
    ],
)
def test_what_the_kernel_would_misread_is_refused(spoil):
    given = spoil(*tensors(FORECAST, (2, 12, 24), torch.float32))
    with pytest.raises(ValueError, match="expected: "):
        kernels.sum_kept(given[0], given[1], kernels.plan_of(FORECAST, DEVICE), given[2], ordered=True)


def test_without_triton_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    kernels._compiled.cache_clear()
    start, arena, gates = tensors(REUSED, (1, 2, 4), torch.float32)
    with pytest.raises(UnsupportedModelError, match="pip install triton"):
        kernels.sum_kept(start, arena, kernels.plan_of(REUSED, DEVICE), gates, ordered=True)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("terms", [REUSED, FORECAST])
def test_a_graph_can_hold_it(terms):
    start, arena, gates = tensors(terms, (2, 256, 1152), torch.bfloat16)
    plan = kernels.plan_of(terms, DEVICE)
    kernels.sum_kept(start, arena, plan, gates, ordered=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.sum_kept(start, arena, plan, gates, ordered=True)
    start.mul_(0.5)
    graph.replay()
    assert torch.equal(out, by_torch(start, arena, gates, terms, sums._ordered))
