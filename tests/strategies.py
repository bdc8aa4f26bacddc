"""Hypothesis strategies: legal schedules of any kind, small profiles, and JSON values with one fault."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sodaprof.formats.rules import BASES, OBSERVED, source_of
from sodaprof.formats.schedule import Forecast, Plan, Schedule, TokenRule, Update
from sodaprof.formats.sites import Guidance, Model, Sampler, Site, Transformer
from tests.conftest import build_model, build_profile

MODULES = {"attn1": "attn", "attn2": "cross_attn", "ff": "mlp"}
texts = st.text(max_size=5)
numbers = st.integers(-1000, 1000) | st.floats(-1e6, 1e6)
free = st.dictionaries(texts, st.none() | st.booleans() | numbers | texts | st.lists(numbers, max_size=2), max_size=2)


def digits(count: int) -> st.SearchStrategy[int | float]:
    """Numbers of at most `count` significant digits, 4 or more."""
    return numbers.map(lambda value: value if isinstance(value, int) else float(f"{value:.{count}g}"))


@st.composite
def models(draw: st.DrawFn, transformers: int = 1) -> Model:
    """Models of 1 or 2 blocks of 1 to 3 modules each, with one fingerprint for all transformers."""
    tokens = draw(st.integers(1, 8))
    modules = draw(st.lists(st.sampled_from(list(MODULES)), min_size=1, max_size=3, unique=True))
    layers = draw(st.integers(1, 2))
    sites = tuple(Site("blocks", i, m, MODULES[m], tokens, 4, True) for i in range(layers) for m in modules)
    known = {f"blocks.{m}": MODULES[m] for m in modules}
    fingerprint = {"layers": layers, "tokens": dict.fromkeys(known, tokens), "kinds": known}
    shape = {"latent": [4, 8, 8], "tokens": tokens, "batch_profiled": 1, "dtype": "float32"}
    found = {f"t{i}": Transformer("DiT", fingerprint, sites) for i in range(transformers)}
    return Model("tiny", "Pipeline", found, shape)


@st.composite
def samplers(draw: st.DrawFn, steps: int) -> Sampler:
    """Samplers of this number of steps, with timesteps of either kind of number."""
    timesteps = tuple(draw(st.lists(numbers, min_size=steps, max_size=steps)))
    guidance = Guidance(draw(st.sampled_from(["halves", "passes", "none"])), draw(st.none() | numbers))
    return Sampler("DDIMScheduler", draw(free), timesteps, guidance)


@st.composite
def legal_schedules(
    draw: st.DrawFn, model: Model | None = None, sampler: Sampler | None = None, actions: str = "CRFPS-_"
) -> Schedule:
    """Legal schedules of at most 6 steps with cells of these actions, of `model` and `sampler` or of drawn ones.

    `_` means two transformers in turns; it needs a drawn model, or one with two transformers. P is drawn for prunable
    sites alone. Token rule, fitted update, origin, prediction and measurements are drawn as well.
    """
    steps = draw(st.integers(1, 6)) if sampler is None else sampler.steps
    if model is None:
        model = draw(models(draw(st.integers(1, 2)) if "_" in actions and steps > 1 else 1))
    sampler = draw(samplers(steps)) if sampler is None else sampler
    names = list(model.transformers)
    # each transformer is called at least once
    called = draw(st.permutations([*names, *(draw(st.sampled_from(names)) for _ in range(steps - len(names)))]))
    plans = {}
    for name, transformer in model.transformers.items():
        plans[name] = draw(_plans(transformer, [one == name for one in called], actions))
    pruned = any("P" in row for plan in plans.values() for row in plan.rows.values())
    rule = draw(_token_rules(plans, sampler)) if pruned else None
    runs = [any(plan.stack[t] in ".S" for plan in plans.values()) for t in range(steps)]
    needed = any("-" in plan.stack for plan in plans.values())
    update = (
        draw(_updates(runs, sampler, len(names) == 1)) if needed or ("-" in actions and draw(st.booleans())) else None
    )
    profile = st.fixed_dictionaries({"digest": texts, "seed": st.integers(0, 9), "samples": st.integers(1, 9)})
    costs = {"unit": texts, "speedup": numbers, "cost": numbers}
    predicted = st.fixed_dictionaries(costs | {"error": st.none() | numbers, "cache_bytes": st.integers(0, 9)})
    return Schedule(
        plans, sampler, model.shape, {"name": draw(texts), "knobs": draw(free)}, draw(st.none() | profile), rule, update,
        draw(st.none() | predicted), tuple(draw(st.lists(free, max_size=2))), draw(texts),
    )  # fmt: skip


@st.composite
def _plans(draw: st.DrawFn, transformer: Transformer, called: list[bool], actions: str) -> Plan:
    sites = transformer.sites
    rows: dict[str, str] = {site.key: "" for site in sites}
    ks: dict[str, list[int]] = {}
    cells: dict[str, list[Forecast]] = {}
    stack, skips, begin = "", [], 0
    for step, is_called in enumerate(called):
        first = is_called and not (step and called[step - 1])
        begin = step if first else begin
        action = "." if is_called else "_"
        if is_called and not first:
            action = draw(st.sampled_from([a for a in ".S-" if a in "." + actions]))
        prefix = draw(st.integers(0, len(sites))) if action == "S" else 0
        if action == "S":
            sources = [t for t in range(begin, step) if stack[t] == "."]
            skips.append(draw(_forecasts(sources, st.sampled_from(["output", "drift"]))))
        for i, site in enumerate(sites):
            cell = {"_": "_", "-": "-", "S": "C" if i < prefix else "-", ".": "C"}[action]
            if action == "." and not first:
                cell = draw(st.sampled_from([a for a in "CRFP" if a in "C" + actions and (a != "P" or site.prunable)]))
            if cell == "P":
                ks.setdefault(site.key, []).append(draw(st.integers(0, site.tokens)))
            if cell == "F":
                sources = [t for t in range(begin, step) if rows[site.key][t] == "C"]
                cells.setdefault(site.key, []).append(draw(_forecasts(sources, st.just("output"))))
            rows[site.key] += cell
        stack += action
    return Plan(
        transformer.class_name, transformer.fingerprint, rows, stack, {key: tuple(k) for key, k in ks.items()},
        {key: tuple(found) for key, found in cells.items()}, tuple(skips),
    )  # fmt: skip


@st.composite
def _forecasts(draw: st.DrawFn, sources: list[int], forms: st.SearchStrategy[str]) -> Forecast:
    chosen = draw(st.lists(st.sampled_from(sources), min_size=1, max_size=4, unique=True))
    return Forecast(tuple(chosen), tuple(draw(digits(6)) for _ in chosen), draw(forms))


@st.composite
def _token_rules(draw: st.DrawFn, plans: dict[str, Plan], sampler: Sampler) -> TokenRule:
    pruned = [(plan, site) for plan in plans.values() for site, row in plan.rows.items() if "P" in row]
    bases = [base for base in BASES if base not in OBSERVED or all(source_of(p, s, base) for p, s in pruned)]
    return TokenRule(
        draw(st.sampled_from(bases)), draw(numbers), draw(st.integers(1, 9) | st.floats(0.1, 9)), draw(numbers),
        draw(st.integers(1, 4)), sampler.guidance_form == "halves" and draw(st.booleans()), draw(st.integers(0, 2**31)),
    )  # fmt: skip


@st.composite
def _updates(draw: st.DrawFn, runs: list[bool], sampler: Sampler, alone: bool) -> Update:
    """alone: whether there is one transformer, whose times need not keep apart from another's."""
    history = draw(st.integers(1, 8))
    rows = []
    for step in range(len(runs)):
        outputs = sum(runs[: step + 1])
        rows.append(tuple(draw(digits(9)) if j <= outputs else 0.0 for j in range(1 + history)))
    times, initial = None, draw(st.none() | st.tuples(*(digits(9) for _ in runs)))
    most, taken = 1.001 * max(sampler.timesteps), set(sampler.timesteps)
    if alone and most > 1 and draw(st.booleans()):
        fractions = st.floats(0, most).filter(lambda time: time not in taken)
        drawn = draw(st.lists(fractions, min_size=sum(runs), max_size=sum(runs), unique=True))
        falling = iter(sorted(drawn, reverse=True))
        times = tuple(next(falling) if called else own for called, own in zip(runs, sampler.timesteps, strict=True))
    return Update(draw(st.sampled_from(["output", "data"])), history, tuple(rows), draw(free), times, initial)


