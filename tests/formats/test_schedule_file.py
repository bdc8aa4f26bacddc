"""schedule.json: what goes in comes out, and nothing else goes in."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sodaprof import load_schedule
from sodaprof.errors import FormatError, IllegalScheduleError, SodaprofError
from sodaprof.formats.schedule import Forecast, Plan, Schedule, TokenRule, Update

ATTN0, FF0 = "transformer_blocks.0.attn1", "transformer_blocks.0.ff"


def written(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def at(data: Any, *path: Any) -> Any:
    for key in path:
        data = data[key]
    return data


def changed(schedule: Schedule, path: tuple[Any, ...], value: Any) -> Any:
    """Returns the schedule's JSON with the value at `path` replaced or added."""
    data = copy.deepcopy(schedule.to_json())
    at(data, *path[:-1])[path[-1]] = value
    return data


def short(value: Any) -> str:
    """Returns a readable test id."""
    return ".".join(map(str, value[-2:])) if isinstance(value, tuple) else repr(value)[:20]


PLAN = ("transformers", "transformer")
PREDICTED = {"unit": "flops", "speedup": 2.0, "cost": 5.0e9, "error": 0.1, "cache_bytes": 4096}

# ---- what goes in comes out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["schedule", "skipping", "relay"])
def test_round_trip(name, request, tmp_path):
    given = request.getfixturevalue(name)
    given = replace(
        given,
        profile={"digest": "ab" * 32, "seed": 7, "samples": 100},
        predicted=PREDICTED,
        measured=({"device": "cpu", "speedup": 1.9}, {"device": "gpu", "speedup": 1.8}),
    )
    given.save(tmp_path / "a.json")
    found = load_schedule(tmp_path / "a.json")
    assert found == given
    assert found.digest() == given.digest()
    assert [list(p.rows) for p in found.transformers.values()] == [list(p.rows) for p in given.transformers.values()]
    found.save(str(tmp_path / "b.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_token_rule_and_numbers_come_back_exactly(schedule, tmp_path):
    rule = TokenRule("random", 0.25, 3.5, 0.1, 2, True, 123456789)
    update = Update("data", 1, ((0.1, 0.123456789),) * 6, {"loop": "closed"})
    given = replace(schedule, token_rule=rule, update=update)
    given.save(tmp_path / "a.json")
    found = load_schedule(tmp_path / "a.json")
    assert (found.token_rule, found.update) == (rule, update)
    assert found.transformers["transformer"].forecasts[FF0][0].weights == (1.33333, -0.333333)


def test_digest_leaves_out_predictions_measurements_and_maker(schedule):
    other = replace(schedule, predicted={"speedup": 2.0}, measured=({"device": "cpu"},), made_by="someone else")
    assert other.digest() == schedule.digest()
    assert len(schedule.digest()) == 64


def test_digest_changes_with_what_decides_the_run(schedule):
    plan = schedule.transformers["transformer"]

    def with_plan(**changes: Any) -> Schedule:
        return replace(schedule, transformers={"transformer": replace(plan, **changes)})

    forecast = Forecast((3, 0), (1.33334, -0.333333))
    others = [
        with_plan(rows=plan.rows | {ATTN0: "CRRCFR"}),
        with_plan(k=plan.k | {ATTN0: (5,)}),
        with_plan(forecasts=plan.forecasts | {ATTN0: (forecast,)}),
        with_plan(fingerprint=plan.fingerprint | {"layers": 3}),
        replace(schedule, token_rule=replace(schedule.token_rule, seed=1)),
        replace(schedule, sampler=replace(schedule.sampler, guidance_scale=5.0)),
        replace(schedule, shape=schedule.shape | {"dtype": "bfloat16"}),
        replace(schedule, policy={"name": "hand", "knobs": {"a": 1}}),
        replace(schedule, profile={"digest": "", "seed": 0, "samples": 1}),
    ]
    assert len({s.digest() for s in [schedule, *others]}) == len(others) + 1


# ---- the file ---------------------------------------------------------------------------------------------------------


def test_rows_stand_one_a_line(schedule, tmp_path):
    schedule.save(tmp_path / "a.json")
    lines = (tmp_path / "a.json").read_text().splitlines()
    for site, row in schedule.transformers["transformer"].rows.items():
        assert [line.strip().rstrip(",") for line in lines if row in line and site in line] == [f'"{site}": "{row}"']


def test_one_changed_cell_is_one_changed_line(schedule, tmp_path):
    plan = schedule.transformers["transformer"]
    other = replace(plan, rows=plan.rows | {ATTN0: "CRPCFC"})
    schedule.save(tmp_path / "a.json")
    replace(schedule, transformers={"transformer": other}).save(tmp_path / "b.json")
    a, b = ((tmp_path / f"{n}.json").read_text().splitlines() for n in "ab")
    assert len(a) == len(b)
    assert sum(x != y for x, y in zip(a, b, strict=True)) == 1


def test_shared_sources_stand_once_a_column(schedule, tmp_path):
    schedule.save(tmp_path / "a.json")
    forecasts = json.loads((tmp_path / "a.json").read_text())["transformers"]["transformer"]["forecasts"]
    assert forecasts["sources"] == [None, None, None, None, [3, 0], None]
    assert forecasts["weights"][FF0] == [[1.33333, -0.333333]]


def test_sources_that_differ_stand_once_a_site(schedule, tmp_path):
    plan = schedule.transformers["transformer"]
    own = replace(plan, forecasts=plan.forecasts | {FF0: (Forecast((0,), (1.0,)),)})
    given = replace(schedule, transformers={"transformer": own})
    given.save(tmp_path / "a.json")
    column = json.loads((tmp_path / "a.json").read_text())["transformers"]["transformer"]["forecasts"]["sources"][4]
    assert column == {site: [0] if site == FF0 else [3, 0] for site in plan.rows}
    assert load_schedule(tmp_path / "a.json") == given


def test_dit_xl_at_50_steps_stays_small(schedule, make_sampler, tmp_path):
    """28 layers x 2 sites x 50 steps, 18 anchors, everything between them pruned: at most 160 kB."""
    anchors = {round(i * 50 / 18) for i in range(18)}
    row = "".join("C" if t in anchors else "P" for t in range(50))
    rows = {f"transformer_blocks.{i}.{m}": row for i in range(28) for m in ("attn1", "ff")}
    tokens = {f"transformer_blocks.{m}": 256 for m in ("attn1", "ff")}
    k = {site: tuple((17 * i) % 257 for i in range(row.count("P"))) for site in rows}
    plan = Plan("DiTTransformer2DModel", {"tokens": tokens}, rows, "." * 50, k)
    big = replace(schedule, transformers={"transformer": plan}, sampler=make_sampler(50))
    big.save(tmp_path / "a.json")
    assert len(rows) == 56
    assert 5_000 < (tmp_path / "a.json").stat().st_size <= 160_000
    assert load_schedule(tmp_path / "a.json") == big


def test_forecasts_with_shared_sources_stay_small(schedule, make_sampler, tmp_path):
    """The same with a two-source forecast in every cached cell."""
    row = "".join("CFF"[t % 3] if t > 5 else "C" for t in range(50))
    rows = {f"transformer_blocks.{i}.{m}": row for i in range(28) for m in ("attn1", "ff")}
    tokens = {f"transformer_blocks.{m}": 256 for m in ("attn1", "ff")}
    cells = tuple(
        Forecast((t - t % 3, t - t % 3 - 3), (1.33333, -0.333333)) for t, action in enumerate(row) if action == "F"
    )
    plan = Plan("DiTTransformer2DModel", {"tokens": tokens}, rows, "." * 50, {}, dict.fromkeys(rows, cells))
    sampler = make_sampler(50)
    big = replace(schedule, transformers={"transformer": plan}, sampler=sampler, token_rule=None)
    big.save(tmp_path / "a.json")
    assert (tmp_path / "a.json").stat().st_size <= 160_000


def test_save_does_not_overwrite(schedule, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("mine")
    with pytest.raises(FormatError, match="exists already"):
        schedule.save(path)
    assert path.read_text() == "mine"
    schedule.save(path, force=True)
    assert load_schedule(path) == schedule
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses_an_illegal_schedule_and_writes_nothing(schedule, tmp_path):
    with pytest.raises(IllegalScheduleError):
        replace(schedule, token_rule=None).save(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


# ---- nothing else goes in ---------------------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        load_schedule(tmp_path / "none.json")
    with pytest.raises(FormatError):
        load_schedule(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(schedule, tmp_path, share):
    schedule.save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text().rstrip()
    (tmp_path / "a.json").write_text(text[: int(len(text) * share)])
    with pytest.raises(FormatError, match="not readable as JSON"):
        load_schedule(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"3", b"null", b'"C"', b"{}"])
def test_other_files(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FormatError):
        load_schedule(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ((), "colour"),
        (PLAN, "colour"),
        ((*PLAN, "stack"), "colour"),
        ((*PLAN, "forecasts"), "colour"),
        (("sampler",), "colour"),
        (("sampler", "guidance"), "colour"),
        (("token_rule",), "colour"),
        (("update",), "colour"),
        (("policy",), "colour"),
        (("profile",), "colour"),
    ],
)
def test_unknown_key(schedule, skipping, tmp_path, where, name):
    given = replace(
        schedule,
        update=skipping.update,
        profile={"digest": "0", "seed": 0, "samples": 1},
        measured=({"device": "cpu"},),
    )
    data = changed(given, (*where, name), 1)
    with pytest.raises(FormatError, match="unknown key 'colour'"):
        load_schedule(written(tmp_path / "a.json", data))
    at(data, *where).pop(name)
    assert load_schedule(written(tmp_path / "a.json", data)) == given


@pytest.mark.parametrize(
    "where", [("sampler",), (*PLAN, "rows"), (*PLAN, "stack", "row"), ("token_rule", "seed"), ("made_by",)]
)
def test_missing_key(schedule, tmp_path, where):
    data = schedule.to_json()
    at(data, *where[:-1]).pop(where[-1])
    with pytest.raises(FormatError, match=f"key '{where[-1]}' is missing"):
        load_schedule(written(tmp_path / "a.json", data))


@pytest.mark.parametrize("version", [2, 0, -1, "1", None, 1.0, True])
def test_other_versions(schedule, tmp_path, version):
    with pytest.raises(FormatError, match="version"):
        load_schedule(written(tmp_path / "a.json", changed(schedule, ("version",), version)))


def test_a_newer_version_is_told_before_its_unknown_keys(schedule, tmp_path):
    data = schedule.to_json() | {"version": 2, "colour": 1}
    with pytest.raises(FormatError, match="pip install -U sodaprof"):
        load_schedule(written(tmp_path / "a.json", data))


def test_another_format(schedule, tmp_path):
    with pytest.raises(FormatError, match=r"found format 'sodaprof\.cost'"):
        load_schedule(written(tmp_path / "a.json", changed(schedule, ("format",), "sodaprof.cost")))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
@pytest.mark.parametrize("where", [("predicted",), ("sampler", "guidance", "scale"), (*PLAN, "forecasts", "weights")])
def test_numbers_are_finite(schedule, tmp_path, word, where):
    text = json.dumps(changed(schedule, where, "@@"))
    (tmp_path / "a.json").write_text(text.replace('"@@"', word))
    with pytest.raises(FormatError, match="not readable as JSON"):
        load_schedule(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("transformers",), []),
        (("transformers",), None),
        ((*PLAN,), []),
        ((*PLAN, "class"), None),
        ((*PLAN, "fingerprint"), []),
        ((*PLAN, "rows"), ["CRPCFR"]),
        ((*PLAN, "rows"), "CRPCFR"),
        ((*PLAN, "rows"), None),
        ((*PLAN, "rows", ATTN0), list("CRPCFR")),
        ((*PLAN, "rows", ATTN0), None),
        ((*PLAN, "rows", ATTN0), 6),
        ((*PLAN, "rows", ATTN0), {}),
        ((*PLAN, "stack"), "......"),
        ((*PLAN, "stack", "row"), None),
        ((*PLAN, "stack", "row"), list("......")),
        ((*PLAN, "stack", "form"), None),
        ((*PLAN, "stack", "form"), ["output"]),
        ((*PLAN, "k"), []),
        ((*PLAN, "k"), None),
        ((*PLAN, "k", ATTN0), "4"),
        ((*PLAN, "k", ATTN0), 4),
        ((*PLAN, "k", ATTN0), ["4"]),
        ((*PLAN, "k", ATTN0), [[4]]),
        ((*PLAN, "k", ATTN0), [True]),
        ((*PLAN, "k", ATTN0), [10**400]),
        ((*PLAN, "forecasts"), []),
        ((*PLAN, "forecasts", "sources"), []),
        ((*PLAN, "forecasts", "sources"), [None] * 6),
        ((*PLAN, "forecasts", "sources", 4), {ATTN0: [3]}),
        ((*PLAN, "forecasts", "sources", 4), ["3", "0"]),
        ((*PLAN, "forecasts", "sources", 4), [[3], [0]]),
        ((*PLAN, "forecasts", "sources", 4), [3.0, 0.0]),
        ((*PLAN, "forecasts", "sources", 4), [3, False]),
        ((*PLAN, "forecasts", "weights"), []),
        ((*PLAN, "forecasts", "weights", FF0), []),
        ((*PLAN, "forecasts", "weights", FF0), [[1.0, None]]),
        ((*PLAN, "forecasts", "weights", FF0), [["1", "0"]]),
        ((*PLAN, "forecasts", "weights", FF0), [[True, False]]),
        ((*PLAN, "forecasts", "weights", FF0), [[10**400, 0]]),
        ((*PLAN, "forecasts", "weights", "transformer_blocks.7.ff"), [[1.0]]),
        (("sampler",), None),
        (("sampler", "timesteps"), None),
        (("sampler", "timesteps"), []),
        (("sampler", "timesteps"), ["980"] * 6),
        (("sampler", "timesteps"), "980"),
        (("sampler", "guidance"), 4.0),
        (("sampler", "guidance", "form"), "both"),
        (("sampler", "guidance", "form"), []),
        (("sampler", "guidance", "scale"), "4"),
        (("sampler", "config"), []),
        (("sampler", "class"), 3),
        (("shape",), None),
        (("shape",), "4x8x8"),
        (("shape",), []),
        (("policy",), "soda"),
        (("profile",), "abc"),
        (("token_rule",), []),
        (("token_rule", "base"), None),
        (("token_rule", "base"), ["feature_mean"]),
        (("token_rule", "age_weight"), "0"),
        (("token_rule", "bonus_grid"), None),
        (("token_rule", "seed"), "0"),
        (("token_rule", "share_halves"), "no"),
        (("token_rule", "bonus"), 10**400),
        (("update",), []),
        (("shape", "latent"), None),
        (("shape", "latent"), []),
        (("shape", "latent", 1), 0),
        (("shape", "tokens"), "64"),
        (("shape", "dtype"), None),
        (("predicted",), 2.0),
        (("predicted",), {"speedup": 2.0}),
        (("predicted",), PREDICTED | {"speedup": None}),
        (("predicted",), PREDICTED | {"unit": 1}),
        (("predicted",), PREDICTED | {"error": "small"}),
        (("predicted",), PREDICTED | {"cache_bytes": 1.5}),
        (("profile",), {"digest": "ab", "seed": -1, "samples": 4}),
        (("profile",), {"digest": "ab", "seed": 0, "samples": 0}),
        (("measured",), None),
        (("measured",), "fast"),
        (("measured",), {"device": "cpu"}),
        (("made_by",), None),
    ],
    ids=short,
)
def test_wrong_types(schedule, tmp_path, where, value):
    """A FormatError, or IllegalScheduleError where a rule of the format sees it first; never another exception."""
    with pytest.raises((FormatError, IllegalScheduleError)) as caught:
        load_schedule(written(tmp_path / "a.json", changed(schedule, where, value)))
    assert len(str(caught.value)) > 40


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("history", "2"),
        ("history", None),
        ("history", []),
        ("history", 2.0),
        ("basis", None),
        ("coefficients", None),
        ("coefficients", [0.9] * 6),
        ("coefficients", [["0.9", 0, 0]] * 6),
        ("coefficients", [[10**400, 0, 0]] * 6),
        ("coefficients", [[True, 0, 0]] * 6),
        ("fitted", 3),
    ],
    ids=short,
)
def test_wrong_types_in_the_update(skipping, tmp_path, key, value):
    with pytest.raises((FormatError, IllegalScheduleError)):
        load_schedule(written(tmp_path / "a.json", changed(skipping, ("update", key), value)))


