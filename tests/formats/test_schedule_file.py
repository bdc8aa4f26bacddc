"""schedule.json: what is written is read again, and nothing else is read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sodaprof import load_schedule
from sodaprof.errors import FormatError, IllegalScheduleError
from sodaprof.formats.files import header
from sodaprof.formats.rules import verify
from sodaprof.formats.sampler import OUTPUT_BASED
from sodaprof.formats.schedule import Forecast, Plan, Schedule, Update
from sodaprof.formats.schedule_file import schedule_from_json, schedule_to_json, version_of
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.pipelines.sampler_steps import SCHEDULERS, basis_of
from tests.strategies import OTHERS, at, broken, legal_schedules, places

ATTN0, FF0 = "transformer_blocks.0.attn1", "transformer_blocks.0.ff"
PLAN = ("transformers", "transformer")


def written(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def changed(schedule: Schedule, path: tuple[Any, ...], value: Any) -> Any:
    """Returns the schedule's JSON with the value at `path` replaced or added."""
    data = json.loads(json.dumps(schedule_to_json(schedule)))
    at(data, path[:-1])[path[-1]] = value
    return data


def with_plan(schedule: Schedule, **changes: Any) -> Schedule:
    plan = replace(schedule.transformers["transformer"], **changes)
    return replace(schedule, transformers={"transformer": plan})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("schedules")


# ---- what is written is read again ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(legal_schedules())
def test_a_legal_schedule_is_read_as_it_was_written(folder, schedule):
    verify(schedule)
    schedule.save(folder / "a.json", force=True)
    found = load_schedule(folder / "a.json")
    assert found == schedule
    assert found.digest() == schedule.digest()
    assert [list(p.rows) for p in found.transformers.values()] == [list(p.rows) for p in schedule.transformers.values()]
    found.save(str(folder / "b.json"), force=True)
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()


def test_all_kinds_of_cells_are_drawn():
    """The strategy reaches every action, so that the other tests here are about them too."""
    seen = set()

    @settings(max_examples=30)
    @given(legal_schedules())
    def collect(schedule):
        for plan in schedule.transformers.values():
            seen.update(plan.stack, *plan.rows.values())
        seen.update(name for name in ("update", "token_rule") if getattr(schedule, name) is not None)
        seen.update(name for name in ("times", "initial") if getattr(schedule.update, name, None) is not None)
        seen.add(version_of(schedule))

    collect()
    assert seen == {*"CRFPS.-_", "update", "token_rule", "times", "initial", 1, 2}


def test_the_digest_leaves_out_predictions_measurements_and_maker(schedule):
    other = replace(schedule, predicted={"speedup": 2.0}, measured=({"device": "cpu"},), made_by="someone else")
    assert other.digest() == schedule.digest()
    assert len(schedule.digest()) == 64


def test_the_digest_changes_with_what_decides_the_run(schedule):
    plan = schedule.transformers["transformer"]
    others = [
        with_plan(schedule, rows=plan.rows | {ATTN0: "CRRCFR"}),
        with_plan(schedule, k=plan.k | {ATTN0: (5,)}),
        with_plan(schedule, forecasts=plan.forecasts | {ATTN0: (Forecast((3, 0), (1.33334, -0.333333)),)}),
        with_plan(schedule, fingerprint=plan.fingerprint | {"layers": 3}),
        replace(schedule, token_rule=replace(schedule.token_rule, seed=1)),
        replace(schedule, sampler=replace(schedule.sampler, config={})),
        replace(schedule, shape=schedule.shape | {"dtype": "bfloat16"}),
        replace(schedule, policy={"name": "hand", "knobs": {"a": 1}}),
        replace(schedule, profile={"digest": "", "seed": 0, "samples": 1}),
    ]
    assert len({s.digest() for s in [schedule, *others]}) == len(others) + 1


# ---- versions ---------------------------------------------------------------------------------------------------------


