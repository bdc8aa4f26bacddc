"""Cached sums: the same bits in order, fused equal except for rounding, and only over blocks that feed each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch.fx.experimental.proxy_tensor import make_fx

import sodaprof
from sodaprof.errors import MismatchError
from sodaprof.formats.schedule import Forecast
from sodaprof.runtime.compiled import sums
from sodaprof.runtime.compiled.engine import Compiled
from sodaprof.runtime.compiled.streams import Kept, Stream, StreamReader, Term
from sodaprof.runtime.compiled.sums import Scalars
from sodaprof.runtime.hooks.cells import weighted
from tests.tiny_pipelines import SITES, TwoPassPipeline, draw, schedule_for, tiny_pipe, with_known_programs

TAYLOR = Forecast((1, 0), (1.75, -0.75))


def idle_schedule(pipe):
    """Three layers: steps of R, one of F, and one whose last block computes."""
    sites = [f"transformer_blocks.{i}.{m}" for i in range(3) for m in ("attn1", "ff")]
    rows = dict.fromkeys(sites, "CCRRFRC") | {sites[-1]: "CCRRFCC"}
    return schedule_for(pipe, rows, forecasts=dict.fromkeys(sites, (TAYLOR,)), steps=7)


def sums_of(pipe, schedule, mode, runs=2):
    """Returns the pictures of the last run, its number of sums, and its blocks that took values from tables by themselves."""
    with with_known_programs(sodaprof.apply(pipe, schedule, runtime=Compiled(sums=mode, graphs=False))) as handle:
        for _ in range(runs):
            pictures = draw(pipe, steps=schedule.steps)
        report = handle.report()
    assert report.executed == report.planned
    return pictures, report.counters.sums, report.counters.blocks_from_tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_order_the_bits_are_those_of_the_blocks(dtype):
    pipe = tiny_pipe(layers=3).to(dtype)
    schedule = idle_schedule(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe, steps=7)
    pictures, count, blocks = sums_of(pipe, schedule, "ordered")
    assert np.array_equal(pictures, wanted)
    assert count == 4  # of 3, 3, 3 and 2 blocks
    assert blocks == 6 * 3 - (3 * 3 + 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_as_a_tensor_multiplies_to_the_bits_of_the_number(dtype):
    scalars, values = Scalars(), torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for weight in (1.75, -0.751234, 1 / 3):
        product = values * scalars[weight, dtype]
        assert product.dtype == dtype
        assert torch.equal(product, values * weight)
        assert scalars[weight, dtype] is scalars[weight, dtype]  # made once
    assert len(scalars) == 3


WHOLE, SPLIT = (2, 6, 4), (2, 2, 3, 4)
TERMS = [
    # weights of the kept outputs (None: not weighted), gated?, shape of the stream in the block
    ((1.75, -0.751234), True, WHOLE),
    ((None,), True, WHOLE),
    ((1 / 3, 3.1, -2.7), True, WHOLE),
    ((0.3,), False, WHOLE),
    ((None,), False, SPLIT),
    ((1.75, -0.751234), True, SPLIT),
    ((0.6, 0.7), False, WHOLE),
    ((1.1, -0.1), True, WHOLE),
]
WIDE, NARROW = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)


@pytest.mark.filterwarnings("error")  # torch warns if it resizes an output
@pytest.mark.parametrize("tried", [True, False])
@pytest.mark.parametrize(
    ("dtype", "odd"),
    [(dtype, odd) for dtype in WIDE + NARROW for odd in ("", "strided", "one for all")]
    + [(dtype, odd) for dtype in WIDE for odd in ("narrow", "narrow last")],
)
def test_a_sum_term_by_term_gives_the_bits_of_plain_operators(monkeypatch, dtype, odd, tried):
    if not tried:  # as if torch did not give these bits in one operator
        monkeypatch.setattr(sums, "adds_products", lambda dtype: False)
    noise = torch.Generator().manual_seed(0)
    wanted = start = torch.randn(WHOLE, generator=noise).to(dtype)
    total, given = sums._Total(start, Scalars()), [(start, start.clone())]
    for weights, gated, shape in TERMS:
        outputs = [torch.randn(shape, generator=noise).to(dtype) for _ in weights]
        if odd == "strided":
            outputs = [output.transpose(1, 2).contiguous().transpose(1, 2) for output in outputs]
        elif odd == "one for all" and gated:
            outputs = [output[:1] for output in outputs]
        elif gated:  # the gate widens a narrow output to the dtype of the stream
            first = {"narrow": 0, "narrow last": 1}.get(odd, len(outputs))
            outputs = [output.bfloat16() if i >= first else output for i, output in enumerate(outputs)]
        gate = torch.randn(2, *[1] * (len(shape) - 2), 4, generator=noise).to(dtype) if gated else None
        given += [(tensor, tensor.clone()) for tensor in (*outputs, gate) if tensor is not None]
        kept = tuple(Kept(i, (), weight) for i, weight in enumerate(weights))
        sums._ordered(total, outputs, Term(kept, 0 if gated else None, shape), gate)
        part = outputs[0] if weights[0] is None else weighted(outputs, weights)
        wanted = wanted.view(shape) + (part if gate is None else gate * part)
        assert torch.equal(total.value, wanted)
    assert all(torch.equal(now, before) for now, before in given)  # only the sum's own tensors are written to


@pytest.mark.parametrize("dtype", WIDE + NARROW)
@pytest.mark.parametrize("size", [1, 7, 64, 100_003])
def test_one_operator_replaces_two_only_if_it_gives_their_bits(dtype, size):
    adds = sums.adds_products(dtype)
    assert adds is False or dtype in WIDE
    noise = torch.Generator().manual_seed(size)
    total, tensor = torch.randn(2, size, generator=noise, dtype=torch.float64).to(dtype)
    for weight in (1.75, -0.751234, 1 / 3, 1.0, -0.0):
        wanted = total + tensor * weight
        if adds:
            assert torch.equal(total.clone().addcmul_(tensor, sums.ONE, value=weight), wanted)
            across = tensor.repeat(3, 1).T.contiguous().T  # strided: no vectors
            assert torch.equal(total.repeat(3, 1).addcmul_(across, sums.ONE, value=weight), wanted.repeat(3, 1))


def test_forecasts_of_branches_and_batches_are_kept_apart():
    pipe = tiny_pipe(cls=TwoPassPipeline)
    schedule = schedule_for(pipe, dict.fromkeys(SITES, "CCFRF"), forecasts=dict.fromkeys(SITES, (TAYLOR,) * 2), steps=5)
    calls = {(1, 2): 0, (3,): 1, (4, 5): 2}
    with sodaprof.apply(pipe, schedule):
        wanted = {labels: draw(pipe, labels, 5, seed) for labels, seed in calls.items()}
    with sodaprof.apply(pipe, schedule, runtime="compiled"):
        for _ in range(3):
            for labels, seed in calls.items():  # in turn, as requests come
                assert np.array_equal(draw(pipe, labels, 5, seed), wanted[labels])


def test_a_block_with_a_computing_cell_is_in_no_sum():
    pipe = tiny_pipe()
    rows = dict(zip(SITES, ("CRPRF", "CRRCR", "CRPRF", "CCRRC"), strict=True))
    k = {SITES[0]: (5,), SITES[2]: (0,)}
    forecasts = dict.fromkeys((SITES[0], SITES[2]), (Forecast((0,), (0.9,)),))
    schedule = schedule_for(pipe, rows, k, forecasts, steps=5)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe, steps=5)
    pictures, count, blocks = sums_of(pipe, schedule, "ordered", runs=3)
    assert np.array_equal(pictures, wanted)
    assert count == 4  # of one block each
    assert blocks == 5 * 2 - 4


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_fused_sums_differ_only_by_rounding(dtype, limit):
    pipe = tiny_pipe(layers=3).to(dtype)
    schedule = idle_schedule(pipe)

    def outputs():
        """What the network returns at each step of a run."""
        found = []
        hook = pipe.transformer.register_forward_hook(lambda m, a, out: found.append(out.sample))
        draw(pipe, steps=7)
        hook.remove()
        return found

    with sodaprof.apply(pipe, schedule):  # the bits of the ordered sums
        plain = outputs()
    with with_known_programs(sodaprof.apply(pipe, schedule, runtime=Compiled(sums="fused", graphs=False))):
        draw(pipe, steps=7)
        fused = outputs()
    assert len(plain) == len(fused) == 7
    same = [torch.equal(a, b) for a, b in zip(plain, fused, strict=True)]
    assert same[:2] == [True, True]  # no sums yet
    # in bf16 no product is rounded before it is added; in fp32 that depends on the CPU's instructions
    assert dtype == torch.float32 or not same[2]
    for a, b in zip(plain, fused, strict=True):
        assert (a - b).norm() / a.norm() < limit


def test_no_sums_in_the_first_run_or_without_the_option():
    pipe = tiny_pipe()
    schedule = schedule_for(pipe, dict.fromkeys(SITES, "CRR"), steps=3)
    assert sums_of(pipe, schedule, "ordered", runs=1)[1] == 0  # records how the blocks are called
    assert sums_of(pipe, schedule, None)[1] == 0


class Skips(DiTTransformer2DModel):
    """Uses the first block's output again after the last, so it does not go only to the next block."""

    def forward(self, *args, **kwargs):
        self.kept = []
        first, last = self.transformer_blocks[0], self.transformer_blocks[-1]
        hooks = [
            first.register_forward_hook(lambda m, a, out: self.kept.append(out)),
            last.register_forward_hook(lambda m, a, out: out + 0.5 * self.kept[0]),
        ]
        try:
            return super().forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()


