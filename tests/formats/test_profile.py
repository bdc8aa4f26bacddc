"""A profile folder: its tables come back as arrays, and a broken part is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sodaprof.errors import FormatError
from sodaprof.formats.files import decode
from sodaprof.formats.profile import load_profile
from sodaprof.formats.sampler import OwnUpdate
from sodaprof.formats.sites import Sampler, Site, SiteKey, Transformer, model_from_json
from sodaprof.formats.tables import table_digest
from sodaprof.profiler.plan import plan_profile
from sodaprof.profiler.run import run_profile
from tests.strategies import broken, models, profiles, samplers
from tests.tiny_pipelines import tiny_pipe


@settings(max_examples=10)
@given(profiles())
def test_the_tables_are_read_as_they_were_written(tmp_path_factory, parts):
    profile = load_profile(parts.write(tmp_path_factory.mktemp("profile") / "p"))
    steps, _, ages = parts.caching.shape
    assert profile.model == parts.model
    reuse, (pruning, rates) = profile.caching_error()["t"], profile.pruning_error()
    assert rates.tolist() == list(parts.rates)
    for step in range(steps):
        for age in range(1, ages):
            if age <= step:
                assert np.array_equal(reuse[step, :, age], parts.caching[step, :, age])
                assert np.array_equal(pruning["t"][step, :, age], parts.pruning[step, :, age])
            else:
                assert np.isnan(reuse[step, :, age]).all()


OWN = OwnUpdate("data", ((0.9, 1, -0.5),) * 3, ((1.0, -1),) * 3, (0.0,) * 3)


@settings(max_examples=150)
@given(st.data())
def test_another_type_an_unknown_key_and_a_missing_key_are_refused(data):
    """model.json, sampler.json and solver.json; unbroken they are read as they were written."""
    kind = data.draw(st.sampled_from(["model", "sampler", "solver"]))
    strategy = {"model": models(), "sampler": samplers(3), "solver": st.just(OWN)}[kind]
    kinds = {"sampler": Sampler, "solver": OwnUpdate}
    read = model_from_json if kind == "model" else lambda json, where: decode(json, kinds[kind], where)
    written = data.draw(strategy)
    assert repr(read(json.loads(json.dumps(written.to_json())), "")) == repr(written)
    with pytest.raises(FormatError, match=f"^{kind}.json: "):
        read(data.draw(broken(written.to_json())), f"{kind}.json")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        *(({"coefficients": rows}, "length") for rows in ([[0.9, 1.0]] * 2, [])),
        *(
            ({"coefficients": rows}, "2 to 5")
            for rows in ([[0.9]] * 3, [[0.9] * 6] * 3, [[0.9, 1.0], [0.9], [0.9, 1.0]])
        ),
        ({"noise": [0.0]}, "length"),
    ],
)
def test_an_update_of_uneven_lengths_is_refused(change, found):
    with pytest.raises(FormatError, match=found):
        decode(OWN.to_json() | change, OwnUpdate, "")


@pytest.mark.parametrize("called", [[], [-1, 0], [1, 0], [0, 0], [0.0], "01"])
def test_calls_of_a_transformer_are_rising_steps(make_model, called):
    data = json.loads(json.dumps(make_model().to_json()))
    data["transformers"]["t"]["called"] = called
    with pytest.raises(FormatError, match="called"):
        model_from_json(data, "")
    data["transformers"]["t"]["called"] = [0, 2]
    assert model_from_json(data, "").transformers["t"].past(4) == [0, -1, 0, -1]


@pytest.mark.parametrize("key", ["blocks.3.attn1", "blocks.3.attn1#1", "blocks.3.mlp.out#2"])
def test_site_keys(key):
    parsed = SiteKey.parse(key)
    assert str(parsed) == key
    assert f"{parsed.block}.{parsed.name}" == key
    assert parsed.path == key.partition("#")[0]
    assert Site(parsed.stack, parsed.layer, parsed.module, "attn", 1, 1, True, parsed.call).key == key


@pytest.mark.parametrize("key", ["", "ff", "blocks.ff", "blocks.x.ff", "blocks.1.ff#", "blocks.1.ff#a"])
def test_other_strings_are_no_site_keys(key):
    with pytest.raises(ValueError, match=r"unpack|invalid literal"):
        SiteKey.parse(key)


def test_what_a_fingerprint_says_of_a_site():
    fingerprint = {
        "tokens": {"b.ff": 16, "b.1.ff": 4}, "kinds": {"b.ff": "mlp"}, "layouts": {"b.ff": "rows"}, "text": ["b.ff#1"],
    }  # fmt: skip
    sites = (Site("b", 0, "ff", "mlp", 16, 8, True),)
    found = Transformer("DiT", fingerprint, sites)
    assert [found.tokens(key) for key in ("b.0.ff", "b.1.ff", "b.1.ff#1")] == [16, 4, 16]
    assert (found.kind("b.0.ff#1"), found.kind("b.0.attn")) == ("mlp", None)
    assert (found.layout("b.0.ff"), found.layout("b.0.attn")) == ("rows", "")
    assert [found.holds_text(key) for key in ("b.0.ff", "b.0.ff#1")] == [False, True]


# ---- tables that no profile has -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A profile with every table, as version 1 of the manifest has it: without digests."""
    folder, pipe = tmp_path_factory.mktemp("made") / "p", tiny_pipe(1)
    digest = run_profile(pipe, plan_profile(pipe, "tiny", steps=3, samples=2, max_interval=3), folder).digest()
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    assert data.pop("digests").keys() == data["tables"].keys()
    assert data["version"] == 2
    path.write_text(json.dumps(data | {"version": 1}))
    assert load_profile(folder).digest() == digest
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "p")