def widened(update: Update, history: int) -> dict[str, Any]:
    return {
        "history": history,
        "coefficients": tuple((*row, *[0.0] * (1 + history - len(row))) for row in update.coefficients),
    }


NEWER = {  # what version 2 brings -> the change of an update of version 1
    "times": lambda s: {"times": tuple(0.5 + t if t != s.sampler.timesteps[4] else t for t in s.sampler.timesteps)},
    "initial": lambda s: {"initial": (0.0, 0.1, 0.0, 0.0, 0.0, -0.1)},
    "history": lambda s: widened(s.update, 5),
    "basis": lambda s: {"basis": "data"},
}


@pytest.mark.parametrize("name", NEWER)
def test_a_schedule_is_written_in_the_lowest_version_that_holds_it(skipping, tmp_path, name):
    assert version_of(skipping) == schedule_to_json(skipping)["version"] == 1
    assert set(schedule_to_json(skipping)["update"]) == {"basis", "history", "coefficients", "fitted"}
    newer = replace(skipping, update=replace(skipping.update, **NEWER[name](skipping)))
    newer.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert (data["version"], data["update"]["times"] is None) == (2, name != "times")
    assert load_schedule(tmp_path / "a.json") == newer
    assert newer.digest() != skipping.digest()
    with pytest.raises(FormatError, match=r"version 2 of sodaprof\.schedule, this release reads up to 1\. Upgrade"):
        header(data, ("sodaprof.schedule", 1), "a.json")  # as releases do that know version 1 alone
    with pytest.raises(FormatError, match=r"this release reads up to 2\. Upgrade"):
        schedule_from_json(data | {"version": 3}, "a.json")
    with pytest.raises(FormatError, match="version 1 has no key `times`"):
        schedule_from_json(data | {"version": 1}, "a.json")


def test_a_longer_history_is_refused_in_version_1(skipping):
    data = json.loads(json.dumps(schedule_to_json(skipping)))
    data["update"] |= json.loads(json.dumps(NEWER["history"](skipping)))
    with pytest.raises(FormatError, match="in version 1 its history is at most 4"):
        schedule_from_json(data, "a.json")


def test_a_data_basis_under_a_sampler_of_outputs_loads_from_version_1(skipping, tmp_path):
    """Releases before version 2 wrote and read such files, which no runtime of theirs ran."""
    assert skipping.sampler.class_name in OUTPUT_BASED
    data = json.loads(json.dumps(schedule_to_json(skipping)))
    data["update"]["basis"] = "data"
    assert data["version"] == 1
    (tmp_path / "a.json").write_text(json.dumps(data))
    found = load_schedule(tmp_path / "a.json")
    assert found == replace(skipping, update=replace(skipping.update, basis="data"))
    found.save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["version"] == 2
    assert load_schedule(tmp_path / "b.json") == found


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_the_samplers_that_weigh_outputs_are_known(cls):
    known = {"RectifiedFlowScheduler": RectifiedFlowScheduler}
    scheduler = (known.get(cls) or getattr(diffusers, cls))()
    assert (basis_of(scheduler) == "output") == (cls in OUTPUT_BASED)


# ---- the file ---------------------------------------------------------------------------------------------------------


def test_one_changed_cell_is_one_changed_line(schedule, tmp_path):
    plan = schedule.transformers["transformer"]
    schedule.save(tmp_path / "a.json")
    with_plan(schedule, rows=plan.rows | {ATTN0: "CRPCFC"}).save(tmp_path / "b.json")
    a, b = ((tmp_path / f"{n}.json").read_text().splitlines() for n in "ab")
    assert [line.strip() for line in set(b) - set(a)] == [f'"{ATTN0}": "CRPCFC",']
    assert len(a) == len(b)