def test_an_output_that_others_read_ends_a_sum():
    pipe = tiny_pipe(layers=3)
    pipe.transformer.__class__ = Skips
    rows = {f"transformer_blocks.{i}.{m}": "CRRCR" for i in range(3) for m in ("attn1", "ff")}
    schedule = schedule_for(pipe, rows, steps=5)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe, steps=5)
    pictures, count, blocks = sums_of(pipe, schedule, "ordered")
    assert np.array_equal(pictures, wanted)
    assert (count, blocks) == (3 * 3, 3)  # each block by itself


def test_an_output_replaced_within_a_sum_is_refused():
    pipe = tiny_pipe()
    first = pipe.transformer.transformer_blocks[0]
    with sodaprof.apply(pipe, schedule_for(pipe, dict.fromkeys(SITES, "CRRR"), steps=4), runtime="compiled") as handle:
        plain = draw(pipe, steps=4)
        hook = first.register_forward_hook(lambda m, a, out: out + 1)
        detour = draw(pipe, steps=4)  # from the beginning of a run on: each block by itself
        hook.remove()
        assert not np.array_equal(plain, detour)
        hook = first.register_forward_hook(lambda m, a, out: out + 1 if handle.executor.moment.step > 1 else out)
        with pytest.raises(MismatchError, match=r"runtime=Compiled\(sums=None\)"):
            draw(pipe, steps=4)
        hook.remove()
        assert np.array_equal(draw(pipe, steps=4), plain)


