"""Conditioning tables: the same bits, and not used for a run whose arguments differ from those recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import sodaprof
from sodaprof.errors import SodaprofError
from sodaprof.formats.schedule import Forecast
from sodaprof.measure.bench import all_compute
from sodaprof.pipelines.device import Operators
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.load import call, load_pipeline
from sodaprof.runtime.compiled import precompute
from sodaprof.runtime.compiled.engine import Compiled
from sodaprof.runtime.compiled.precompute import split
from tests.tape import Tapes
from tests.tiny_pipelines import SITES, TwoPassPipeline, draw, mixed_schedule, schedule_for, tiny_pipe

SHORT, BLOCKS = 5, 2


@pytest.fixture
def pipe():
    return tiny_pipe()


def short_schedule(pipe):
    """All four actions in few programs: the blocks share them, and so do two steps."""
    attn, ff = SITES[::2], SITES[1::2]
    rows, k = dict.fromkeys(attn, "CRRPF") | dict.fromkeys(ff, "CRRFC"), dict.fromkeys(attn, (5,))
    return schedule_for(pipe, rows, k, dict.fromkeys(SITES, (Forecast((0,), (0.9,)),)), steps=SHORT)


def operators(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def served(handle):
    """Returns how many calls of a block took values from the tables in the latest run."""
    return handle.report().counters.blocks_from_tables


def test_tables_serve_from_the_second_run_on_with_the_same_bits(pipe):
    schedule = mixed_schedule(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe)
    with sodaprof.apply(pipe, schedule, runtime=Compiled(sums=None, graphs=False)) as handle:
        # none in the first run, then both blocks at all steps except the first, from the third run on at all steps
        for blocks in (0, 7 * BLOCKS, 8 * BLOCKS):
            assert np.array_equal(draw(pipe), wanted)
            assert served(handle) == blocks
        assert handle.report().executed == handle.report().planned


def test_the_rest_of_a_reused_block_is_its_gates_and_sums(pipe):
    rows = dict.fromkeys(SITES, "CRR")
    with sodaprof.apply(pipe, schedule_for(pipe, rows, steps=3), runtime="compiled") as handle:
        draw(pipe, steps=3), draw(pipe, steps=3)
        parts = list(handle.executor.engine.tables[0].filler.parts.values())
    assert parts
    for of_run, of_step, rest, *_ in parts:
        assert sorted(operators(rest)) == ["aten.add.Tensor"] * 2 + ["aten.mul.Tensor"] * 2
        assert any("addmm" in o for o in operators(of_step))
        assert any("embedding" in o for o in operators(of_run))  # labels hold for the whole run
        assert not any("addmm" in o for o in operators(rest))


def test_other_labels_batches_and_weights_get_their_own_values(pipe):
    schedule, other = short_schedule(pipe), tiny_pipe(seed=5)
    wanted = []
    for p, labels in ((pipe, (1, 2)), (pipe, (4, 5)), (pipe, (3,)), (other, (4, 5))):
        with sodaprof.apply(p, schedule):
            wanted.append(draw(p, labels, SHORT))
    with sodaprof.apply(pipe, schedule, runtime="compiled"):
        draw(pipe, steps=SHORT)
        for labels, pictures in zip(((1, 2), (4, 5), (3,)), wanted, strict=False):
            assert np.array_equal(draw(pipe, labels, SHORT), pictures)
        pipe.transformer.load_state_dict(other.transformer.state_dict())
        assert np.array_equal(draw(pipe, (4, 5), SHORT), wanted[3])


def test_two_pass_guidance():
    pipe = tiny_pipe(cls=TwoPassPipeline)
    schedule = schedule_for(pipe, {SITES[1]: "CRCR", SITES[2]: "CRRR"}, steps=4)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe, steps=4)
    with sodaprof.apply(pipe, schedule, runtime=Compiled(sums=None, graphs=False)) as handle:
        for steps in (0, 3, 4):
            assert np.array_equal(draw(pipe, steps=4), wanted)
            assert served(handle) == steps * 2 * BLOCKS  # on both branches


def test_no_values_are_kept_after_a_run(pipe):
    with sodaprof.apply(pipe, short_schedule(pipe), runtime="compiled") as handle:
        for _ in range(2):
            draw(pipe, steps=SHORT)
            assert not any(block.ready for block in handle.executor.engine.blocks)
            assert not handle.executor.engine.tables[0].arguments.first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tables": "nearly"}, "tables is 'nearly'; expected True, False or 'near'"),
        ({"sums": "quick"}, "sums is 'quick'; expected 'ordered', 'fused' or None"),
        ({"graphs": False, "whole_steps": True}, "whole_steps needs tables and graphs"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(SodaprofError, match=message):
        Compiled(**settings)


def test_random_numbers_are_not_drawn_ahead():
    def f(weight, early, late):
        noise = torch.rand_like(early)
        return (early @ weight.t()) * late + noise + early.sin().sum()

    values = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)
    first, rest = split(make_fx(f)(*values), 1, {2})
    assert not any("rand" in o for o in operators(first))
    assert any("rand" in o for o in operators(rest))
    assert not any("sin" in o for o in operators(rest))
    torch.manual_seed(0)
    wanted = f(*values)
    torch.manual_seed(0)
    assert torch.equal(rest(*values, *first(*values)), wanted)


@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_steps_are_computed_at_once_only_with_the_same_bits(pipe, monkeypatch, error):
    schedule = short_schedule(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe, steps=SHORT)
    batches = []

    def batched(self, each, parameters, inputs, of_run):
        batches.append(len(inputs))
        return [[v + error if error else v for v in each(*parameters, *at_step, *of_run)] for at_step in inputs]

    monkeypatch.setattr(precompute.Filler, "_batched", batched)
    with sodaprof.apply(pipe, schedule, runtime="compiled") as handle:
        draw(pipe, steps=SHORT), draw(pipe, steps=SHORT)
        tried, count = handle.executor.engine.tables[0].filler.at_once, len(batches)
        assert {whole is not None for whole in tried.values()} == {error == 0}
        assert np.array_equal(draw(pipe, steps=SHORT), wanted)
        assert (len(batches) > count) == (error == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_linear_layer_of_all_steps_is_one_operator(dtype):
    torch.manual_seed(0)
    bias, x, weight = torch.randn(768).to(dtype), torch.randn(6, 2, 256).to(dtype), torch.randn(256, 768).to(dtype)
    wanted = torch.stack([torch.addmm(bias, at_step, weight) for at_step in x])
    batch = (bias.expand(6, -1), x, weight.expand(6, -1, -1)), (0, 0, 0), "aten.baddbmm.default"
    product = (bias, x, weight), (None, 0, None), "aten.addmm.default"
    for inputs, dims, operator in (batch, product):
        graph = make_fx(torch.func.vmap(precompute.affine, in_dims=dims))(*inputs)
        assert [o for o in operators(graph) if "mm" in o or "add" in o or "mul" in o] == [operator]
        assert precompute.close(wanted, graph(*inputs))


@pytest.mark.parametrize(("tables", "dtype"), [(True, torch.float32), ("near", torch.bfloat16)])
def test_tables_are_filled_in_few_operators(tables, dtype):
    class Counted(Tapes):
        def __init__(self):
            super().__init__()
            self.counts = []

        def capture(self, run):
            def counted():
                with Operators() as operators:
                    result = run()
                self.counts.append(operators.count)
                return result

            return super().capture(counted)

    layers, pipe, counted = 4, tiny_pipe(layers=4).to(dtype), Counted()
    rows = {f"transformer_blocks.{i}.{module}": "CRRRCRRR" for i in range(layers) for module in ("attn1", "ff")}
    schedule = schedule_for(pipe, rows)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe)
    with sodaprof.apply(pipe, schedule, runtime=Compiled(tables=tables, graphs=counted)) as handle:
        draw(pipe), draw(pipe), draw(pipe)
        found = draw(pipe)
        assert handle.report().counters.steps_replayed == 8
    assert np.array_equal(found, wanted) if tables is True else np.allclose(found, wanted, atol=0.02)
    assert counted.counts[0] <= 45 * layers  # one by one it is 10 operators and more for each block and step


def test_linear_layers_are_cut_to_the_parts_that_are_used():
    def gates(weight, bias, x):
        parts = torch.nn.functional.linear(x, weight, bias).chunk(6, dim=1)
        return [parts[2], parts[5][:, None]]

    weight, bias, x = torch.randn(24, 8), torch.randn(24), torch.randn(2, 8)
    graph = make_fx(gates, tracing_mode="fake")(weight, bias, x)
    graph.graph.eliminate_dead_code()
    cut = precompute.narrowed(graph)
    assert sum("addmm" in o for o in operators(cut)) == 2
    assert "aten.split.Tensor" not in operators(cut)
    for a, b in zip(gates(weight, bias, x), cut(weight, bias, x), strict=True):
        assert torch.allclose(a, b)
    whole = make_fx(lambda w, b, x: list(torch.nn.functional.linear(x, w, b).chunk(6, dim=1)), tracing_mode="fake")
    same = precompute.narrowed(whole(weight, bias, x))
    assert operators(same).count("aten.addmm.default") == 1


def scaled(module, args, out):
    return (out[0] * 1.1, *out[1:])


def two_blocks():
    """The shipped text-to-image model, cut to two of its blocks."""
    pipe = load_pipeline("tiny-pixart")
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:BLOCKS]
    return pipe


def test_conditioning_outside_of_the_blocks_is_a_program_and_follows_every_change_of_the_modules():
    pipe, prompts = two_blocks(), ["two red circles", "a blue square left of a green star"]
    embedding = pipe.transformer.adaln_single

    def made(prompt=0, scale=4.5):
        return call(pipe, [prompts[prompt]], [0], 3, scale, output_type="latent").images

    def changed(module, name):  # in place, behind torch's count of versions, as merged adapters are
        getattr(module, name).data.mul_(1.05)

    model, sampler, _ = inspect_pipeline(pipe, "", 3, 4.5, prompts[0])
    handle = sodaprof.apply(pipe, all_compute(model, sampler), runtime="compiled")
    made(), made(), made()
    (program,) = handle.executor.engine.tables[0].block_arguments.programs.values()
    assert program is not None
    assert not any("conv" in o for part in program.parts for o in operators(part))  # nothing reads the embedded latents
    handle.remove()
    changes = [
        lambda: None,
        lambda: changed(embedding.linear, "weight"),
        lambda: changed(pipe.transformer.transformer_blocks[1], "scale_shift_table"),
        lambda: changed(pipe.transformer.caption_projection.linear_1, "bias"),
        lambda: setattr(embedding.linear, "bias", torch.nn.Parameter(embedding.linear.bias.detach() + 0.1)),
        lambda: setattr(embedding, "silu", torch.nn.GELU()),
        lambda: embedding.register_forward_hook(scaled),
    ]
    before = None
    for change in changes:
        change()
        wanted = [made(), made(1), made(0, 2.0)]
        assert before is None or not np.array_equal(before, wanted[0])
        before = wanted[0]
        with handle:
            for pictures, arguments in zip(wanted, ((), (1,), (0, 2.0)), strict=True):
                assert np.array_equal(made(*arguments), pictures)
                assert served(handle) == 3 * BLOCKS  # at all steps


def test_arguments_that_cannot_be_traced_are_found_by_calls_at_every_step(monkeypatch):
    pipe = two_blocks()
    embedding = pipe.transformer.adaln_single.emb
    plain = embedding.forward
    monkeypatch.setattr(type(embedding), "forward", lambda self, t, **kw: plain(t + 0 * float(t.sum()), **kw))
    made = lambda: call(pipe, ["two red circles"], [0], 3, 4.5, output_type="latent").images  # noqa: E731
    wanted = made()
    model, sampler, _ = inspect_pipeline(pipe, "", 3, 4.5, "two red circles")
    with sodaprof.apply(pipe, all_compute(model, sampler), runtime="compiled") as handle:
        for steps in (0, 2, 3, 3):
            assert np.array_equal(made(), wanted)
            assert served(handle) == steps * BLOCKS
        assert set(handle.executor.engine.tables[0].block_arguments.programs.values()) == {None}