@dataclass(frozen=True)
class ProfileParts:
    """What `write` makes a profile folder of: the errors of reuse [T, S, ages + 1] and pruning [T, S, ages + 1, rates]."""

    model: Model
    caching: np.ndarray
    pruning: np.ndarray
    rates: tuple[float, ...]

    def write(self, folder: Path) -> Path:
        return build_profile(folder, self.caching, self.pruning, rates=self.rates, model=self.model)


@st.composite
def profiles(draw: st.DrawFn) -> ProfileParts:
    """Profiles of 3 to 6 steps, of 1 or 2 layers and 2 to 4 ages; errors are float32 values, as the tables hold them."""
    steps, layers, ages = draw(st.integers(3, 6)), draw(st.integers(1, 2)), draw(st.integers(2, 4))
    rates = tuple(sorted(draw(st.sets(st.sampled_from([0.25, 0.5, 0.75]), min_size=1))))
    errors = np.random.default_rng(draw(st.integers(0, 2**32))).uniform(0, 1, (steps, 2 * layers, ages, 1 + len(rates)))
    errors = errors.astype(np.float32).astype(np.float64)
    return ProfileParts(build_model(layers), errors[..., 0], errors[..., 1:], rates)


# ---- JSON values with one fault ---------------------------------------------------------------------------------------

