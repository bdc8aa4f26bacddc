"""Any legal schedule gives the same bits through the hooks, through traced blocks with tables and sums, and from graphs."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import Phase, given, settings

import sodaprof
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.runtime.compiled.engine import Compiled
from tests.strategies import legal_schedules
from tests.tape import Tapes
from tests.tiny_pipelines import draw, tiny_pipe, with_known_programs

STEPS = 3
PIPE = tiny_pipe()
MODEL, SAMPLER, _ = inspect_pipeline(PIPE, "tiny", STEPS, 4.0, 0)


@settings(max_examples=5, phases=[Phase.generate])  # to shrink a failing schedule would take minutes
@given(legal_schedules(MODEL, SAMPLER, "CRFPS"))
def test_any_legal_schedule_gives_the_same_bits_in_every_runtime(schedule):
    with sodaprof.apply(PIPE, schedule):
        wanted = draw(PIPE, steps=STEPS)
    graphs = "S" not in schedule.transformers["transformer"].stack and (
        schedule.token_rule is None or schedule.token_rule.base != "random"
    )
    for recorder in (False, Tapes()):
        with with_known_programs(sodaprof.apply(PIPE, schedule, runtime=Compiled(graphs=recorder))) as handle:
            for _ in range(4):  # records, probes, fills the tables and captures, replays
                assert np.array_equal(draw(PIPE, steps=STEPS), wanted, equal_nan=True)
                report = handle.report()
                assert Counter(report.executed) == Counter(report.planned)  # which may have counts of 0
            if recorder and graphs:
                assert report.counters.steps_replayed == STEPS
