"""Shared fixtures. The data fixtures need no torch; a schedule, a model and a profile folder are made in a few lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from msgspec.structs import replace

from sodaprof import cli
from sodaprof.formats.cost import CostModel, SiteCost, StepCost, TransformerCost, save_cost
from sodaprof.formats.files import write_json
from sodaprof.formats.schedule import Forecast, Plan, Schedule, TokenRule, Update
from sodaprof.formats.sites import Guidance, Model, Sampler, Site, Transformer
from sodaprof.formats.tables import MEAN, RANKING, TABLE_VERSIONS, schema

settings.register_profile("sodaprof", derandomize=True, deadline=None, database=None)
settings.load_profile("sodaprof")

TOKENS = 16
RATES = (0.25, 0.5, 0.75)

# ---- schedules, in memory ---------------------------------------------------------------------------------------------


def build_sampler(steps: int = 6) -> Sampler:
    """Returns a sampler of evenly spaced timesteps, noisiest first."""
    timesteps = tuple(int(t) for t in np.linspace(980, 20, steps))
    return Sampler(
        "DDIMScheduler", {"num_train_timesteps": 1000, "beta_start": 1e-4}, timesteps, Guidance("halves", 4.0)
    )


def build_schedule() -> Schedule:
    """Returns a small legal schedule with C, R, P and F cells: 2 layers x (attn1, ff), 6 steps, 16 tokens."""
    attn, ff = "transformer_blocks.{}.attn1".format, "transformer_blocks.{}.ff".format
    rows = {attn(0): "CRPCFR", ff(0): "CRRCFP", attn(1): "CRPCFR", ff(1): "CPRCFR"}
    linear = Forecast((3, 0), (1.33333, -0.333333))
    plan = Plan(
        class_name="DiTTransformer2DModel",
        fingerprint={
            "layers": 2,
            "width": 32,
            "tokens": {"transformer_blocks.attn1": TOKENS, "transformer_blocks.ff": TOKENS},
            "kinds": {"transformer_blocks.attn1": "attn", "transformer_blocks.ff": "mlp"},
        },
        rows=rows,
        stack="......",
        k={attn(0): (4,), ff(0): (0,), attn(1): (8,), ff(1): (TOKENS,)},
        forecasts=dict.fromkeys(rows, (linear,)),
    )
    return Schedule(
        transformers={"transformer": plan},
        sampler=build_sampler(),
        shape={"latent": [4, 8, 8], "tokens": TOKENS, "batch_profiled": 1, "dtype": "float32"},
        policy={"name": "hand", "knobs": {}},
        token_rule=TokenRule("feature_mean"),
        made_by="tests",
    )


def build_skipping() -> Schedule:
    """Returns a legal schedule with an S column (one C of the prefix in it), a - column, and a fitted update."""
    base = build_schedule()
    rows = dict(zip(base.transformers["transformer"].rows, ("CRCC-R", "CR-C-R", "CR-C-C", "CR-C-R"), strict=True))
    plan = replace(
        base.transformers["transformer"],
        rows=rows,
        stack="..S.-.",
        k={},
        forecasts={},
        stack_forecasts=(Forecast((1, 0), (2.0, -1.0), "drift"),),
    )
    # outputs that exist: 1 after step 0, one more a step, none more at the - of step 4
    coefficients = ((0.9, 0.1, 0.0), (0.9, 0.1, -0.02), *[(0.95, 0.123456789, -0.05)] * 4)
    update = Update("output", 2, coefficients, {"guidance_scale": 4.0, "loop": "open"})
    return replace(base, transformers={"transformer": plan}, token_rule=None, update=update)


def build_relay() -> Schedule:
    """Returns a legal schedule of two transformers: `high` owns steps 0-2, `low` steps 3-5."""
    base = build_schedule()
    plan = base.transformers["transformer"]
    high, low = (dict.fromkeys(plan.rows, row) for row in ("CRR___", "___CRR"))
    plans = {
        "high": replace(plan, rows=high, stack="...___", k={}, forecasts={}),
        "low": replace(plan, rows=low, stack="___...", k={}, forecasts={}),
    }
    return replace(base, transformers=plans, token_rule=None)


@pytest.fixture
def schedule() -> Schedule:
    return build_schedule()


@pytest.fixture
def skipping() -> Schedule:
    return build_skipping()


@pytest.fixture
def relay() -> Schedule:
    return build_relay()


# ---- model, cost table, profile folder --------------------------------------------------------------------------------


def build_model(layers: int = 2, tokens: int = TOKENS, prunable: bool = True, names: tuple[str, ...] = ("t",)) -> Model:
    """Returns a model of `layers` x (attn1, ff) with one transformer a name."""
    sites = tuple(
        Site("blocks", layer, module, kind, tokens, 8, prunable)
        for layer in range(layers)
        for module, kind in (("attn1", "attn"), ("ff", "mlp"))
    )
    print_ = {"layers": layers, "tokens": {"blocks.attn1": tokens, "blocks.ff": tokens}}
    print_ |= {"kinds": {"blocks.attn1": "attn", "blocks.ff": "mlp"}}
    shape = {"latent": [4, 8, 8], "tokens": tokens, "batch_profiled": 1, "dtype": "float32"}
    return Model("tiny", "DiTPipeline", {n: Transformer("DiT", print_, sites) for n in names}, shape)


def build_cost(model: Model) -> CostModel:
    """Returns costs by hand, at 16 tokens: attn 60 (P: 10 + 3.125 k), ff 100 (P: 6.25 k), fixed 20, all cached 12, loop 2."""
    transformers = {}
    for name, transformer in model.transformers.items():
        sites = {}
        for s in transformer.sites:
            full, start = (60.0, 10.0) if s.kind == "attn" else (100.0, 0.0)
            first = start + (full - start) / s.tokens
            sites[s.key] = SiteCost(full, 1.0, (2.0, 3.0, 4.0, 5.0), ((1, first), (s.tokens, full)))
        step = StepCost(20.0, 12.0, (7.0, 8.0, 9.0, 10.0))
        transformers[name] = TransformerCost(step, sites)
    loop = {"scheduler": 2.0, "update": 1.0, "guidance": 0.0}
    return CostModel("flops", "meta", "float32", 1, model.shape["tokens"], transformers, loop, dict.fromkeys(OUTSIDE))


OUTSIDE = ("text_encoder", "vae")


def write_table(folder: Path, table: str, columns: dict[str, Any]) -> None:
    """Writes one Parquet table with exactly the columns and types of `sodaprof.formats.tables.TABLES`."""
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema(table)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema(table)), folder / f"{table}.parquet")


def build_profile(
    folder: Path,
    caching: np.ndarray | dict[str, np.ndarray],
    pruning: np.ndarray | None = None,
    *,
    rates: tuple[float, ...] = RATES,
    model: Model | None = None,
    cost: CostModel | None = None,
) -> Path:
    """Writes a whole profile folder from the errors of reuse [T, S, ages + 1], the same for all metrics or one each.

    Entry [t, s, a] is used for 1 <= a <= t, of transformers that take turns within the turn; S counts the sites of all
    transformers where they differ in their errors. pruning [T, S, ages + 1, rates] defaults to E_c · rate², which keeps E_p below
    E_c and makes early tokens worth more. Sites are in the order of `build_model`.
    """
    errors = caching if isinstance(caching, dict) else dict.fromkeys(("cos", "l1", "l2"), caching)
    steps, count, ages = errors["cos"].shape
    model = build_model(layers=count // 2) if model is None else model
    if pruning is None:
        pruning = errors["cos"][..., None] * np.array(rates) ** 2
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model.json", model.to_json(), force=True)
    write_json(folder / "sampler.json", build_sampler(steps).to_json(), force=True)
    save_cost(build_cost(model) if cost is None else cost, folder / "cost.flops.json", force=True)
    manifest = {
        "format": "sodaprof.profile", "version": 1, "tables": TABLE_VERSIONS, "model": "tiny",
        "sampler": "DDIMScheduler", "prompts": [0, 1], "seed": 7, "samples": 3, "max_interval": ages, "batch_size": 2,
        "guidance_scale": 4.0, "dtype": "float32", "device": "cpu", "versions": {}, "measured": {},
    }  # fmt: skip
    write_json(folder / "manifest.json", manifest, force=True)
    places = [(name, s) for name, t in model.transformers.items() for s in t.sites]
    cells = [
        (name, i % count, s, t, a, branch)
        for t in range(steps)
        for i, (name, s) in enumerate(places)
        for a in range(1, min(model.transformers[name].past(steps)[t], ages - 1) + 1)
        for branch in (0, 1, MEAN)
    ]

    def place(rows: list[Any]) -> dict[str, Any]:
        return {"transformer": [r[0] for r in rows]} | {
            c: [getattr(r[2], c) for r in rows] for c in ("stack", "layer", "module", "call")
        }

    def cell(rows: list[Any]) -> dict[str, Any]:
        return place(rows) | {"step": [r[3] for r in rows], "age": [r[4] for r in rows], "branch": [r[5] for r in rows]}

    # a branch alone gets ten times the error, so that reading the wrong rows shows
    factor = np.array([1.0 if r[5] == MEAN else 10.0 for r in cells])
    columns = cell(cells) | {"n": [3] * len(cells), "token_cos": [None] * len(cells)}
    for metric, error in errors.items():
        columns[f"{metric}_mean"] = factor * np.array([error[t, i, a] for _, i, _, t, a, _ in cells])
        columns[f"{metric}_std"] = np.zeros(len(cells))
    write_table(folder, "caching", columns)
    repeated = [r for r in cells for _ in rates]
    columns = cell(repeated) | {
        "ranking": [RANKING] * len(repeated),
        "prune_rate": list(rates) * len(cells),
        "mean": np.repeat(factor, len(rates)) * np.concatenate([pruning[t, i, a] for _, i, _, t, a, _ in cells]),
        "std": np.zeros(len(repeated)),
        "n": [3] * len(repeated),
    }
    write_table(folder, "pruning", columns)
    every = [(name, 0, s) for name, s in places]
    columns = {c: [getattr(s, c) for _, s in places] for c in ("kind", "tokens", "width", "prunable")}
    columns["token_grid"] = [[1, 1, s.tokens] for _, s in places]
    write_table(folder, "sites", place(every) | columns)
    return folder


@pytest.fixture
def make_model() -> Callable[..., Model]:
    return build_model


@pytest.fixture
def make_sampler() -> Callable[..., Sampler]:
    return build_sampler


@pytest.fixture
def make_cost() -> Callable[..., CostModel]:
    return build_cost


@pytest.fixture
def make_profile(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function (caching, pruning=None, **options) -> folder; see `build_profile`."""

    def make(caching: Any, pruning: np.ndarray | None = None, name: str = "profile", **options: Any) -> Path:
        return build_profile(tmp_path / name, caching, pruning, **options)

    return make


