"""Tables of an evaluation, a benchmark, measured candidates, an inspection, and the findings of the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..formats.cost import CostModel
from ..formats.schedule import Schedule
from ..formats.sites import Model, Sampler, SiteKey
from . import guidance_text

PLAIN: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
VERDICTS = {"captures": "green", "captures in part": "yellow", "falls back": "red"}
SIDES = {"full": "the full run", "data": "the data"}


def _table(columns: Sequence[str], title: str | None = None, wrap_name: bool = False) -> Table:
    """Returns an empty table for 80 columns: a name, then numbers; only the name may be wrapped, or only the numbers."""
    table = Table(**PLAIN, title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=wrap_name == bool(number))
    return table


def evaluation_view(result: dict[str, Any]) -> RenderableType:
    """Returns the table of an evaluation and its notes."""
    title = f"{result['samples']} held-out seeds from {result['seed']}, {guidance_text(result['guidance_scale'])}"
    classes = ("class",) if "accuracy" in result["full"] else ()
    table = _table(
        ("", "FLOPs", "wall", "PSNR dB [95 %]", "worst", "flip", "SSIM", "L2", *classes), title, wrap_name=True
    )
    full = ["full", "1.00x", "1.00x", *"–––––"]
    table.add_row(*full, *(f"{result['full']['accuracy']:.1%}" for _ in classes))
    for row in result["rows"]:
        q = row["psnr_db"]
        table.add_row(
            Text.assemble(f"{row['name']}\n", (row["detail"], "dim")),
            f"{row['flops_speedup']:.2f}x",
            f"{row['wall_speedup']:.2f}x",
            f"{q['mean']:.1f} [{q['low']:.1f} {q['high']:.1f}]",
            f"{q['worst_decile']:.1f}",
            f"{row['flipped']:.0%}",
            f"{row['ssim']:.3f}",
            "–" if row["latent_l2"] is None else f"{row['latent_l2']:.3f}",
            *(f"{row['accuracy']:.1%}" for _ in classes),
        )
    legend = "PSNR to the full run; worst: mean of its worst tenth; flip: pictures under 20 dB; L2: relative error of the latents"
    return Group(table, Text(legend, "dim"), *(Text(line) for line in _lines(result)))


def _lines(result: dict[str, Any]) -> list[str]:
    """Returns the paired differences of the schedules (the JSON has those of the controls, too), distances, cells, notes."""
    lines, full = [], {"name": "full", "distance": result["full"].get("distance", {})}
    for row in result["rows"]:
        for reference, d in row.get("over", {}).items() if "planned" in row and row["name"] != "fora" else ():
            lines.append(
                f"{row['name']} {row['flops_speedup']:.2f}x is {d['mean']:+.2f} dB from {reference} at {d['speedup']:.2f}x "
                f"(paired 95 % interval {d['low']:+.2f} to {d['high']:+.2f})."
            )
    for row in (*result["rows"], full):
        for side, d in row.get("distance", {}).items():
            lines.append(f"{row['name']}: Fréchet {d['frechet']:.4g}, kernel {d['kernel']:.4g} to {SIDES[side]}.")
    for row in result["rows"]:
        if row.get("executed") is not None:
            counts = ", ".join(f"{a} {row['executed'].get(a, 0)}/{n}" for a, n in sorted(row["planned"].items()))
            lines.append(f"{row['name']} {row['flops_speedup']:.2f}x executed/planned: {counts}.")
    return lines + result["notes"]


def benchmark_view(result: dict[str, Any]) -> RenderableType:
    """Returns the table of a benchmark."""
    title = (
        f"loop of {result['steps']} steps, batch {result['batch']}, {result['dtype']}, {result['device']}, "
        f"median of {result['rounds']} rounds"
    )
    kind = "kernels" if "cuda" in result["device"] else "operators"
    table = _table(("", "ms", "quartiles", "speed-up", "predicted", "step ms", kind), title)
    for row in result["rows"]:
        predicted = row.get("predicted")
        table.add_row(
            row["name"],
            f"{row['loop_ms']:.1f}",
            "{:.1f} {:.1f}".format(*row["quartiles_ms"]),
            f"{row['speedup']:.3f}x",
            f"{predicted['speedup']:.3f}x {predicted['unit']}" if predicted else "",
            f"{min(row['step_ms'][1:]):.2f} - {max(row['step_ms'][1:]):.2f}",
            f"{min(row['launches'][1:])} - {max(row['launches'][1:])}",
        )
    legend = (
        "plain: the pipeline untouched; hooks, lowered, tables, captured: all computed, by hooks, traced blocks, with "
        "conditioning tables, in CUDA graphs; speed-up: against the last of these; "
        f"step ms and {kind}: of a step's network calls, without the first step, which fills the tables"
    )
    return Group(table, Text(legend, "dim"))


def candidates_view(rows: Sequence[tuple[str, Schedule, dict[str, float], float]]) -> RenderableType:
    """Returns the table of candidates measured on the model: (name, schedule, figures, score) each."""
    table = _table(("candidate", "full steps", "speed-up", "MiB", "mean dB", "worst tenth dB", "score dB"))
    for name, schedule, figures, score in rows:
        predicted = schedule.predicted or {}
        table.add_row(
            name,
            str(len(schedule.anchors())),
            f"{predicted['speedup']:.3f}x",
            f"{predicted['cache_bytes'] / 2**20:.2f}",
            f"{figures['mean_db']:.2f}",
            f"{figures['worst_decile_db']:.2f}",
            f"{score:.2f}",
        )
    return Group(table, Text("score: the mean of mean and worst tenth; the best score is taken", "dim"))


def inspection_view(model: Model, sampler: Sampler, cost: CostModel) -> RenderableType:
    """Returns the sites by module, with shapes and shares of a full step's FLOPs."""
    parts: list[RenderableType] = []
    for name, transformer in model.transformers.items():
        table_cost = cost.transformers[name]
        numbers = [Column(name, justify="right") for name in ("layers", "tokens", "width", "FLOPs", "prunable")]
        table = Table("module", "kind", *numbers, title=f"{name}: {transformer.class_name}", box=None)
        groups: dict[tuple[str, str, str], list[Any]] = {}
        for site in transformer.sites:
            groups.setdefault((site.stack, SiteKey.parse(site.key).name, site.kind), []).append(site)
        for (stack, module, kind), sites in groups.items():
            flops = sum(table_cost.sites[s.key].C for s in sites)
            table.add_row(
                f"{stack}.*.{module}", kind, str(len(sites)), str(sites[0].tokens), str(sites[0].width),
                f"{flops / table_cost.full:.1%}", "yes" if all(s.prunable for s in sites) else "no",
            )  # fmt: skip
        table.add_row("outside the sites", "", "", "", "", f"{table_cost.step.fixed / table_cost.full:.1%}", "")
        parts.append(table)
        parts.append(Text(f"{table_cost.full / 1e9:.4g} GFLOP a step and generation, both guidance branches included"))
    guidance = guidance_text(sampler.guidance_scale, sampler.guidance_form)
    parts.append(Text(f"{sampler.steps} steps of {sampler.class_name}, {guidance}, latents {model.shape['latent']}"))
    return Group(*parts)


