"""Steps that skip the blocks: what replaces their output, and what runs under them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sodaprof
from sodaprof.errors import MismatchError, UnsupportedModelError
from sodaprof.formats.schedule import TokenRule
from sodaprof.runtime.compiled.engine import Compiled
from tests.tape import Tapes
from tests.tiny_pipelines import SITES, STEPS, draw, schedule_for, skipping_schedule, tiny_pipe


@pytest.fixture
def pipe():
    return tiny_pipe()


def blocks_of(pipe):
    """Returns a list that fills with (input of the first block, output of the last), outside our hooks."""
    seen = []
    first, last = pipe.transformer.transformer_blocks[0], pipe.transformer.transformer_blocks[-1]
    first.register_forward_pre_hook(lambda m, args: seen.append([args[0]]))
    last.register_forward_hook(lambda m, args, out: seen[-1].append(out))
    return seen


def test_the_hidden_state_is_forecast_from_earlier_steps(pipe):
    plain, schedule = draw(pipe), skipping_schedule(pipe)
    seen = blocks_of(pipe)
    with sodaprof.apply(pipe, schedule) as handle:
        one = draw(pipe)
        assert handle.report().executed == handle.report().planned == {"C": 20, "-": 12}
        assert all(not stack.memory for stack in handle.executor.stacks)
        (_, h0), (_, h2), (e4, h4), (e5, h5) = seen[0], seen[2], seen[4], seen[5]
        assert torch.equal(seen[3][1], h2 * 1.5 + h0 * -0.5)
        assert torch.equal(h5, e5 + (h4 - e4) * 1.0)
        assert torch.equal(seen[6][1], h4 * 2.0 + h2 * -1.0)
        assert (draw(pipe) == one).all()
    assert (draw(pipe) == plain).all()


def test_computed_sites_under_a_skip_fill_their_caches_and_no_more(pipe):
    """Layer 0 runs at step 3 for its caches: step 4 reuses what it computed there; the hidden state is the forecast."""
    schedule, outputs = skipping_schedule(pipe, layer_0="CCCCR--C"), []
    seen = blocks_of(pipe)
    pipe.transformer.transformer_blocks[0].ff.register_forward_hook(lambda m, a, out: outputs.append(out))
    with sodaprof.apply(pipe, schedule) as handle:
        draw(pipe)
        assert handle.report().executed == handle.report().planned
    assert torch.equal(seen[3][1], seen[2][1] * 1.5 + seen[0][1] * -0.5)
    assert torch.equal(outputs[4], outputs[3])
    assert not torch.equal(outputs[4], outputs[2])


def test_sources_are_dropped_after_their_last_use(pipe):
    kept = []
    with sodaprof.apply(pipe, skipping_schedule(pipe)) as handle:
        step = pipe.scheduler.step

        def note(*args, **kwargs):
            kept.append({f"{form[0]}{source}" for form, source in handle.executor.stacks[0].memory[0].kept})
            return step(*args, **kwargs)

        pipe.scheduler.step = note
        draw(pipe)
        pipe.scheduler.step = step
    both = {"o2", "o4", "d4"}
    assert kept[:7] == [{"o0"}, {"o0"}, {"o0", "o2"}, {"o2"}, both, both, set()]


def test_blocks_that_return_more_than_one_tensor_are_refused(pipe):
    schedule = skipping_schedule(pipe)
    block = pipe.transformer.transformer_blocks[0]
    forward = block.forward
    block.forward = lambda *a, **kw: (forward(*a, **kw), None)
    with sodaprof.apply(pipe, schedule), pytest.raises(UnsupportedModelError, match="whose blocks return one tensor"):
        draw(pipe)


def test_schedules_that_skip_the_stack_are_not_captured_and_report_it(pipe):
    schedule = skipping_schedule(pipe, layer_0="CCCCC--C")
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe)
    with sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=Tapes())) as handle:
        for _ in range(3):
            assert (draw(pipe) == wanted).all()
        assert handle.report().path.startswith("compiled, no CUDA graphs: the schedule skips the stack")


# ---- token rules ------------------------------------------------------------------------------------------------------


def test_a_bonus_grid_that_does_not_fill_the_raster_is_refused(pipe):
    """16 tokens are 4 x 4: blocks of 3 x 3 do not fill them."""
    rule = TokenRule("attention_received", bonus=0.5, bonus_grid=3)
    schedule = schedule_for(pipe, {SITES[1]: "CP" + "C" * (STEPS - 2)}, {SITES[1]: (4,)}, rule=rule)
    with pytest.raises(MismatchError, match=r"4 x 4 patches.*3 x 3"):
        sodaprof.apply(pipe, schedule)


def test_observing_attention_changes_no_bit(pipe):
    """A rule that reads attention changes no picture if no token is chosen by it."""
    plain = draw(pipe)
    rule = TokenRule("attention_received", age_weight=0.25)
    schedule = schedule_for(pipe, {SITES[1]: "C" * (STEPS - 1) + "P"}, {SITES[1]: (16,)}, rule=rule)
    with sodaprof.apply(pipe, schedule) as handle:
        for row in handle.executor.rows:
            row.cells = tuple(dataclasses.replace(cell, observes=cell.observes or row.attends) for cell in row.cells)
        assert (draw(pipe) == plain).all()
