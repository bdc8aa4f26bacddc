"""A schedule as plain data."""

from __future__ import annotations

from sodaprof.report.schedule import schedule_data


def test_reuse_ages_and_prune_rates_are_those_of_the_cells(schedule):
    sites = schedule_data(schedule)["transformers"]["transformer"]["sites"]
    site = sites["transformer_blocks.0.attn1"]
    assert site == {"row": "CRPCFR", "reuse_ages": {"1": 1, "2": 2, "5": 2}, "prune_rates": {"2": 0.75}}
    assert sites["transformer_blocks.0.ff"]["prune_rates"] == {"5": 1}