FREE = {"config", "knobs", "fitted", "measured", "fingerprint", "versions"}  # objects that may hold anything
NAMES = {"transformers", "rows", "k", "weights", "sites", "tables"}  # objects whose keys are names of the user's
OTHERS: list[Any] = [None, True, 3, "abc", [["x"]], {"colour": 1}]


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value inside `data`, except what is inside an object that may hold anything."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*path, key)
        if key not in FREE:
            yield from places(value, (*path, key))


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


@st.composite
def broken(draw: st.DrawFn, data: Any) -> Any:
    """JSON values that differ from `data` in one place and must be refused: another type, a key too many or too few."""
    data = copy.deepcopy(json.loads(json.dumps(data)))
    path = draw(st.sampled_from(list(places(data))))
    parent, key = at(data, path[:-1]), path[-1]
    value = parent[key]
    known = isinstance(value, dict) and key not in NAMES | FREE and path[-2:-1] != ("sources",)
    faults = ["type", *(["unknown"] if known else []), *(["missing"] if _is_key(path) else [])]
    fault = draw(st.sampled_from(faults))
    if fault == "missing":
        del parent[key]
    elif fault == "unknown":
        value["colour"] = draw(st.sampled_from(OTHERS))
    else:
        parent[key] = draw(st.sampled_from([other for other in OTHERS if not _allowed(path, value, other)]))
    return data


def _is_key(path: tuple[Any, ...]) -> bool:
    return isinstance(path[-1], str) and not (len(path) > 1 and path[-2] in NAMES) and "sources" not in path[-3:-1]


def _allowed(path: tuple[Any, ...], value: Any, other: Any) -> bool:
    """Whether `other` may be legal in the place of `value`."""
    if path[-2:-1] == ("sources",) and "forecasts" in path:
        return other is None or isinstance(other, list | dict)
    if value is None:
        return other is None or type(other) is int
    if other is None:
        return path[-1] in (
            "update",
            "token_rule",
            "profile",
            "predicted",
            "error",
            "scale",
            "text_encoder",
            "vae",
            "times",
            "initial",
        )
    alike = (int, float) if type(value) in (int, float) else (type(value),)
    return type(other) in alike
