"""Markdown of the comparison tables: every policy at every budget, and what calibration does not cover."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

UNITS = {"flops": "FLOPs", "ms": "measured latency"}
WHOM = {"full": "the full run", "data": "the data"}
LEGEND = (
    "PSNR to the full run, mean over the seeds with its 95 % bootstrap interval; worst tenth: mean PSNR of the worst tenth of "
    "the seeds; flipped: share of pictures under 20 dB, which are other pictures; latents: relative L2 error; over SODA: paired "
    "difference with its 95 % interval. Fewer steps at `anchors`: at the full steps of one of the schedules, where these did "
    "best on calibration seeds. Bold: what is new here, the rest is published."
)


def table_markdown(data: dict[str, Any], picture: str | None = None) -> str:
    """Returns the tables of one model: one a budget, rows by falling PSNR; `picture` is linked above them."""
    parts = [f"![PSNR over speed-up]({picture})\n"] if picture else []
    parts.append(LEGEND + "\n")
    compiled = "; ".join(f"{name} `{options}`" for name, options in data["compiled"].items())
    parts.append(f"Made by `sodaprof compile PROFILE --budget …` with: {compiled}.\n")
    parts.append(f"### {data['model']} at a glance\n\n{summary_markdown(data)}\n")
    for entry in data["budgets"]:
        parts.append(f"### {data['model']} at {entry['budget']:g}× ({UNITS[data['unit']]})\n\n{_budget(data, entry)}\n")
        if entry["left_out"]:
            reasons = "; ".join(f"{one['name']} ({one['reason'].rstrip('.')})" for one in entry["left_out"])
            parts.append(f"Left out: {reasons}.\n")
    if data.get("distances"):
        samples = data["distances"]["samples"]
        parts.append(f"### {data['model']}: distances, {samples} samples a side\n\n{_distances(data['distances'])}\n")
    return "\n".join(parts).rstrip("\n")


def summary_markdown(data: dict[str, Any]) -> str:
    """Returns one table of all budgets: a row a method, best first; mean PSNR and, behind the stroke, that of the worst tenth."""
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for entry in data["budgets"]:
        for row in entry["rows"]:
            found.setdefault(row["name"], {})[entry["budget"]] = row
    budgets = [entry["budget"] for entry in data["budgets"]]

    def mean(rows: dict[float, dict[str, Any]]) -> float:
        return sum(row["psnr_db"]["mean"] for row in rows.values()) / len(rows)

    lines = [
        ["PSNR dB / worst tenth", "works by", *(f"{b:g}×" for b in budgets)],
        ["---", "---", *["---:"] * len(budgets)],
    ]
    for rows in sorted(found.values(), key=lambda rows: (-len(rows), -mean(rows))):
        any_row = next(iter(rows.values()))
        quality = [rows[b]["psnr_db"] if b in rows else None for b in budgets]
        cells = ["–" if q is None else f"{q['mean']:.1f} / {q['worst_decile']:.1f}" for q in quality]
        lines.append([_name(any_row), ", ".join(any_row["works_by"]), *cells])
    return _markdown(lines)


def _budget(data: dict[str, Any], entry: dict[str, Any]) -> str:
    rows = sorted(entry["rows"], key=lambda row: -row["psnr_db"]["mean"])
    measured, accurate = any("loop_speedup" in row for row in rows), "accuracy" in data["full"]
    columns: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [  # head, the full run's cell, a row's cell
        ("", "full run", lambda row: f"{_name(row)} ({row['detail']})"),
        ("works by", "", lambda row: ", ".join(row["works_by"])),
        ("FLOPs", "1.00×", lambda row: f"{row['flops_speedup']:.2f}×"),
        ("PSNR dB", "", lambda row: _interval(row["psnr_db"])),
        ("worst tenth", "", lambda row: f"{row['psnr_db']['worst_decile']:.1f}"),
        ("flipped", "", lambda row: f"{row['flipped']:.0%}"),
        ("SSIM", "", lambda row: f"{row['ssim']:.3f}"),
        ("latents", "", lambda row: "" if row["latent_l2"] is None else f"{row['latent_l2']:.3f}"),
        ("over SODA dB", "", lambda row: _interval(row.get("over", {}).get("soda"), sign=True)),
        ("worst tenth over SODA's", "", lambda row: _interval(_worst(row), sign=True)),
    ]
    if accurate:
        columns.insert(-2, ("class", f"{data['full']['accuracy']:.1%}", lambda row: f"{row['accuracy']:.1%}"))
    if measured:
        timed = lambda row: f"{row['loop_speedup']:.2f}×" if "loop_speedup" in row else ""  # noqa: E731
        columns.insert(3, ("measured", "1.00×", timed))
    heads, full, cells = zip(*columns, strict=True)
    lines = [list(heads), ["---", "---", *["---:"] * (len(heads) - 2)], list(full)]
    return _markdown([*lines, *([cell(row) for cell in cells] for row in rows)])


def _worst(row: dict[str, Any]) -> dict[str, float] | None:
    over: dict[str, Any] = row.get("over", {}).get("soda", {})
    return over.get("worst_decile")


def _name(row: dict[str, Any]) -> str:
    return f"**{row['name']}**" if row["ours"] else row["name"]


def _distances(data: dict[str, Any]) -> str:
    rows = [row for entry in data["budgets"] for row in entry["rows"]]
    sides = [side for side in WHOM if any(side in row["distance"] for row in rows)]
    head = ["", "FLOPs", *(f"{kind} to {WHOM[side]}" for side in sides for kind in ("Fréchet", "kernel"))]
    with_data = "data" in sides
    head += ["kernel over the full run's"] if with_data else []
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    full = data["full"].get("distance", {})
    lines.append(["full run", "1.00×", *_cells(full, sides), *([""] if with_data else [])])
    for row in rows:
        cells = _cells(row["distance"], sides)
        if with_data:
            over = row["distance"]["data"]["kernel_over_full"]
            cells.append("{mean:+.1%} [{low:+.1%}, {high:+.1%}]".format(
                **{key: value / full["data"]["kernel"] for key, value in over.items()}
            ))  # fmt: skip
        lines.append([_name(row), f"{row['flops_speedup']:.2f}×", *cells])
    return _markdown(lines)


def _cells(distance: dict[str, Any], sides: Sequence[str]) -> list[str]:
    cells = []
    for side in sides:
        found = distance.get(side)
        cells += [f"{found['frechet']:.4g}", f"{found['kernel']:.4g}"] if found else ["", ""]
    return cells


def robustness_markdown(data: dict[str, Any]) -> str:
    """Returns one table a budget: a row a case, a column a method, mean PSNR and, behind the stroke, that of the worst tenth."""
    parts = ["PSNR dB to the full run of the same case: mean / mean of the worst tenth of the seeds.\n"]
    for budget in dict.fromkeys(case["budget"] for case in data["cases"]):
        cases = [case for case in data["cases"] if case["budget"] == budget]
        ours = {row["name"]: row["ours"] for case in cases for row in case["rows"]}
        lines = [
            ["", *(f"**{name}**" if mine else name for name, mine in ours.items())],
            ["---", *["---:"] * len(ours)],
        ]
        for case in cases:
            found = {row["name"]: row["psnr_db"] for row in case["rows"]}
            cells = [f"{found[n]['mean']:.1f} / {found[n]['worst_decile']:.1f}" if n in found else "" for n in ours]
            lines.append([case["case"], *cells])
        parts.append(f"### {data['model']} at {budget:g}× FLOPs\n\n{_markdown(lines)}\n")
    return "\n".join(parts).rstrip("\n")


def _interval(found: dict[str, float] | None, sign: bool = False) -> str:
    if found is None:
        return ""
    form = "{:+.1f}" if sign else "{:.1f}"
    return f"{form} [{form}, {form}]".format(found["mean"], found["low"], found["high"])


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def evaluation_markdown(result: dict[str, Any]) -> str:
    """Returns the table of an evaluation in Markdown."""
    accurate = "accuracy" in result["full"]
    head = ["", "FLOPs", "wall-clock", "PSNR dB [95 %]", "worst tenth dB", "SSIM", *(["class"] if accurate else [])]
    accuracy = [f"{result['full']['accuracy']:.1%}"] if accurate else []
    lines = [head, ["---", *["---:"] * (len(head) - 1)], ["full run", "1.00×", "1.00×", "", "", "", *accuracy]]
    for row in sorted(result["rows"], key=lambda row: round(row["flops_speedup"], 1)):
        q = row["psnr_db"]
        lines.append([
            f"{row['name']} ({row['detail']})", f"{row['flops_speedup']:.2f}×", f"{row['wall_speedup']:.2f}×",
            f"{q['mean']:.1f} [{q['low']:.1f}, {q['high']:.1f}]", f"{q['worst_decile']:.1f}", f"{row['ssim']:.3f}",
            *([f"{row['accuracy']:.1%}"] if accurate else []),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
