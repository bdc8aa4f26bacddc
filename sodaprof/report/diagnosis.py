"""The findings of the doctor as a table."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

STYLES = {"captures": "green", "captures in part": "yellow", "falls back": "red"}


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
        line = Text.assemble(f"{name} ({about['class']}): ", (verdict, STYLES[verdict]))
        if about["blocks"]:
            line.append(f", {about['lowered']} of {about['blocks']} blocks can be traced")
        parts.append(line)
    if not result["findings"]:
        return Group(*parts, Text("No findings.", "dim"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_lines=True)
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
