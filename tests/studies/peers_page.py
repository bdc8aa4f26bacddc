"""Makes the table of docs/studies/peers.md from docs/studies/results/peers.json: `python -m tests.studies.peers_page`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

BEGIN, END = "<!-- table -->", "<!-- /table -->"
HEAD = (
    "", "full steps", "computed", "plain ms", "loop ms", "speed-up", "PSNR dB [95 %]", "worst tenth dB",
)  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Returns the page's generated part in Markdown: where it was measured, a table a mask, what did not run."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(result.get("versions", {}).items()))
    lines = [
        f"`{'`, then `'.join(result['commands'])}` on {result.get('device', '?')} ({result['machine']}), "
        f"{result['threads']} threads, batch {result['batch']}, {result['samples']} held-out seeds, "
        f"{result['rounds']} rounds; {_commits(result['rows'])}; {versions}."
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["model"], row["group"]), []).append(row)
    for (model, name), rows in groups.items():
        mask = result["masks"][f"{model} {name}"]
        lines += [
            "",
            f"### {model}, {name}",
            "",
            f"Steps that compute: {mask.count('1')} of {len(mask)}, `{mask}`.",
            "",
        ]
        lines += [_line(HEAD), _line(["---", *["---:"] * (len(HEAD) - 1)])]
        lines += [_line(_cells(row)) for row in rows if row["ran"]]
        if failed := [row for row in rows if not row["ran"]]:
            lines += ["", *(f"- **{row['name']}** did not run: {row['why']}." for row in failed)]
        if helped := [row for row in rows if row["ran"] and row["helped"]]:
            lines += [""] * (not failed)
            lines += [
                f"- {row['name']} as documented: {row['documented']}. Ran with {row['helped']}." for row in helped
            ]
    return "\n".join(lines)


def _commits(rows: list[dict[str, Any]]) -> str:
    """Returns at which commit the rows were measured; where there are several, whose rows at which."""
    names: dict[str, list[str]] = {}
    for row in rows:
        known = names.setdefault(str(row["commit"]), [])
        known += [row["name"]] * (row["name"] not in known)
    if len(names) == 1:
        return f"commit {next(iter(names))}"
    return "; ".join(f"at commit {commit}: {', '.join(known)}" for commit, known in names.items())


def _cells(row: dict[str, Any]) -> list[str]:
    plain, loop, quality = np.median(row["plain_ms"]), np.median(row["loop_ms"]), row["psnr_db"]
    settings = ", ".join(f"{k} {v:.3g}" for k, v in row["settings"].items())
    name = row["name"] + (f" ({settings})" if settings else "")
    cells = [
        name,
        f"{row['full_steps']:.1f}",
        f"{row['computed']:.0%}",
        f"{plain:.0f}",
        f"{loop:.0f}",
        f"{row['speedup']:.2f}×",
    ]
    if row["name"] == "plain":
        return [*cells, "", ""]
    return [
        *cells, f"{quality['mean']:.1f} [{quality['low']:.1f}, {quality['high']:.1f}]", f"{quality['worst_decile']:.1f}"
    ]  # fmt: skip


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def written(page: str, made: str) -> str:
    """Returns the page with what stands between the two markers replaced; ValueError where they are missing."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> int:
    """Writes the table into the page."""
    result = json.loads(Path("docs/studies/results/peers.json").read_text(encoding="utf-8"))
    page = Path("docs/studies/peers.md")
    page.write_text(written(page.read_text(encoding="utf-8"), table(result)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