def test_shared_sources_are_written_once_a_column(schedule):
    forecasts = schedule_to_json(schedule)["transformers"]["transformer"]["forecasts"]
    assert forecasts["sources"] == (None, None, None, None, (3, 0), None)
    assert forecasts["weights"][FF0] == ((1.33333, -0.333333),)


def test_sources_that_differ_are_written_for_each_site(schedule):
    plan = schedule.transformers["transformer"]
    own = with_plan(schedule, forecasts=plan.forecasts | {FF0: (Forecast((0,), (1.0,)),)})
    column = schedule_to_json(own)["transformers"]["transformer"]["forecasts"]["sources"][4]
    assert column == {site: (0,) if site == FF0 else (3, 0) for site in plan.rows}


@pytest.mark.parametrize("action", "PF")
def test_dit_xl_at_50_steps_stays_small(schedule, make_sampler, tmp_path, action):
    """28 layers x 2 sites x 50 steps, every third step full, everything else pruned or forecast: at most 160 kB."""
    row = "".join("C" if t % 3 == 0 or t < 6 else action for t in range(50))
    rows = {f"transformer_blocks.{i}.{m}": row for i in range(28) for m in ("attn1", "ff")}
    tokens = {f"transformer_blocks.{m}": 256 for m in ("attn1", "ff")}
    ks = {site: tuple((17 * i) % 257 for i in range(row.count("P"))) for site in rows} if action == "P" else {}
    cells = tuple(Forecast((t - t % 3, t - t % 3 - 3), (1.33333, -0.333333)) for t in range(50) if row[t] == "F")
    plan = Plan("DiT", {"tokens": tokens}, rows, "." * 50, ks, dict.fromkeys(rows, cells) if cells else {})
    rule = schedule.token_rule if ks else None
    big = replace(schedule, transformers={"transformer": plan}, sampler=make_sampler(50), token_rule=rule)
    big.save(tmp_path / "a.json")
    assert 5_000 < (tmp_path / "a.json").stat().st_size <= 160_000
    assert load_schedule(tmp_path / "a.json") == big