def test_a_changed_table_is_refused_by_its_digest(folder):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    digests = {table: table_digest(folder, table) for table in data["tables"]}
    path.write_text(json.dumps(data | {"version": 2, "digests": digests}))
    load_profile(folder)
    for table in digests:
        content = (folder / f"{table}.parquet").read_bytes()
        (folder / f"{table}.parquet").write_bytes(content[:9] + bytes([content[9] ^ 4]) + content[10:])
        with pytest.raises(
            FormatError, match=rf"{table}\.parquet: not the table that manifest\.json has the digest of"
        ):
            load_profile(folder)
        (folder / f"{table}.parquet").write_bytes(content)
    for wrong in ({k: v for k, v in digests.items() if k != "gram"}, digests | {"colour": "0"}):
        path.write_text(json.dumps(data | {"version": 2, "digests": wrong}))
        with pytest.raises(FormatError, match="has the digest of"):
            load_profile(folder)


@pytest.mark.parametrize(
    ("table", "column", "change", "found"),
    [
        ("caching", "n", 0, "another number of generations"),
        ("caching", "l1_mean", -1.0, "an error below 0"),
        ("caching", "branch", 5, "branches"),
        ("caching", "age", 2, "lacks rows|outside"),
        ("pruning", "prune_rate", 1.0, "prune rate outside"),
        ("pruning", "mean", 1e35, "an error below 0 or above"),
        ("gram", "product", 1e300, "a product above"),
        ("gram", "product", -1.0, "a square below 0"),
        ("gram", "kind", "colour", "unknown kind 'colour'"),
        ("gram", "transformer", "vae", "names the transformer 'vae'"),
        ("sites", "width", 3, "sites.parquet and model.json differ"),
        *(
            (table, None, rows, "lack|differ")
            for table in ("caching", "pruning", "gram", "sites")
            for rows in (0, 1, 2)
        ),
    ],
)
def test_rows_that_no_profile_has_are_refused(folder, table, column, change, found):
    path = folder / f"{table}.parquet"
    data = pq.read_table(path)
    rows = data.to_pylist()
    if column is None:  # one row less, one twice, all twice
        rows = [rows[1:], [*rows, rows[0]], rows * 2][change]
    else:
        rows[0][column] = change
    pq.write_table(pa.Table.from_pylist(rows, schema=data.schema), path)
    with pytest.raises(FormatError, match=found):
        read_all(folder)


def read_all(folder):
    profile = load_profile(folder)
    return profile.caching_error(), profile.pruning_error(), profile.state_products(), profile.site_products()


def test_a_product_larger_than_those_of_its_tensors_with_themselves_is_refused(folder):
    data = pq.read_table(folder / "gram.parquet")
    rows = data.to_pylist()
    next(row for row in rows if row["row"] != row["column"])["product"] = 1e9
    pq.write_table(pa.Table.from_pylist(rows, schema=data.schema), folder / "gram.parquet")
    with pytest.raises(FormatError, match="larger than those of either tensor"):
        load_profile(folder).state_products()
