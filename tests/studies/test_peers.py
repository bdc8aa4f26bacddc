"""The arithmetic of the comparison with other caches: masks, thresholds, counting, what did not run. No peer is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.studies import peers, peers_worker
from tests.studies.peers_contenders import CONTENDERS, Contender, Job, On, masked, printed_ratios, steps_of, work_of
from tests.studies.peers_models import HOSTS, Host
from tests.studies.peers_page import table, written
from tests.studies.peers_worker import Bench, closest, full_steps, paired, rounds_ms, sought, why_not
from tests.tiny_pipelines import MIXED_ROWS, STEPS, mixed_schedule, schedule_for, tiny_pipe

MASK = "10110010"
ROOT = Path(__file__).parents[2]


def test_mask_of_a_schedule_is_where_everything_computes():
    pipe = tiny_pipe()
    assert peers.mask_of(schedule_for(pipe)) == "1" * STEPS
    assert peers.mask_of(mixed_schedule(pipe)) == "".join(
        "1" if {row[t] for row in MIXED_ROWS.values()} == {"C"} else "0" for t in range(STEPS)
    )
    assert peers.mask_of(masked(pipe, MASK)) == MASK


def test_steps_of_a_mask_for_cache_dit():
    assert steps_of(MASK) == [1, 0, 1, 1, 0, 0, 1, 0]
    for wrong in ("", "0110", "1020", "1 0"):
        with pytest.raises(ValueError, match="no mask"):
            steps_of(wrong)


def test_work_of_a_schedule_counts_pruned_tokens_as_their_share():
    work = work_of(mixed_schedule(tiny_pipe()))
    assert work.shape == (STEPS, 4)
    assert work[0].tolist() == [1, 1, 1, 1]
    assert work[4, 0] == 5 / 16  # attn1 of block 0: CRRCP…, 5 of 16 tokens
    assert full_steps(work) == peers.mask_of(mixed_schedule(tiny_pipe())).count("1")


def test_groups_of_shipped_schedules():
    fora, soda = (peers.group_of(str(ROOT / path)) for path in peers.SCHEDULES)
    assert (fora.name, fora.mask.count("1"), fora.partial) == ("fora-2.0x", 24, False)
    assert soda.partial
    assert "sodaprof mask" in list(peers.contenders_of(soda, False))
    assert "sodaprof mask" not in list(peers.contenders_of(fora, True))
    assert next(peers.contenders_of(fora, True)) == "plain"
    every = {name for first in (True, False) for name in peers.contenders_of(soda, first)}
    assert every == set(CONTENDERS)


def test_closest_threshold_has_the_nearest_count():
    asked = []

    def count_at(threshold: float) -> float:
        asked.append(threshold)
        return float(np.clip(np.floor(20 - 10 * np.log10(threshold / 1e-3)), 1, 20))

    threshold, count = closest(count_at, 7, 1e-3, 3.0, 12)
    assert count == 7 == count_at(threshold)
    assert len(asked) < 10  # it stops when the count is met


def test_of_two_equally_near_counts_the_larger_is_taken():
    threshold, count = closest(lambda t: 9.0 if t < 0.05 else 5.0, 7, 1e-3, 3.0, 12)
    assert count == 9
    assert threshold < 0.05


def test_an_unreachable_count_gives_the_end_of_the_range():
    assert closest(lambda t: 11.0, 7, 1e-3, 3.0, 3)[1] == 11


def test_ratios_are_read_from_what_magcache_prints():
    assert printed_ratios("\n[MagCache] Calibration Complete.\n[1.0, 0.98, 1e-05]\n\n") == [1.0, 0.98, 1e-05]
    with pytest.raises(ValueError, match="no ratios"):
        printed_ratios("nothing")


def test_sides_take_turns_and_the_order_turns_around():
    order: list[str] = []
    times = rounds_ms([lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0], rounds=3, warm_up=1)
    assert "".join(order) == "baabbaab"
    assert times == [[1.0] * 3, [2.0] * 3]


def test_speed_up_is_of_rounds_so_that_a_pause_does_not_count():
    assert paired([2.0, 2.0, 50.0, 40.0, 2.0], [1.0, 1.0, 30.0, 80.0, 1.0]) == 2.0


# ---- a fake contender, on a tiny pipeline -----------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setitem(HOSTS, "tiny", Host(tiny_pipe, STEPS, "random"))
    monkeypatch.setattr(peers_worker, "CALIBRATION", 1)
    monkeypatch.setattr(peers_worker, "TRIES", 3)
    return Bench({"model": "tiny", "mask": MASK, "schedule": None})


def every_other_block(pipe, job: Job, settings, helped) -> On:
    """A cache that leaves out its blocks in as many of the last steps as the threshold says; unhelped, it does nothing."""
    count = {"calls": 0}
    skipped = round(settings["threshold"]) if helped else 0
    transformer = pipe.transformer

    def around():
        from contextlib import nullcontext

        count["calls"] = 0
        return nullcontext()

    for block in transformer.transformer_blocks:
        forward = block.forward

        def leave_out(x, *args, forward=forward, **kwargs):
            return x if count["calls"] > STEPS - skipped else forward(x, *args, **kwargs)

        block.forward = leave_out
    transformer.register_forward_pre_hook(lambda *_: count.__setitem__("calls", count["calls"] + 1))
    return On(around)


FAKE = Contender("threshold", "", every_other_block, ({"variant": 1}, {"variant": 2}), help="a push")


def test_a_cache_that_skips_nothing_is_found_out(bench):
    assert "skipped nothing, without a word: 32 of 32" in why_not(bench, FAKE, {"threshold": 3.0}, False)
    assert why_not(bench, FAKE, {"threshold": 3.0}, True) is None


def test_a_cache_that_raises_or_keeps_state_is_found_out(bench):
    def broken(pipe, job, settings, helped):
        raise RuntimeError("no such model\nmore")

    assert why_not(bench, replace(FAKE, put=broken), {}, True) == "RuntimeError: no such model"
    keeps = replace(FAKE, put=lambda *given: On(work=every_other_block(*given).work))  # nobody resets its count
    assert "state is kept" in why_not(bench, keeps, {"threshold": 3.0}, True)


def test_the_threshold_is_sought_until_as_many_steps_compute(bench):
    settings = sought(bench, FAKE, True)
    pipe, on = bench.with_cache(FAKE, settings, True)
    _, work = bench.counted(pipe, on, 5)
    assert settings["variant"] == 1  # both are equal: the first stays
    assert STEPS - full_steps(work) == 3  # the most that the range of thresholds allows; the mask leaves out 4
    assert bench.computed_share(work) < bench.computed_share(np.ones_like(work)) == 1


def test_our_schedule_counts_as_the_mask_and_is_checked_as_executed(bench):
    pipe, on = bench.with_cache(CONTENDERS["sodaprof mask"], {}, False)
    _, work = bench.counted(pipe, on, 0)
    assert "".join("1" if w.min() >= 1 else "0" for w in work) == MASK


# ---- the driver and its page ------------------------------------------------------------------------------------------


def test_driver_asks_for_every_contender_and_names_what_did_not_run(tmp_path):
    asked = []

    def ask(task):
        asked.append(task)
        if task["contender"] == "cache-dit F0":
            return {"ran": False, "why": "it must be 1"}
        return {
            "ran": True, "settings": {}, "documented": "works", "helped": None, "full_steps": 10.0, "computed": 0.5,
            "psnr_db": {"mean": 30.0, "low": 29.0, "high": 31.0, "worst_decile": 20.0}, "plain_ms": [4.0, 2.0, 3.0],
            "loop_ms": [1.5], "speedup": 2.0,
        }  # fmt: skip

    groups = [peers.Group("m", "a", "1010"), peers.Group("m", "b", "1000")]
    rows = peers.run_groups(groups, {"rounds": 3}, tmp_path, ask, set())
    assert [t["contender"] for t in asked].count("plain") == 1
    assert asked[0]["contender"] == "plain"
    assert {t["reference"] for t in asked} == {str(tmp_path / "m.npy")}
    assert len(peers.run_groups(groups, {}, tmp_path, ask, {"MagCache"})) == 3
    result = {
        "commands": ["c"], "machine": "x", "threads": 2, "batch": 1, "samples": 16, "rounds": 3,
        "masks": {"m a": "1010", "m b": "1000"}, "rows": rows,
    }  # fmt: skip
    page = table(json.loads(json.dumps(result)))
    assert f"; commit {rows[0]['commit']}; " in page
    rows[0]["commit"] = "other"
    assert "; at commit other: plain; at commit " in table(result)
    assert "| MagCache | 10.0 | 50% | 3 | 2 | 2.00× | 30.0 [29.0, 31.0] | 20.0 |" in page
    assert "- **cache-dit F0** did not run: it must be 1." in page
    assert "Steps that compute: 1 of 4, `1000`." in page


def test_rows_measured_again_take_the_place_of_the_old():
    row = {"model": "m", "group": "g"}
    old = {"commands": ["a"], "threads": 1, "masks": {}, "rows": [row | {"name": n, "at": 1} for n in "xyz"]}
    new = {"commands": ["b"], "threads": 1, "masks": {}, "rows": [row | {"name": n, "at": 2} for n in "yw"]}
    found = peers.merged(new, old)
    assert found["commands"] == ["a", "b"]
    assert [(r["name"], r["at"]) for r in found["rows"]] == [("x", 1), ("y", 2), ("z", 1), ("w", 2)]
    with pytest.raises(ValueError, match="threads was 1, now it is 2"):
        peers.merged(new | {"threads": 2}, old)


def test_a_worker_that_dies_is_a_row(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncat > /dev/null\necho 'KeyError: 3' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(python))
    row = peers.in_own_process({"threads": 1, "out": str(tmp_path / "row.json")})
    assert row == {"ran": False, "why": "the process ended with code 1: KeyError: 3"}


def test_page_is_replaced_between_its_markers():
    page = "a\n<!-- table -->\nold\n<!-- /table -->\nb\n"
    assert written(page, "new") == "a\n<!-- table -->\n\nnew\n\n<!-- /table -->\nb\n"
    with pytest.raises(ValueError, match="no <!-- table -->"):
        written("nothing", "new")
