"""Makes the tables of docs/studies/proxies.md from docs/studies/results/proxies-tiny-dit.json; its text is written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sodaprof.formats.files import write_text

BEGIN, END = "<!-- tables -->", "<!-- /tables -->"
FAMILIES = {"updates": "update", "reuse": "reuse", "forecasts": "forecasts"}


def fill(page: Path, result: dict[str, Any]) -> None:
    """Puts the tables between the marks of the page. Raises ValueError where it has no such marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: expected {BEGIN} and {END} around the tables")
    write_text(page, f"{before}{BEGIN}\n\n{tables(result)}\n\n{END}{after}", force=True)


def tables(result: dict[str, Any]) -> str:
    """Returns the generated part in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(result["versions"].items()))
    lines = [f"`{result['command']}` on {result['machine']}, one thread; {versions}.", "", *_predictors(result)]
    lines += ["", *_actions(result), "", *_placements(result["placements"]), "", *_oracle(result["oracle"])]
    return "\n".join(lines)


def _predictors(result: dict[str, Any]) -> list[str]:
    columns = [(FAMILIES[key], study) for key, study in result["random"].items()]
    columns += [(f"all of {result['oracle']['steps']}: {FAMILIES[key]}", study) for key, study in result["all"].items()]
    lines = ["### Which prediction orders schedules rightly", ""]
    lines += [_line(["prediction, from the profile alone", *(name for name, _ in columns)])]
    lines += [_line(["---", *["---:"] * len(columns)])]
    for i, one in enumerate(columns[0][1]["predictors"]):
        lines.append(_line([one["name"], *(_interval(study["predictors"][i], _best(study)) for _, study in columns)]))
    lines.append(
        _line(["*half of the generations against the other*", *(_interval(s["halves"], 1) for _, s in columns)])
    )
    lines.append(_line(["*schedules*", *(str(study["schedules"]) for _, study in columns)]))
    return lines


def _best(study: dict[str, Any]) -> float:
    return max(float(one["rho"]) for one in study["predictors"])


def _interval(one: dict[str, float], best: float) -> str:
    mark = "**" if one["rho"] >= best else ""
    return f"{mark}{one['rho']:.2f}{mark} [{one['low']:.2f}, {one['high']:.2f}]"


def _actions(result: dict[str, Any]) -> list[str]:
    lines = ["### The same schedules under each action", ""]
    lines += [_line(["between full steps", "mean dB", "best dB", "worst dB"]), _line(["---", *["---:"] * 3])]
    for key, study in result["random"].items():
        lines.append(_line([FAMILIES[key], *(f"{study[of]:.1f}" for of in ("mean_db", "best_db", "worst_db"))]))
    return lines


def _placements(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["### Where each prediction places full steps, under a fitted update", ""]
    lines += [_line(["placed by", *(f"{count} of 50" for count in found)]), _line(["---", *["---:"] * len(found)])]
    for of_name in zip(*found.values(), strict=True):
        cells = [f"{one['db']:.1f} ({one['gain_db']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}])" for one in of_name]
        lines.append(_line([of_name[0]["name"], *cells]))
    return lines


def _oracle(found: dict[str, Any]) -> list[str]:
    families = [key for key in FAMILIES if key in found]
    heads = [
        f"{FAMILIES[key]}: {of}" for key in families for of in ("dB", "regret", "better ones", "placed freely, dB")
    ]
    lines = [f"### Regret: {found['full']} full steps of {found['steps']}, both ends full", ""]
    lines += [_line(["placed by", "full steps", *heads]), _line(["---", "---", *["---:"] * len(heads)])]
    names: dict[str, str] = {row["key"]: row["name"] for key in families for row in found[key]["rows"]}
    by_key = {key: {row["key"]: row for row in found[key]["rows"]} for key in families}
    for key, name in names.items():
        rows = [by_key[family].get(key) for family in families]
        cells = [cell for row in rows for cell in _regret(row)]
        anchors = {_steps(row["anchors"]) for row in rows if row}
        lines.append(_line([name, "; ".join(sorted(anchors)), *cells]))
    for what, name in (("best_db", "best of all"), ("median_db", "median of all"), ("worst_db", "worst of all")):
        values = [(found[key][what], found[key]["best_db"] - found[key][what]) for key in families]
        cells = [cell for value, lost in values for cell in (f"{value:.1f}", f"{lost:.1f}", "", "")]
        steps = "; ".join(dict.fromkeys(_steps(found[key]["best"]) for key in families)) if what == "best_db" else ""
        lines.append(_line([f"*{name}*", steps, *cells]))
    return lines


def _regret(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return [""] * 4
    free = "" if row["free_db"] is None else f"{row['free_db']:.1f}"
    return [f"{row['db']:.1f}", f"{row['regret_db']:.1f}", f"{row['better']:.1%}", free]


def _steps(anchors: list[int]) -> str:
    return " ".join(map(str, anchors))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
