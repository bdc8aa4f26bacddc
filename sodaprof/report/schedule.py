"""A schedule as text for a terminal, and as plain data for scripts."""

from __future__ import annotations

from itertools import groupby, islice, pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..formats.files import encode
from ..formats.schedule import LOOPS, Plan, Schedule, Update
from ..formats.sites import SiteKey
from . import guidance_text, shown

STYLES = {"C": "bold black on green", "R": "bright_black", "F": "black on cyan", "P": "black on yellow"}
LEGEND = {
    "C": "computes", "R": "reuses", "P": "recomputes k tokens", "F": "forecasts", "S": "stack forecast", "-": "no network",
    "_": "another transformer's step",
}  # fmt: skip
MOST_ROWS = 1000  # of the picture
MOST_RECORDS = 20  # of `measured` that are listed
MOST_LAYERS, MOST_MODULES = 200, 50  # of the table of prune rates
LONGEST_NAME = 60  # characters of a name
BARS = " ▁▂▃▄▅▆▇█"
BASES = {"output": "outputs", "data": "data predictions"}


def schedule_data(schedule: Schedule) -> dict[str, Any]:
    """Returns full steps, intervals, and for each site its row, reuse ages and prune rates, as plain data."""
    transformers = {}
    for name, plan in schedule.transformers.items():
        anchors = plan.anchors()
        sites = {}
        for site, row in plan.rows.items():
            rates = {str(t): round(rate, 4) for t, rate in _prune_rates(plan, site)}
            reused = {str(t): t - row.rfind("C", 0, t) for t, action in enumerate(row) if action in "RP"}
            sites[site] = {"row": row, "reuse_ages": reused, "prune_rates": rates}
        transformers[name] = {"anchors": anchors, "intervals": _intervals(plan), "stack": plan.stack, "sites": sites}
    return {
        "policy": schedule.policy,
        "steps": schedule.steps,
        "predicted": schedule.predicted,
        "update": None if schedule.update is None else encode(schedule.update),
        "measured": list(schedule.measured),
        "counts": dict(schedule.counts()),
        "digest": schedule.digest(),
        "transformers": transformers,
    }


def schedule_view(schedule: Schedule, width: int = 80) -> RenderableType:
    """Returns the picture, the cache intervals and the prune rates by step, layer and module."""
    parts: list[RenderableType] = [_headline(schedule)]
    for name, plan in schedule.transformers.items():
        anchors, intervals = (" ".join(map(str, numbers)) for numbers in (plan.anchors(), _intervals(plan)))
        steps = Text(f"{len(plan.anchors())} full steps: {anchors}\ncache intervals: {intervals}")
        parts += [Text(), _picture(name, plan, width), Text(), steps]
        if plan.k:
            parts += [Text(), _prune_table(plan)]
    return Group(*parts)


def _headline(schedule: Schedule) -> Text:
    knobs = shown(", ".join(f"{k}={v}" for k, v in schedule.policy["knobs"].items()), 400)
    text = Text.assemble((shown(schedule.policy["name"]), "bold"), f"  {knobs}\n")
    sampler = schedule.sampler
    text.append(
        f"{schedule.steps} steps of {shown(sampler.class_name)}, {guidance_text(sampler.guidance_scale, sampler.guidance_form)}"
    )
    if schedule.predicted:
        p = schedule.predicted
        error = "" if p["error"] is None else f", error {p['error']:.4g}"
        text.append(f"\npredicted {p['speedup']:.2f}x {p['unit']}{error}, {p['cache_bytes'] / 2**20:.2f} MiB of cache")
    if schedule.update is not None:
        text.append("\n" + _about_update(schedule.update))
        moved = [
            f"{t}: {time:g} ({own:g})"
            for t, (time, own) in enumerate(zip(schedule.times, sampler.timesteps, strict=True))
            if time != own
        ]
        if moved:
            text.append("\n" + shown(f"network times (the sampler's) by step: {', '.join(moved)}", 400))
    for record in schedule.measured[:MOST_RECORDS]:
        text.append(f"\nmeasured {_about_measured(record)}")
    if (more := len(schedule.measured) - MOST_RECORDS) > 0:
        text.append(f"\n{more} more measured; see --json")
    return text


def _about_measured(record: dict[str, Any]) -> str:
    """Returns the figures that a record of `measured` has; the format requires none."""
    quality = record.get("psnr_db")
    found = [
        (record.get("wall_speedup"), "{:.2f}x wall-clock"),
        (quality.get("mean") if isinstance(quality, dict) else None, "{:.1f} dB PSNR"),
    ]
    figures = ", ".join(form.format(value) for value, form in found if isinstance(value, int | float))
    about = [f"{shown(record['samples'])} seeds"] if "samples" in record else []
    about += [shown(record["device"])] if "device" in record else []
    return (figures or "without speed and quality") + (f" ({', '.join(about)})" if about else "")