# ---- fuzz -------------------------------------------------------------------------------------------------------------

HUGE = "@huge@"  # stands for 1e400, which JSON can write and no float can hold


def places(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every value inside `data`."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = []
    for key, value in inner:
        found += [(*prefix, key), *places(value, (*prefix, key))]
    return found


@pytest.mark.parametrize("name", ["schedule", "skipping"])
def test_a_random_mutation_loads_or_is_refused(name, request, tmp_path):
    """200 single mutations a file: delete a key, or put null, a string, a list, -1, 1e400 in the place of a value."""
    given = replace(request.getfixturevalue(name), profile={"digest": "0", "seed": 0, "samples": 1}).to_json()
    given = json.loads(json.dumps(given))
    every = places(given)
    rng = random.Random(0)
    path = tmp_path / "a.json"
    refused = 0
    for _ in range(200):
        data, where = copy.deepcopy(given), rng.choice(every)
        value = rng.choice(["delete", None, "abc", [], [[1]], -1, HUGE])
        parent = at(data, *where[:-1])
        if value == "delete":
            del parent[where[-1]]
        else:
            parent[where[-1]] = value
        path.write_text(json.dumps(data).replace(f'"{HUGE}"', "1e400"))
        try:
            loaded = load_schedule(path)
        except SodaprofError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{where} = {value!r}: {type(error).__name__}: {error}") from error
        else:
            assert load_schedule(path).digest() == loaded.digest()
            assert loaded.counts().total() == 6 * sum(len(plan.rows) for plan in loaded.transformers.values()) > 0
    assert refused > 100
