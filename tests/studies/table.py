"""Makes the comparison of docs/studies/results.md: every policy at every budget, and what calibration does not cover.

`make table`, or `python -m tests.studies.table` with some of the models and stages. What exists is not made again: profiles and
schedules by their files, evaluations where schedules and seeds are the same. Delete, or name with --again, what is to be new.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sodaprof.formats.files import digest, read_json, write_json, write_text
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.measure.classifier import load_classifier
from sodaprof.measure.contenders import FEWER
from sodaprof.pipelines.device import device_facts
from sodaprof.pipelines.load import REFERENCE
from tests.reference.data import training_pictures
from tests.studies.page import figures, page
from tests.studies.table_maker import Maker, Variant, say

VARIANTS = (
    Variant("fora", "FORA", "--policy fora", latency=True),
    Variant("toca", "ToCa", "--policy toca --fit {model}"),
    Variant("duca", "DuCa", "--policy duca --fit {model}"),
    Variant("soda", "SODA", "--policy soda", latency=True, robust=True),
    Variant("taylor-1", "TaylorSeer, order 1", "--policy taylor --knob order=1"),
    Variant("taylor-2", "TaylorSeer, order 2", "--policy taylor --knob order=2"),
    Variant("taylor-dp", "TaylorSeer, steps by DP", "--policy taylor --knob placement=dp", latency=True, robust=True),
    Variant("magcache", "MagCache", "--policy magcache"),
    Variant("smoothcache", "SmoothCache", "--policy smoothcache"),
    Variant("dpcache", "DPCache", "--policy dpcache --knob first=1"),
    Variant("soda-update", "SODA + update, --fit", "--policy soda --update --fit {model}", True, latency=True),
    Variant("forecasts", "fitted forecasts", "--policy forecast", ours=True),
    Variant("drift", "fitted drift", "--policy drift", ours=True),
    Variant("forecasts-update", "fitted forecasts + update, --fit", "--policy forecast --update --fit {model}", True),
    Variant("drift-update", "fitted drift + update, --fit", "--policy drift --update --fit {model}", True),
    Variant("solver", "update", "--policy solver", ours=True, robust=True),
    Variant("solver-fit", "update, --fit", "--policy solver --fit {model}", True, distances=True, latency=True, robust=True),
    Variant("refined", "update, refined", "--evaluations 60", True, refines="solver-fit"),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    model: str
    budgets: tuple[float, ...]
    profile: str = "--samples 100"  # options of `sodaprof profile`


SETTINGS = (
    Setting("tiny-dit", (2.0, 2.5, 3.5, 5.0)),
    Setting("tiny-pixart", (1.9, 2.5)),
    Setting("tiny-opensora", (1.9, 2.5), "--samples 32"),
)
LATENCY = "tiny-dit"
ROBUST, ROBUST_BUDGETS = "tiny-dit", (3.5,)
ROBUST_CONTROLS = (FEWER + "DDIM", FEWER + "UniPC")


@dataclass(frozen=True)
class Case:
    """What is other than calibrated. profile: options of its own profile, else the model's; {labels} is a file of `learnt`."""

    name: str
    profile: str = ""
    learnt: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()  # that are evaluated, () for all
    guidance_scale: float | None = None


CASES = (
    Case("as calibrated: 100 generations, guidance 4, 50 steps"),
    Case("labels 5–9, calibrated on 0–4", "--samples 40 --prompts {labels}", (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)),
    Case("guidance 1.5", guidance_scale=1.5),
    Case("guidance 2", guidance_scale=2.0),
    Case("guidance 6", guidance_scale=6.0),
    Case("20 steps, profiled anew", "--samples 40 --steps 20"),
    Case("1 calibration generation", "--samples 1"),
    Case("8 calibration generations", "--samples 8"),
    Case("50 calibration generations", "--samples 50"),
)
DATA_SEED = 3_000_000  # of the drawings that distances are taken to: not a seed of the training
STAGES = ("table", "distances", "latency", "robust", "page")
KEPT = (
    "name", "detail", "works_by", "flops_speedup", "wall_speedup", "psnr_db", "flipped", "ssim", "latent_l2", "accuracy",
    "over", "distance", "policy",
)  # fmt: skip
ABOUT = ("samples", "seed", "guidance_scale", "device", "machine", "threads", "dtype", "versions")