def _about_update(update: Update) -> str:
    text, fitted = f"update: weighs the last {update.history} {BASES[update.basis]}", update.fitted
    if update.initial is not None:
        text += " and the first latents"
    if fitted.get("loop") not in LOOPS:
        return f"{text}, not fitted yet"
    samples = f" on {shown(fitted['samples'])} generations" if "samples" in fitted else ""
    guidance = "" if fitted.get("guidance_scale") is None else f" at guidance {shown(fitted['guidance_scale'])}"
    return f"{text}, fitted {LOOPS[fitted['loop']]}{samples}{guidance}"


def _picture(name: str, plan: Plan, width: int) -> Group:
    """Returns rows of coloured characters, in as many bands as the width needs, and the share that is not computed under them.

    If all sites have the same row, it is drawn once.
    """
    rows, labels = plan.rows, _labels(plan)
    if len(set(rows.values())) == 1 and len(rows) > 1:
        first = next(iter(rows))
        rows, labels = {first: rows[first]}, {first: f"all {len(rows)} sites"}
    left_out = len(rows) - MOST_ROWS
    rows = dict(islice(rows.items(), MOST_ROWS))
    if "S" in plan.stack:
        rows, labels = rows | {"stack": plan.stack}, labels | {"stack": "stack"}
    margin = max(len(label) for label in [*(labels[site] for site in rows), "not computed"]) + 1
    band, shares, lines = max(10, width - margin), _not_computed(plan), []
    for start in range(0, len(plan.stack), band):
        columns = range(start, min(start + band, len(plan.stack)))
        ruler = "".join(f"{t:<10}" for t in columns if t % 10 == 0)[: len(columns)]
        title = shown(name) if not start else ""
        lines.append(Text(f"{title:<{margin}.{margin}}{' ' * (-start % 10)}{ruler}", "dim"))
        for site, row in rows.items():
            line = Text(f"{labels[site]:<{margin}}", no_wrap=True)
            for letter, run in groupby(row[start : columns.stop]):
                line.append("".join(run), STYLES.get(letter, "dim" if letter in "-_" else ""))
            lines.append(line)
        bars = "".join(BARS[round(shares[t] * (len(BARS) - 1))] for t in columns)
        lines.append(Text(f"{'not computed':<{margin}}{bars}", "dim"))
    if left_out > 0:
        lines.append(Text(f"{left_out} more sites are not drawn; see --json", "dim"))
    met = set(plan.stack).union(*plan.rows.values())
    lines.append(Text("  ".join(f"{letter} {meaning}" for letter, meaning in LEGEND.items() if letter in met), "dim"))
    return Group(*lines)


def _labels(plan: Plan) -> dict[str, str]:
    """Returns a name for the row of each site: its layer and module, with the stack if there are several."""
    keys = {site: SiteKey.parse(site) for site in plan.rows}
    several = len({key.stack for key in keys.values()}) > 1
    return {site: shown(site if several else f"{k.layer}.{k.name}", LONGEST_NAME) for site, k in keys.items()}


def _intervals(plan: Plan) -> list[int]:
    """Returns the number of steps from each full step to the next, or to the end of its turn."""
    full = set(plan.anchors())
    ends = sorted({*full, *(t for t, action in enumerate(plan.stack) if action == "_"), len(plan.stack)})
    return [end - start for start, end in pairwise(ends) if start in full]


def _prune_table(plan: Plan) -> Table:
    """Returns the mean prune rate over the P cells, by layer and module."""
    modules = list(dict.fromkeys(SiteKey.parse(site).name for site in plan.rows))[:MOST_MODULES]
    table = Table("layer", *map(shown, modules), title="mean prune rate of pruned cells (number of cells)", box=None)
    layers: dict[str, dict[str, list[float]]] = {}
    for site in plan.rows:
        key = SiteKey.parse(site)
        rates: list[Any] = [rate for _, rate in _prune_rates(plan, site)]
        layers.setdefault(key.block, {})[key.name] = rates
        layers.setdefault("all", {}).setdefault(key.name, []).extend(rates)
    layers["all"] = layers.pop("all")
    left_out = len(layers) - 1 - MOST_LAYERS
    for layer, cells in [*islice(layers.items(), min(MOST_LAYERS, len(layers) - 1)), ("all", layers["all"])]:
        rates = [cells.get(m) for m in modules]
        table.add_row(shown(layer), *(f"{sum(r) / len(r):.2f} ({len(r)})" if r else "–" for r in rates))
    if left_out > 0:
        table.caption = f"{left_out} more layers; see --json"
    return table


def _prune_rates(plan: Plan, site: str) -> list[tuple[int, float]]:
    """Returns the step and the prune rate of each P cell."""
    steps = [t for t, action in enumerate(plan.rows[site]) if action == "P"]
    tokens = plan.tokens(site) if steps else 1
    return [(t, 1 - k / tokens) for t, k in zip(steps, plan.k.get(site, ()), strict=True)]


def _not_computed(plan: Plan) -> list[float]:
    """Returns the share of the tokens of all sites that are not computed at each step."""
    totals = [0.0] * len(plan.stack)
    for site, row in plan.rows.items():
        rates = dict(_prune_rates(plan, site))
        for step, action in enumerate(row):
            totals[step] += rates[step] if action == "P" else action not in "C_"
    return [total / len(plan.rows) for total in totals]