@pytest.mark.parametrize("lower", [False, True])
def test_hooks_of_others_on_a_block_run_once(lower):
    pipe, calls = tiny_pipe(), []
    pipe.transformer.transformer_blocks[1].register_forward_hook(lambda m, a, out: calls.append(1) or out * 1.5)
    wanted, schedule = draw(pipe), schedule_for(pipe)
    calls.clear()
    with sodaprof.apply(pipe, schedule, runtime=Compiled(tables=False, graphs=False) if lower else "hooks"):
        assert np.array_equal(draw(pipe), wanted)
    assert len(calls) == 8


def traced(function, *inputs):
    """The graph of function(parameter, x, y, gate, kept...)."""
    return make_fx(function, tracing_mode="fake")(*inputs)


X, GATE, KEPT = torch.randn(2, 6, 4), torch.randn(2, 1, 4), torch.randn(2, 6, 4)


def read(function):
    """Streams of a block with one parameter, arguments x (late), y and gate, and two kept outputs."""
    graph = traced(lambda *given: (function(*given), []), GATE[0], X, X + 1, GATE, KEPT, KEPT + 1)
    return StreamReader(graph, 1, [0, 1, 2, 3, 4], 3, {0}).read()


def test_sums_are_read_from_the_graph():
    whole = (2, 6, 4)
    gated = Term((Kept(3),), 3, whole)
    plain = Term((Kept(4),), None, whole)
    assert read(lambda p, x, y, g, a, b: [x + g * a + b]) == (Stream(0, (gated, plain), whole, (24, 4, 1)),)
    assert read(lambda p, x, y, g, a, b: [b + (a * g + x)]) == (Stream(0, (gated, plain), whole, (24, 4, 1)),)
    forecast = Term((Kept(3, (), 1.5), Kept(4, (), -0.5)), 0, whole)
    assert read(lambda p, x, y, g, a, b: [x + p * (a * 1.5 + b * -0.5)]) == (Stream(0, (forecast,), whole, (24, 4, 1)),)
    two = read(lambda p, x, y, g, a, b: [x + a, y + b])
    assert [stream.origin for stream in two] == [0, 1]


def test_an_output_that_is_no_sum_gives_none():
    assert read(lambda p, x, y, g, a, b: [x + x.mean() * a]) is None
    assert read(lambda p, x, y, g, a, b: [x + x * a]) is None
    assert read(lambda p, x, y, g, a, b: [(x + a).tanh()]) is None
    assert read(lambda p, x, y, g, a, b: [x + a.tanh()]) is None
    assert read(lambda p, x, y, g, a, b: [x + g * (a + b)]) is None
    assert read(lambda p, x, y, g, a, b: [x - a]) is None
    assert read(lambda p, x, y, g, a, b: [(x + a).bfloat16()]) is None


def test_two_streams_in_one_tensor_are_separated():
    def single(p, x, y, g, a, b):
        both = torch.cat([x, y], 1) + g * torch.cat([a, b], 1)
        return [both[:, :6], both[:, 6:]]

    assert read(single) is None  # in the models the kept output is one tensor

    def blocks(p, x, y, g, a, b):
        both = torch.cat([x, y], 1) + g * a
        return [both[:, :6], both[:, 6:]], []

    graph = traced(blocks, GATE[0], X, X + 1, GATE, torch.randn(2, 12, 4), KEPT)
    found = StreamReader(graph, 1, [0, 1, 2, 3, 4], 3, {0}).read()
    assert [stream.origin for stream in found] == [0, 1]
    assert [stream.terms[0].kept[0].views[-1][1] for stream in found] == [(1, 0, 6), (1, 6, 12)]
