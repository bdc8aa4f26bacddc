"""A schedule as text for a terminal, and as plain data for scripts."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..formats.files import encode
from ..formats.schedule import Plan, Schedule, Update
from ..formats.sites import SiteKey

STYLES = {"C": "bold black on green", "R": "bright_black", "F": "black on cyan", "P": "black on yellow"}
LEGEND = {
    "C": "computes", "R": "reuses", "P": "recomputes k tokens", "F": "forecasts", "S": "stack forecast", "-": "no network",
    "_": "another transformer's step",
}  # fmt: skip
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
    knobs = ", ".join(f"{k}={v}" for k, v in schedule.policy["knobs"].items())
    text = Text.assemble((schedule.policy["name"], "bold"), f"  {knobs}\n")
    sampler = schedule.sampler
    text.append(
        f"{schedule.steps} steps of {sampler.class_name}, guidance {sampler.guidance_scale} in {sampler.guidance_form}"
    )
    if schedule.predicted:
        p = schedule.predicted
        error = "" if p["error"] is None else f", error {p['error']:.4g}"
        text.append(f"\npredicted {p['speedup']:.2f}x {p['unit']}{error}, {p['cache_bytes'] / 2**20:.2f} MiB of cache")
    if schedule.update is not None:
        text.append("\n" + _about_update(schedule.update))
    for record in schedule.measured:
        quality = record["psnr_db"]
        text.append(
            f"\nmeasured {record['wall_speedup']:.2f}x wall-clock, {quality['mean']:.1f} dB PSNR "
            f"({record['samples']} seeds, {record['device']})"
        )
    return text


def _about_update(update: Update) -> str:
    text, fitted = f"update: weighs the last {update.history} {BASES[update.basis]}", update.fitted
    if fitted.get("loop") not in ("open", "closed"):
        return f"{text}, not fitted yet"
    samples = f" on {fitted['samples']} generations" if "samples" in fitted else ""
    guidance = "" if fitted.get("guidance_scale") is None else f" at guidance {fitted['guidance_scale']}"
    return f"{text}, fitted {fitted['loop']} loop{samples}{guidance}"


def _picture(name: str, plan: Plan, width: int) -> Text:
    """Returns rows of coloured characters, in as many bands as the width needs, and the share that is not computed under them.

    If all sites have the same row, it is drawn once.
    """
    rows, labels = plan.rows, {site: _label(plan, site) for site in plan.rows}
    if len(set(rows.values())) == 1 and len(rows) > 1:
        first = next(iter(rows))
        rows, labels = {first: rows[first]}, {first: f"all {len(rows)} sites"}
    if "S" in plan.stack:
        rows, labels = rows | {"stack": plan.stack}, labels | {"stack": "stack"}
    margin = max(len(label) for label in [*labels.values(), "not computed"]) + 1
    band = max(10, width - margin)
    text = Text(no_wrap=True)
    for start in range(0, len(plan.stack), band):
        columns = range(start, min(start + band, len(plan.stack)))
        ruler = "".join(f"{t:<10}" for t in columns if t % 10 == 0)[: len(columns)]
        text.append(f"{name if not start else '':<{margin}.{margin}}{' ' * (-start % 10)}{ruler}\n", "dim")
        for site, row in rows.items():
            text.append(f"{labels[site]:<{margin}}")
            for t in columns:
                text.append(row[t], STYLES.get(row[t], "dim" if row[t] in "-_" else ""))
            text.append("\n")
        shares = [_not_computed(plan, t) for t in columns]
        text.append(
            f"{'not computed':<{margin}}" + "".join(BARS[round(s * (len(BARS) - 1))] for s in shares) + "\n", "dim"
        )
    met = set(plan.stack).union(*plan.rows.values())
    text.append("  ".join(f"{letter} {meaning}" for letter, meaning in LEGEND.items() if letter in met), "dim")
    return text


def _label(plan: Plan, site: str) -> str:
    key, stacks = SiteKey.parse(site), {SiteKey.parse(s).stack for s in plan.rows}
    return site if len(stacks) > 1 else f"{key.layer}.{key.name}"


def _intervals(plan: Plan) -> list[int]:
    """Returns the number of steps from each full step to the next, or to the end of its turn."""
    ends = {*plan.anchors(), *(t for t, action in enumerate(plan.stack) if action == "_"), len(plan.stack)}
    return [min(end for end in ends if end > anchor) - anchor for anchor in plan.anchors()]


def _prune_table(plan: Plan) -> Table:
    """Returns the mean prune rate over the P cells, by layer and module."""
    modules = list(dict.fromkeys(SiteKey.parse(site).name for site in plan.rows))
    table = Table("layer", *modules, title="mean prune rate of pruned cells (number of cells)", box=None)
    layers: dict[str, dict[str, list[float]]] = {}
    for site in plan.rows:
        key = SiteKey.parse(site)
        rates = [rate for _, rate in _prune_rates(plan, site)]
        layers.setdefault(key.block, {})[key.name] = rates
        layers.setdefault("all", {}).setdefault(key.name, []).extend(rates)
    layers["all"] = layers.pop("all")
    for layer, cells in layers.items():
        shown = [cells.get(m) for m in modules]
        table.add_row(layer, *(f"{sum(r) / len(r):.2f} ({len(r)})" if r else "–" for r in shown))
    return table


def _prune_rates(plan: Plan, site: str) -> list[tuple[int, float]]:
    """Returns the step and the prune rate of each P cell."""
    steps = [t for t, action in enumerate(plan.rows[site]) if action == "P"]
    return [(t, 1 - k / plan.tokens(site)) for t, k in zip(steps, plan.k.get(site, ()), strict=True)]


def _not_computed(plan: Plan, step: int) -> float:
    """Returns the share of the tokens of all sites that are not computed at this step."""
    shares = [
        dict(_prune_rates(plan, site))[step] if row[step] == "P" else float(row[step] not in "C_")
        for site, row in plan.rows.items()
    ]
    return sum(shares) / len(shares)