def grown_errors() -> np.ndarray:
    rng = np.random.default_rng(0)
    grown = rng.uniform(0.01, 0.1, (12, 4, 5)).cumsum(axis=2)
    return grown.astype(np.float32).astype(np.float64)


@pytest.fixture
def random_errors() -> np.ndarray:
    """Errors of reuse [T = 12, S = 4, ages + 1 = 5] that grow with age, float32 values (what Parquet keeps)."""
    return grown_errors()


@pytest.fixture(scope="session")
def random_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile folder of `random_errors`, written once: copy it before changing it."""
    return build_profile(tmp_path_factory.mktemp("random") / "profile", grown_errors())


# ---- the command line --------------------------------------------------------------------------------------------------


def invoke(patch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """Runs the command line in this process and returns its exit code."""
    patch.setattr(sys, "argv", ["sodaprof", *map(str, arguments)])
    patch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Returns a function that runs a command -> (exit code, what it said, what it said on stderr); never a traceback."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = invoke(monkeypatch, *arguments)
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        return code, said.out, said.err

    return run


@pytest.fixture
def refused(command: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Returns a function that runs a command which must end in one message -> that message; nothing may be at `output`."""

    def run(*arguments: Any, output: Path) -> str:
        code, _, said = command(*arguments, "-o", output)
        assert code == 1
        assert said.startswith("sodaprof: ")
        assert said.count("\n") == 1
        assert not [path.name for path in output.parent.iterdir() if output.name in path.name]
        return said

    return run


# ---- pipelines (torch below here) -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline: a MODEL of the command line."""
    from tests.tiny_pipelines import tiny_pipe

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe().save_pretrained(folder)
    return folder