def short(value: Any) -> Any:
    """Returns plain data with floats of five significant digits."""
    if isinstance(value, dict):
        return {key: short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [short(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def kept_rows(result: dict[str, Any], made: Sequence[tuple[Variant, Path]]) -> list[dict[str, Any]]:
    """Returns what a table keeps of the rows."""
    ours = {variant.name for variant, _ in made if variant.ours}
    return [short({k: row[k] for k in KEPT if k in row}) | {"ours": row["name"] in ours} for row in result["rows"]]


def heading(kind: str, model: str, result: dict[str, Any], variants: Sequence[Variant]) -> dict[str, Any]:
    """Returns what stands at the top of a result's file."""
    compiled = {
        v.name: f"sodaprof refine {model} {v.refines}.json {v.options}" if v.refines else v.options.format(model=model)
        for v in variants
    }
    about = {"model": model, "command": "make table", "hardware": device_facts(result["device"])}
    return {"format": kind, "version": 1} | about | {key: result[key] for key in ABOUT} | {"compiled": compiled}


def make_table(maker: Maker, setting: Setting, variants: Sequence[Variant]) -> None:
    """Writes table-MODEL.json: all policies at all budgets, in FLOPs."""
    options = maker.options
    profile = maker.profile(setting.model, setting.profile, options.build.parent / f"{setting.model}-profile")
    budgets, result = [], {}
    for budget in setting.budgets:
        folder = options.build / setting.model / f"{budget:g}x"
        made, left_out = maker.compile(variants, setting.model, profile, budget, folder)
        cache = folder / "evaluation" / "table.json"
        result = maker.evaluate(made, setting.model, budget, cache, samples=options.samples)
        budgets.append({"budget": budget, "rows": kept_rows(result, made), "left_out": left_out})
    head = heading("sodaprof.table", setting.model, result, variants) | {"unit": "flops", "full": short(result["full"])}
    write_json(options.output / f"table-{setting.model}.json", head | {"budgets": budgets}, force=True)


def measure_distances(maker: Maker, setting: Setting, variants: Sequence[Variant]) -> None:
    """Adds to table-MODEL.json how far many samples are from the full run and the data: ours, and the best published policy."""
    options = maker.options
    path = options.output / f"table-{setting.model}.json"
    table = read_json(path)
    if load_classifier(REFERENCE / setting.model) is None:
        say(f"{setting.model}: no classifier, so no distances")
        return
    data = training_pictures(setting.model, options.distance_samples, DATA_SEED)
    entries = [entry for entry in table["budgets"] if entry["budget"] in setting.budgets]
    rivals = {entry["budget"]: best([row for row in entry["rows"] if not row["ours"]]) for entry in entries}
    found: dict[float, list[dict[str, Any]]] = {budget: [] for budget in rivals}
    result: dict[str, Any] = {}
    for fewer in (False, True):  # together, so that the full run is sampled once for several budgets
        made, whose = [], []
        for budget, rival in rivals.items():
            if rival.startswith(FEWER) == fewer:
                folder = options.build / setting.model / f"{budget:g}x"
                some = [(v, folder / f"{v.key}.json") for v in variants if v.distances or v.name == rival]
                made += [(v, path) for v, path in some if path.exists()]
                whose += [budget] * (len(made) - len(whose))
        if not made:
            continue
        cache = options.build / setting.model / "distances" / ("fewer.json" if fewer else "schedules.json")
        controls = sorted({rivals[budget] for budget in whose}) if fewer else False
        result = maker.evaluate(
            made, setting.model, None, cache, samples=options.distance_samples, controls=controls, data=data, runtime="compiled"
        )  # fmt: skip
        rows = kept_rows(result, made)
        for budget, row in zip(whose, rows, strict=False):
            found[budget].append(row)
        for row in rows[len(made) :]:  # a control stands beside the schedule of its own cost
            budget = min(whose, key=lambda b: abs(b - row["flops_speedup"]))
            found[budget] += [row] if row["name"] == rivals[budget] else []
    budgets = [{"budget": budget, "rows": rows} for budget, rows in found.items()]
    distances = {"samples": options.distance_samples, "full": short(result["full"]), "budgets": budgets}
    write_json(path, table | {"distances": distances}, force=True)


def best(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the name of the row nearest to the full run."""
    return max(rows, key=lambda row: row["psnr_db"]["mean"])["name"]


def make_latency(maker: Maker, setting: Setting, variants: Sequence[Variant]) -> None:
    """Writes table-MODEL-latency.json: the main policies under budgets of measured milliseconds, and their loops timed."""
    options, model = maker.options, setting.model
    profile = maker.profile(model, setting.profile, options.build.parent / f"{model}-profile")
    cost = options.build / model / "cost.json"
    if not cost.exists() and (reason := maker.sodaprof("bench", model, "--cost", str(cost))):
        raise RuntimeError(reason)
    budgets, result = [], {}
    for budget in setting.budgets:
        folder = options.build / model / f"{budget:g}x-ms"
        chosen = [variant for variant in variants if variant.latency]
        made, left_out = maker.compile(chosen, model, profile, budget, folder, cost)
        if not made:  # a step that reuses everything may take too long
            budgets.append({"budget": budget, "rows": [], "left_out": left_out})
            continue
        cache = folder / "evaluation" / "table.json"
        result = maker.evaluate(made, model, budget, cache, samples=options.samples, runtime="compiled")
        timed = folder / "evaluation" / f"bench-{digest([load_schedule(p).digest() for _, p in made])[:12]}.json"
        files = [str(path) for _, path in made]
        if not timed.exists() and (reason := maker.sodaprof("bench", model, *files, "-o", str(timed))):
            raise RuntimeError(reason)
        loops = {row["name"]: row["speedup"] for row in read_json(timed)["rows"]}
        speedups = {variant.name: loops[path.stem] for variant, path in made}
        rows = [
            row | ({"loop_speedup": speedups[row["name"]]} if row["name"] in speedups else {})
            for row in kept_rows(result, made)
            if row["name"] != "fora"  # the control, of equal FLOPs: the policy is there at equal milliseconds
        ]
        budgets.append({"budget": budget, "rows": rows, "left_out": left_out})
    head = heading("sodaprof.table", model, result, [v for v in variants if v.latency])
    head |= {"unit": "ms", "full": short(result["full"]), "budgets": budgets}
    write_json(options.output / f"table-{model}-latency.json", head, force=True)


def make_robust(maker: Maker, setting: Setting, variants: Sequence[Variant]) -> None:
    """Writes robust-MODEL.json: the same policies where something is other than calibrated."""
    options, model = maker.options, setting.model
    cases, result = [], {}
    chosen = [variant for variant in variants if variant.robust]
    for case in CASES:
        folder = options.build / model / "robust" / digest([case.profile, case.learnt])[:12]
        profile = options.build.parent / f"{model}-profile"
        if case.profile:
            labels = write_labels(folder / "labels.txt", case.learnt)
            profile = maker.profile(model, case.profile.format(labels=labels), folder / "profile")
        else:
            maker.profile(model, setting.profile, profile)
        for budget in ROBUST_BUDGETS:
            own = folder if case.profile else options.build / model  # the table's schedules
            made, left_out = maker.compile(chosen, model, profile, budget, own / f"{budget:g}x")
            cache = folder / f"{budget:g}x" / "evaluation" / f"{digest(case.name)[:12]}.json"
            result = maker.evaluate(
                made, model, budget, cache, samples=options.robust_samples, prompts=list(case.labels) or None,
                guidance_scale=case.guidance_scale, controls=ROBUST_CONTROLS, runtime="compiled",
            )  # fmt: skip
            cases.append({"case": case.name, "budget": budget, "rows": kept_rows(result, made), "left_out": left_out})
    head = heading("sodaprof.robustness", model, result, chosen)
    write_json(options.output / f"robust-{model}.json", head | {"cases": cases}, force=True)


def write_labels(path: Path, labels: Sequence[int]) -> Path:
    """Returns the path of a file with a label a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Makes the stages that are asked for, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.studies.table", description=(__doc__ or "").splitlines()[0])
    models = [setting.model for setting in SETTINGS]
    parser.add_argument("--models", nargs="+", default=models, choices=models, help="of the reference models")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--policies", nargs="+", default=[v.key for v in VARIANTS], help="keys of VARIANTS")
    parser.add_argument("--budgets", nargs="+", type=float, default=None, help="instead of each model's")
    parser.add_argument("--again", nargs="+", default=[], metavar="KEY", help="policies to compile anew")
    parser.add_argument("--samples", type=int, default=64, help="held-out seeds")
    parser.add_argument("--distance-samples", type=int, default=1000, help="held-out seeds for distances")
    parser.add_argument("--robust-samples", type=int, default=32, help="held-out seeds beyond calibration")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="of the evaluations")
    parser.add_argument("--build", type=Path, default=Path("build/table"))
    parser.add_argument("--output", type=Path, default=Path("docs/studies/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/studies/results.md"))
    options = parser.parse_args(arguments)
    maker = Maker(options)
    variants = [variant for variant in VARIANTS if variant.key in options.policies]
    for setting in SETTINGS:
        if setting.model not in options.models:
            continue
        setting = Setting(setting.model, tuple(options.budgets or setting.budgets), setting.profile)
        if "table" in options.stages:
            make_table(maker, setting, variants)
        if "distances" in options.stages:
            measure_distances(maker, setting, variants)
        if "latency" in options.stages and setting.model == LATENCY:
            make_latency(maker, setting, variants)
        if "robust" in options.stages and setting.model == ROBUST:
            make_robust(maker, setting, variants)
    if "page" in options.stages:
        for figure, svg in figures(options.output).items():
            write_text(figure, svg, force=True)
        write_text(options.page, page(options.output), force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
