"""The page of results is made of the files beside it, and says what nobody measured."""

from __future__ import annotations

import json
from pathlib import Path

from sodaprof.report.page import benchmark_markdown, page

ROOT = Path(__file__).parents[1]
ROW = {
    "name": "soda", "loop_ms": 50.0, "quartiles_ms": [49.0, 52.5], "speedup": 1.9, "step_ms": [9.0, 1.0, 3.0],
    "launches": [500, 10, 70], "predicted": {"speedup": 2.0, "unit": "ms"},
}  # fmt: skip
BENCHMARK = {
    "format": "sodaprof.benchmark", "version": 1, "device": "cpu", "hardware": {"name": "a processor"}, "threads": 2,
    "dtype": "float32", "versions": {"torch": "2.13.0"}, "steps": 3, "batch": 1, "rounds": 7, "rows": [ROW],
    "command": "sodaprof bench tiny-dit",
}  # fmt: skip


def test_a_benchmark_row():
    line = benchmark_markdown(BENCHMARK).splitlines()[-1]
    assert line == "| soda | 50.0 [49.0, 52.5] | 1.900× | 2.000× ms | 0.950 | 1.00 | 3.00 | 10–70 |"


def test_sections_come_from_files_and_gaps_are_named(tmp_path):
    (tmp_path / "bench-x.json").write_text(json.dumps(BENCHMARK))
    found = page(tmp_path)
    assert "## Latency: bench-x" in found
    assert "`sodaprof bench tiny-dit` on cpu (a processor, 2 threads), float32, 3 steps, batch 1" in found
    assert found.count(": not measured (") == 4
    (tmp_path / "bench-dit-xl-2-cuda.json").write_text(json.dumps(BENCHMARK))
    assert page(tmp_path).count(": not measured (") == 3
    manifest = {
        "format": "sodaprof.profile", "model": "dit", "samples": 100, "device": "cuda:0", "dtype": "bfloat16",
        "batch_size": 8, "versions": {"torch": "2.13.0"},
        "measured": {"seconds": 161.2, "time_over_plain": 1.31, "extra_bytes": 2**29, "peak_bytes": 3 * 2**30,
                     "passes": 1, "hardware": {"name": "a GPU", "driver": "1.2"}},
    }  # fmt: skip
    (tmp_path / "profile-dit-xl-2-cuda.json").write_text(json.dumps(manifest))
    found = page(tmp_path)
    assert found.count(": not measured (") == 2
    assert "161 s, 1.31× plain sampling, 0.50 GiB of extra memory, peak 3.00 GiB with the weights, 1 pass(es)" in found
    assert "on cuda:0 (a GPU, 1.2), bfloat16, batch 8" in found


def test_the_committed_page_is_made_of_the_committed_files():
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page(ROOT / "docs" / "results")


def test_what_inductor_takes(tmp_path):
    data = {
        "format": "sodaprof.compiled", "device": "cuda:0", "hardware": {"name": "a GPU"}, "dtype": "torch.bfloat16",
        "versions": {"torch": "2.13.0"}, "command": "python -m tests.compiled m o.json", "mode": "max-autotune",
        "plain_ms": 8.5, "compiled_ms": 2.25, "captured_ms": 1.3125,
    }  # fmt: skip
    (tmp_path / "compiled-x.json").write_text(json.dumps(data))
    assert "8.500 ms plain, 2.250 ms compiled (max-autotune), in a graph captured by hand 1.312 ms" in page(tmp_path)
