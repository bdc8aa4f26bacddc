"""Steps that skip the blocks: what stands in for them, and what runs under them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from msgspec.structs import replace

import sodaprof
from sodaprof.errors import MismatchError, UnsupportedModelError
from sodaprof.formats.schedule import Forecast, TokenRule
from sodaprof.runtime.compiled.engine import Compiled
from tests.tape import Tapes
from tests.tiny_pipelines import SITES, STEPS, draw, schedule_for, tiny_pipe

STACK = "...S.SS."


@pytest.fixture
def pipe():
    return tiny_pipe()


def skipping(pipe, forms=("output", "drift", "output"), first=("CCCCCCCC",) * 4):
    """Skips steps 3, 5 and 6; layer 0 may be computed under a skip."""
    cells = (
        Forecast((2, 0), (1.5, -0.5), forms[0]),
        Forecast((4,), (1.0,), forms[1]),
        Forecast((4, 2), (2.0, -1.0), forms[2]),
    )
    schedule = schedule_for(pipe, dict(zip(SITES, first, strict=True)))
    plan = schedule.transformers["transformer"]
    rows = {s: "".join("-" if a == "S" and s not in SITES[:2] else r for a, r in zip(STACK, row, strict=True))
            for s, row in plan.rows.items()}  # fmt: skip
    return replace(schedule, transformers={"transformer": replace(plan, rows=rows, stack=STACK, stack_forecasts=cells)})


def blocks_of(pipe):
    """Records (input of the first block, output of the last) at every call: outside our hooks."""
    seen = []
    first, last = pipe.transformer.transformer_blocks[0], pipe.transformer.transformer_blocks[-1]
    first.register_forward_pre_hook(lambda m, args: seen.append([args[0]]))
    last.register_forward_hook(lambda m, args, out: seen[-1].append(out))
    return seen


def test_the_hidden_state_is_forecast_from_earlier_steps(pipe):
    rows = ("CCC-C--C", "CCC-C--C", *("CCCCCCCC",) * 2)
    schedule = skipping(pipe, first=rows)
    seen = blocks_of(pipe)
    with sodaprof.apply(pipe, schedule) as handle:
        draw(pipe)
        report = handle.report()
    (_, h0), (_, h2), (e4, h4), (e5, h5) = seen[0], seen[2], seen[4], seen[5]
    assert torch.equal(seen[3][1], h2 * 1.5 + h0 * -0.5)
    assert torch.equal(h5, e5 + (h4 - e4) * 1.0)
    assert torch.equal(seen[6][1], h4 * 2.0 + h2 * -1.0)
    assert report.executed == report.planned == {"C": 20, "-": 12}


def test_computed_sites_under_a_skip_fill_their_caches_and_no_more(pipe):
    """Layer 0 runs at step 3 for its caches: step 4 reuses what it computed there; the hidden state is the forecast."""
    rows = ("CCCCR--C", "CCCCR--C", *("CCCCCCCC",) * 2)
    schedule = skipping(pipe, first=rows)
    outputs, seen = [], blocks_of(pipe)
    pipe.transformer.transformer_blocks[0].ff.register_forward_hook(lambda m, a, out: outputs.append(out))
    with sodaprof.apply(pipe, schedule) as handle:
        draw(pipe)
        report = handle.report()
    assert torch.equal(seen[3][1], seen[2][1] * 1.5 + seen[0][1] * -0.5)
    assert torch.equal(outputs[4], outputs[3])
    assert not torch.equal(outputs[4], outputs[2])
    assert report.executed == report.planned


def test_nothing_is_left_after_a_run_and_two_runs_are_equal(pipe):
    rows = ("CCC-C--C", "CCC-C--C", *("CCCCCCCC",) * 2)
    plain = draw(pipe)
    with sodaprof.apply(pipe, skipping(pipe, first=rows)) as handle:
        one = draw(pipe)
        assert all(not stack.memory for stack in handle.executor.stacks)
        assert (one == draw(pipe)).all()
    assert (draw(pipe) == plain).all()


def test_sources_are_dropped_after_their_last_use(pipe):
    rows = ("CCC-C--C", "CCC-C--C", *("CCCCCCCC",) * 2)
    alive = []
    with sodaprof.apply(pipe, skipping(pipe, first=rows)) as handle:
        step = pipe.scheduler.step

        def look(*args, **kwargs):
            store = handle.executor.stacks[0].memory[0]
            alive.append((sorted(store.hidden), sorted(store.drift)))
            return step(*args, **kwargs)

        pipe.scheduler.step = look
        draw(pipe)
        pipe.scheduler.step = step
    assert alive[:7] == [([0], []), ([0], []), ([0, 2], []), ([2], []), ([2, 4], [4]), ([2, 4], [4]), ([], [])]


def test_blocks_that_hand_on_more_than_one_tensor_are_refused(pipe):
    rows = ("CCC-C--C", "CCC-C--C", *("CCCCCCCC",) * 2)
    schedule = skipping(pipe, first=rows)
    block = pipe.transformer.transformer_blocks[0]
    forward = block.forward
    block.forward = lambda *a, **kw: (forward(*a, **kw), None)
    with sodaprof.apply(pipe, schedule), pytest.raises(UnsupportedModelError, match="hand on one tensor"):
        draw(pipe)


def test_a_bonus_grid_that_does_not_fill_the_raster_is_refused(pipe):
    """16 tokens are 4 x 4: blocks of 3 x 3 do not fill them."""
    rule = TokenRule("attention_received", bonus=0.5, bonus_grid=3)
    schedule = replace(schedule_for(pipe, {SITES[1]: "CP" + "C" * (STEPS - 2)}, {SITES[1]: (4,)}), token_rule=rule)
    with pytest.raises(MismatchError, match=r"4 x 4 patches.*3 x 3"):
        sodaprof.apply(pipe, schedule)


def test_attention_by_other_means_is_refused(pipe):
    """A processor that does not call scaled_dot_product_attention has no weights to score by."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe.transformer.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    rule = TokenRule("attention_received")
    schedule = replace(schedule_for(pipe, {SITES[1]: "CP" + "C" * (STEPS - 2)}, {SITES[1]: (4,)}), token_rule=rule)
    with sodaprof.apply(pipe, schedule), pytest.raises(UnsupportedModelError, match="set_attention_backend"):
        draw(pipe)


def test_observing_attention_changes_no_bit(pipe):
    """Where no token is chosen anew, a rule that looks at attention leaves the pictures as they were."""
    plain = draw(pipe)
    rule = TokenRule("attention_received", age_weight=0.25)
    rows = {SITES[1]: "CC" + "C" * (STEPS - 3) + "P"}
    schedule = replace(schedule_for(pipe, rows, {SITES[1]: (16,)}), token_rule=rule)
    with sodaprof.apply(pipe, schedule) as handle:
        for row in handle.executor.rows:
            row.cells = tuple(dataclasses.replace(cell, observes=cell.observes or row.attends) for cell in row.cells)
        assert (draw(pipe) == plain).all()


def test_skipping_schedules_are_not_captured_and_say_so(pipe):
    schedule = skipping(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe)
    with sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=Tapes())) as handle:
        for _ in range(4):
            assert (draw(pipe) == wanted).all()
        assert handle.report().path.startswith("compiled, no CUDA graphs: the schedule skips the stack")
