"""docs/studies/results.md and its figures, from the JSON files of evaluations, comparisons and benchmarks.

python -m tests.studies.page docs/studies/results docs/studies/results.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sodaprof.formats.files import read_json, write_text
from tests.studies.chart import comparison_svg
from tests.studies.comparison import evaluation_markdown, robustness_markdown, table_markdown

HEAD = """# Results

Made by `python -m tests.studies.page docs/studies/results docs/studies/results.md` from the JSON files in that folder; each
section names the command that measured it and the machine. What no file holds is not measured. Rows of `solver` were measured
before its placements and fits competed ([solver](solver.md)).
"""
WANTED = {  # what this page is to show one day, and the file that would hold it
    "DiT-XL/2 at 256, batch 2 with guidance, bf16, 50 steps, on one GPU": "gpu-dit.json",
    "PixArt-XL at 512 and 1024, batch 2 with guidance, bf16, 20 steps, on one GPU": "gpu-pixart.json",
    "`sodaprof profile` of DiT-XL/2 on one GPU": "gpu-profiling.json",
}


def page(folder: Path) -> str:
    """Returns the page: a section for each file, by name, and a list of what nobody has measured."""
    parts = [HEAD]
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        if data.get("format") == "sodaprof.evaluation":
            parts.append(f"## Fidelity: {path.stem}\n\n{_about(data)}\n\n{evaluation_markdown(data)}\n")
        elif data.get("format") == "sodaprof.benchmark":
            parts.append(f"## Latency: {path.stem}\n\n{_about(data)}\n\n{benchmark_markdown(data)}\n")
        elif data.get("format") == "sodaprof.table":
            picture = f"{folder.name}/{path.stem}.svg" if data["unit"] == "flops" else None
            parts.append(f"## Every policy: {path.stem}\n\n{_about(data)}\n\n{table_markdown(data, picture)}\n")
        elif data.get("format") == "sodaprof.robustness":
            parts.append(f"## Beyond calibration: {path.stem}\n\n{_about(data)}\n\n{robustness_markdown(data)}\n")
        elif data.get("format") == "sodaprof.light-steps":
            parts.append(f"## Light steps: {path.stem}\n\n{_about(data)}\n\n{light_markdown(data)}\n")
        elif data.get("format") == "sodaprof.profile":
            parts.append(f"## Profile: {path.stem}\n\n{profile_markdown(data)}\n")
    missing = [f"- {what}: not measured (`{name}`)" for what, name in WANTED.items() if not (folder / name).exists()]
    if missing:
        parts.append("## Not measured\n\n" + "\n".join(missing) + "\n")
    return "\n".join(parts)


def figures(folder: Path) -> dict[Path, str]:
    """Returns what belongs in each figure that the page links to: SVG beside its JSON."""
    tables = {path: read_json(path) for path in sorted(folder.glob("*.json"))}
    return {
        path.with_suffix(".svg"): comparison_svg(data)
        for path, data in tables.items()
        if data.get("format") == "sodaprof.table" and data["unit"] == "flops"
    }


def benchmark_markdown(data: dict[str, Any]) -> str:
    """Returns a benchmark as a Markdown table; steps without the first, which fills the tables."""
    kind = "kernels" if "cuda" in data["device"] else "operators"
    head = [
        "",
        "loop ms [quartiles]",
        "speed-up",
        "predicted",
        "of it",
        "cheapest step ms",
        "dearest",
        f"{kind} a step",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in data["rows"]:
        predicted = row.get("predicted")
        low, high = row["quartiles_ms"]
        steps, launches = row["step_ms"][1:], row["launches"][1:]
        lines.append([
            row["name"], f"{row['loop_ms']:.1f} [{low:.1f}, {high:.1f}]", f"{row['speedup']:.3f}×",
            f"{predicted['speedup']:.3f}× {predicted['unit']}" if predicted else "",
            f"{row['speedup'] / predicted['speedup']:.3f}" if predicted else "",
            f"{min(steps):.2f}", f"{max(steps):.2f}", f"{min(launches)}–{max(launches)}",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def light_markdown(data: dict[str, Any]) -> str:
    """Returns what steps that compute little take of a full step, in percent with quartiles over the runs."""
    kinds = list(data["rows"][0]["percent of full"])
    lines = [["% of a full step", "full ms", *kinds], ["---", *["---:"] * (len(kinds) + 1)]]
    for row in data["rows"]:
        quartiles = (row["percent of full"][kind] for kind in kinds)
        cells = (f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in quartiles)
        lines.append([row["model"], f"{row['ms']['full']:.2f}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def profile_markdown(manifest: dict[str, Any]) -> str:
    """Returns what a profile took, from its manifest."""
    taken = manifest["measured"]
    hardware = ", ".join(taken["hardware"].values())
    peak = "" if taken["peak_bytes"] is None else f", peak {taken['peak_bytes'] / 2**30:.2f} GiB with the weights"
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return (
        f"`sodaprof profile {manifest['model']} --samples {manifest['samples']}` on {manifest['device']} ({hardware}), "
        f"{manifest['dtype']}, batch {manifest['batch_size']}: {taken['seconds']:.0f} s, {taken['time_over_plain']:.2f}× plain "
        f"sampling, {taken['extra_bytes'] / 2**30:.2f} GiB of extra memory{peak}, {taken['passes']} pass(es); {versions}."
    )


def _about(data: dict[str, Any]) -> str:
    hardware = ", ".join(data["hardware"].values()) if "hardware" in data else data.get("machine", "")
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    command = f"`{data['command']}`" if data.get("command") else "`make schedules`"
    loop = (
        f", {data['steps']} steps, batch {data['batch']}, median of {data['rounds']} rounds" if "rounds" in data else ""
    )
    return f"{command} on {data['device']} ({hardware}, {data['threads']} threads), {data['dtype']}{loop}; {versions}."


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.studies.page FOLDER PAGE")
    for figure, svg in figures(Path(sys.argv[1])).items():
        write_text(figure, svg, force=True)
    write_text(Path(sys.argv[2]), page(Path(sys.argv[1])), force=True)