def test_save_refuses_an_illegal_schedule_and_an_existing_file(schedule, tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(IllegalScheduleError):
        replace(schedule, token_rule=None).save(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("kept")
    with pytest.raises(FormatError, match="exists already"):
        schedule.save(path)
    assert path.read_text() == "kept"


# ---- nothing else is read ---------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.data())
def test_another_type_an_unknown_key_and_a_missing_key_are_refused(data):
    schedule = data.draw(legal_schedules())
    changed = data.draw(broken(schedule_to_json(schedule)))
    with pytest.raises((FormatError, IllegalScheduleError)) as caught:
        verify(schedule_from_json(changed, "a.json"))
    assert len(str(caught.value)) > 40


HUGE = "@huge@"  # written as 1e400, which JSON permits and no float holds
JUNK = [*OTHERS, "delete", [], {}, -1, 0, 10**400, 2**70, 1.5, False, "\ud800", [[1]], HUGE]


@settings(max_examples=80)
@given(st.data())
def test_a_changed_file_loads_or_is_refused(folder, data):
    """One or two values replaced by anything, also where everything is permitted; never another exception."""
    given = json.loads(json.dumps(schedule_to_json(data.draw(legal_schedules()))))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(given))))
        value = data.draw(st.sampled_from(JUNK))
        if value == "delete":
            del at(given, path[:-1])[path[-1]]
        else:
            at(given, path[:-1])[path[-1]] = copy.deepcopy(value)
    text = json.dumps(given).replace(f'"{HUGE}"', "1e400")
    (folder / "a.json").write_text(text)
    try:
        loaded = load_schedule(folder / "a.json")
    except (FormatError, IllegalScheduleError):
        return
    verify(loaded)
    assert loaded == schedule_from_json(json.loads(json.dumps(schedule_to_json(loaded))), "")
    assert loaded.counts().total() + "".join(p.stack for p in loaded.transformers.values()).count("_") > 0


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"3", b"null", b'"C"', b"{}", b""])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FormatError):
        load_schedule(tmp_path / "a.json")
    with pytest.raises(FormatError, match="no such file"):
        load_schedule(tmp_path / "none.json")
    with pytest.raises(FormatError):
        load_schedule(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        (("colour",), 1, "unknown field `colour`"),
        ((*PLAN, "colour"), 1, r"transformers: Object contains unknown field `colour` - at `\$\[\.\.\.\]`"),
        ((*PLAN, "stack", "row"), 3, r"Expected `str`, got `int` - at `\$\[\.\.\.\]\.stack\.row`"),
        ((*PLAN, "k", ATTN0), [True], "Expected `int`, got `bool`"),
        ((*PLAN, "k", ATTN0), [4.0], "Expected `int`, got `float`"),
        ((*PLAN, "forecasts", "sources", 4), None, f"forecasts of {ATTN0}: found 0 lists of sources and 1 of weights"),
        ((*PLAN, "forecasts", "sources"), [], "found 0 lists of sources and 1 of weights"),
        ((*PLAN, "forecasts", "weights", FF0), [], f"forecasts of {FF0}: found 1 lists of sources and 0 of weights"),
        ((*PLAN, "forecasts", "weights", "a.7.ff"), [[1.0]], "found 0 lists of sources and 1 of weights"),
        ((*PLAN, "stack", "form"), ["output"], "stack: found 0 lists of sources and 0 of weights"),
        (("sampler", "guidance", "form"), "both", "Invalid enum value 'both'"),
        (("sampler", "timesteps"), [], "length >= 1"),
        (("shape", "latent", 1), 0, "shape: Expected `int` >= 1"),
        (("profile",), {"digest": "ab", "seed": -1, "samples": 4}, "`int` >= 0"),
        (("profile",), {"digest": "ab", "seed": 0, "samples": 0}, "`int` >= 1"),
        (("predicted",), {"speedup": 2.0}, "missing required field `unit`"),
        (("version",), 3, "Upgrade sodaprof: run `pip install -U .` in a newer checkout"),
        (("version",), 0, "found version 0"),
        (("version",), 1.0, "found version 1.0"),
        (("version",), True, "found version True"),
        (("format",), "sodaprof.cost", r"found format 'sodaprof\.cost'"),
    ],
)  # fmt: skip
def test_the_message_names_the_place_and_what_was_found(schedule, tmp_path, path, value, found):
    with pytest.raises(FormatError, match=found) as caught:
        load_schedule(written(tmp_path / "a.json", changed(schedule, path, value)))
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")


def test_a_missing_key_with_a_default_in_memory_is_refused(schedule, tmp_path):
    for path in (("token_rule", "seed"), ("made_by",)):
        data = json.loads(json.dumps(schedule_to_json(schedule)))
        del at(data, path[:-1])[path[-1]]
        with pytest.raises(FormatError, match=rf"missing required field `\$\.{'.'.join(path)}`"):
            load_schedule(written(tmp_path / "a.json", data))


def test_an_illegal_file_is_refused(schedule, tmp_path):
    path = written(tmp_path / "a.json", changed(schedule, (*PLAN, "rows", ATTN0), "CRRCFR"))
    with pytest.raises(IllegalScheduleError, match="0 P cells and 1 values of k"):
        load_schedule(path)


def test_a_newer_version_is_reported_before_its_unknown_keys(schedule, tmp_path):
    with pytest.raises(FormatError, match="Upgrade sodaprof"):
        load_schedule(written(tmp_path / "a.json", schedule_to_json(schedule) | {"version": 3, "colour": 1}))


def test_the_former_name_of_the_policy_forecast_is_read(schedule, tmp_path):
    replace(schedule, policy={"name": "fit", "knobs": {}}).save(tmp_path / "a.json")
    assert load_schedule(tmp_path / "a.json").policy["name"] == "fit"