def diagnosis_view(result: dict[str, Any]) -> RenderableType:
    """Returns the verdict on each transformer and the findings, for 80 columns."""
    scheduler, guidance = result["scheduler"], result["guidance"]
    loop = "can be in the graph of a step" if scheduler["in_loop"] else "runs in Python between captured calls"
    scale = "" if guidance["scale"] is None else f" {guidance['scale']:g}"
    parts: list[RenderableType] = [
        Text(f"{result['pipeline']}, {result['steps']} steps of {scheduler['class']} ({loop})"),
        Text(f"guidance{scale} in {guidance['form']}" if guidance["form"] != "none" else "one network call a step"),
    ]
    for name, about in result["transformers"].items():
        verdict = result["verdict"][name]
        line = Text.assemble(f"{name} ({about['class']}): ", (verdict, VERDICTS[verdict]))
        if about["blocks"]:
            line.append(f", {about['lowered']} of {about['blocks']} blocks can be traced")
        parts.append(line)
    if not result["findings"]:
        return Group(*parts, Text("No findings.", "dim"))
    table = Table(**PLAIN, show_lines=True)
    table.add_column("place and finding", ratio=4, overflow="fold")
    table.add_column("effect, what to do", ratio=3, overflow="fold")
    for found in result["findings"]:
        modules = found.get("modules", ())
        what = Text.assemble((found["where"], "bold"), f" ({len(modules)} modules)" if len(modules) > 1 else "", "\n")
        what.append(found["what"])
        if "source" in found:
            what.append(
                f"\n{found['source'].rsplit('.', 1)[-1]}\n{shorten(found['code'], 84, placeholder=' …')}", "dim"
            )
        table.add_row(what, Text.assemble(found["effect"], "\n", (found["do"], "dim")))
    return Group(*parts, table)
