"""The page of results is made of the files beside it, and says what nobody measured."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.studies import light_steps
from tests.studies.page import benchmark_markdown, figures, page

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
SVG = "{http://www.w3.org/2000/svg}"
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
    assert found.count(": not measured (") == 3
    (tmp_path / "gpu-dit.json").write_text(json.dumps(BENCHMARK))
    assert page(tmp_path).count(": not measured (") == 2
    manifest = {
        "format": "sodaprof.profile", "model": "dit", "samples": 100, "device": "cuda:0", "dtype": "bfloat16",
        "batch_size": 8, "versions": {"torch": "2.13.0"},
        "measured": {"seconds": 161.2, "time_over_plain": 1.31, "extra_bytes": 2**29, "peak_bytes": 3 * 2**30,
                     "passes": 1, "hardware": {"name": "a GPU", "driver": "1.2"}},
    }  # fmt: skip
    (tmp_path / "gpu-profiling.json").write_text(json.dumps(manifest))
    found = page(tmp_path)
    assert found.count(": not measured (") == 1
    assert "161 s, 1.31× plain sampling, 0.50 GiB of extra memory, peak 3.00 GiB with the weights, 1 pass(es)" in found
    assert "on cuda:0 (a GPU, 1.2), bfloat16, batch 8" in found


def test_the_committed_page_is_made_of_the_committed_files():
    assert (STUDIES / "results.md").read_text(encoding="utf-8") == page(STUDIES / "results")


def test_what_light_steps_take(tmp_path):
    times = np.full((3, light_steps.STEPS), np.nan)
    for letter, ms in {"C": 20.0, "R": 1.0, "F": 1.5, "-": 0.1}.items():
        times[:, [t for t, action in enumerate(light_steps.ROW) if action == letter]] = ms
    times[0] *= 2  # a slow run counts as the others: all is held against its own full steps
    found = light_steps.shares(times)
    assert found["ms"] == {"full": 20.0, "reuse": 1.0, "forecast, two sources": 1.5, "no network": 0.1}
    assert found["percent of full"]["forecast over reuse"] == [2.5, 2.5, 2.5]
    data = {
        "format": "sodaprof.light-steps", "device": "cpu", "hardware": {"name": "a processor"}, "threads": 1,
        "dtype": "float32", "versions": {"torch": "2.13.0"}, "command": "make bench", "rows": [{"model": "m"} | found],
    }  # fmt: skip
    (tmp_path / "light-steps.json").write_text(json.dumps(data))
    line = "| m | 20.00 | 5.00 [5.00, 5.00] | 7.50 [7.50, 7.50] | 0.50 [0.50, 0.50] | 2.50 [2.50, 2.50] |"
    assert line in page(tmp_path)


def row(name, speedup, mean, **others):
    about = {
        "detail": "9 anchors",
        "works_by": ["reuse"],
        "flipped": 0.125,
        "ssim": 0.98,
        "latent_l2": 0.1,
        "accuracy": 0.95,
        "ours": False,
    }
    quality = {"mean": mean, "low": mean - 1, "high": mean + 1, "worst_decile": mean - 9}
    return {"name": name, "flops_speedup": speedup, "wall_speedup": 1.9, "psnr_db": quality} | about | others


def comparison():
    """Two budgets: what is new overtakes what is published; one policy is left out of the second."""
    over = {
        "soda": {
            "mean": 3.25,
            "low": 2.0,
            "high": 4.5,
            "speedup": 2.0,
            "worst_decile": {"mean": 1.0, "low": -1.0, "high": 2.0},
        }
    }
    new = {"ours": True, "works_by": ["update"], "over": over}
    fewer = {"works_by": ["fewer steps"], "detail": "10 steps, even"}
    kernel = {"mean": 1.0, "low": -0.5, "high": 2.5}
    far = {
        "distance": {
            "full": {"frechet": 1.5, "kernel": 0.25},
            "data": {"frechet": 9.0, "kernel": 11.0, "kernel_over_full": kernel},
        }
    }
    first = [row("SODA", 2.0, 40.0), row("update", 2.08, 43.25, **new), row("fewer steps, UniPC", 2.0, 39.0, **fewer)]
    second = [row("SODA", 5.0, 30.0), row("update", 5.2, 29.0, **new)]
    reason = [{"name": "ToCa", "reason": "No N meets the budget."}]
    return {
        "format": "sodaprof.table", "version": 1, "model": "tiny-dit", "unit": "flops", "command": "make table",
        "device": "cpu", "machine": "x86_64", "threads": 2, "dtype": "float32", "versions": {"torch": "2.13.0"},
        "compiled": {"SODA": "--policy soda", "update": "--policy solver"}, "full": {"accuracy": 0.975},
        "budgets": [
            {"budget": 2.0, "rows": first, "left_out": []}, {"budget": 5.0, "rows": second, "left_out": reason},
        ],
        "distances": {
            "samples": 1000, "full": {"distance": {"data": {"frechet": 8.0, "kernel": 10.0}}},
            "budgets": [{"budget": 2.0, "rows": [row("update", 2.08, 43.25, **new, **far)]}],
        },
    }  # fmt: skip


def test_a_comparison_is_a_table_a_budget_by_falling_psnr(tmp_path):
    (tmp_path / "table-x.json").write_text(json.dumps(comparison()))
    found = page(tmp_path)
    assert "## Every policy: table-x" in found
    first, second = found.split("### tiny-dit at 2× (FLOPs)")[1].split("### tiny-dit at 5× (FLOPs)")
    names = [line.split("|")[1].split("(")[0].strip() for line in first.splitlines() if line.startswith("| ")][2:]
    assert names == ["full run", "**update**", "SODA", "fewer steps, UniPC"]
    best = "| **update** (9 anchors) | update | 2.08× | 43.2 [42.2, 44.2] | 34.2 | 12% | 0.980 | 0.100 |"
    assert best in first
    assert best not in second
    assert "+3.2 [+2.0, +4.5] | +1.0 [-1.0, +2.0] |" in first
    assert "Left out: ToCa (No N meets the budget)." in second
    assert "Left out" not in first
    assert "SODA `--policy soda`; update `--policy solver`" in found
    widths = {line.count("|") for line in first.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    distances = found.split("distances, 1000 samples a side")[1]
    assert "| **update** | 2.08× | 1.5 | 0.25 | 9 | 11 | +10.0% [-5.0%, +25.0%] |" in distances


def test_measured_latency_has_a_column_of_its_own(tmp_path):
    data = comparison() | {"unit": "ms", "full": {}, "distances": None}
    data["budgets"][0]["rows"][0]["loop_speedup"] = 1.97
    (tmp_path / "table-x.json").write_text(json.dumps(data))
    found = page(tmp_path).split("### tiny-dit at 2× (measured latency)")[1]
    assert "| SODA (9 anchors) | reuse | 2.00× | 1.97× | 40.0" in found
    lines = [line for line in found.split("###")[0].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_beyond_calibration_there_is_a_row_a_case_and_a_column_a_method(tmp_path):
    about = {key: value for key, value in comparison().items() if key not in ("budgets", "distances", "full", "unit")}
    cases = [
        {"case": "guidance 2", "budget": 3.5, "rows": [row("SODA", 3.5, 30.0), row("update", 3.6, 44.0, ours=True)]},
        {"case": "20 steps", "budget": 3.5, "rows": [row("update", 3.6, 37.25, ours=True)]},
    ]
    (tmp_path / "robust-x.json").write_text(json.dumps(about | {"format": "sodaprof.robustness", "cases": cases}))
    found = page(tmp_path)
    assert "|  | SODA | **update** |\n| --- | ---: | ---: |" in found
    assert "| guidance 2 | 30.0 / 21.0 | 44.0 / 35.0 |\n| 20 steps |  | 37.2 / 28.2 |" in found


def test_the_figure_has_a_line_a_method_that_falls_to_the_right(tmp_path):
    (tmp_path / "table-x.json").write_text(json.dumps(comparison()))
    (tmp_path / "bench-x.json").write_text(json.dumps(BENCHMARK))
    ((path, svg),) = figures(tmp_path).items()
    assert path == tmp_path / "table-x.svg"
    root = ElementTree.fromstring(svg)
    texts = {text.text for text in root.iter(SVG + "text")}
    assert {"SODA", "update", "fewer steps, UniPC", "2×", "5×"} <= texts
    lines = {
        path.get("d"): path
        for path in root.iter(SVG + "path")
        if path.get("fill") == "none" and path.get("d").count("L") == 1
    }
    thick = [d for d, path in lines.items() if path.get("stroke-width") == "3"]
    (start, end) = ([float(v) for v in part.split()] for part in thick[0][1:].split("L"))
    assert start[0] < end[0]
    assert start[1] < end[1]
    assert sum(path.get("stroke-dasharray") is not None for path in root.iter(SVG + "path")) == 1
    heights = sorted(
        float(t.get("y")) for t in root.iter(SVG + "text") if t.text in ("SODA", "update", "fewer steps, UniPC")
    )
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 15


def test_the_committed_figures_are_made_of_the_committed_files():
    for path, svg in figures(STUDIES / "results").items():
        # coordinates are logarithms, whose last bit depends on the C library, rounded to a tenth
        numbers = re.compile(r"\d+\.\d")
        committed = path.read_text(encoding="utf-8")
        assert numbers.sub("#", committed) == numbers.sub("#", svg)
        assert list(map(float, numbers.findall(committed))) == pytest.approx(
            list(map(float, numbers.findall(svg))), abs=0.11
        )
