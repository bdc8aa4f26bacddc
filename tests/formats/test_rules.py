"""Each rule of the format: a legal schedule passes, each way to break the rule is refused by that rule and no other."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sodaprof.errors import IllegalScheduleError
from sodaprof.formats import rules
from sodaprof.formats.rules import observed_steps, source_of
from sodaprof.formats.schedule import Forecast, Plan, Schedule, TokenRule, Update
from sodaprof.formats.schedule_file import schedule_from_json, schedule_to_json
from sodaprof.formats.sites import Guidance
from tests.strategies import legal_schedules

ATTN0, FF0 = "transformer_blocks.0.attn1", "transformer_blocks.0.ff"
ATTN1, FF1 = "transformer_blocks.1.attn1", "transformer_blocks.1.ff"


def edit(schedule: Schedule, name: str = "", **changes: Any) -> Schedule:
    """Returns the schedule with fields of one plan replaced."""
    name = name or next(iter(schedule.transformers))
    plan = replace(schedule.transformers[name], **changes)
    return replace(schedule, transformers=schedule.transformers | {name: plan})


def plan_of(schedule: Schedule) -> Plan:
    return next(iter(schedule.transformers.values()))


def with_row(schedule: Schedule, site: str, row: str, name: str = "") -> Schedule:
    rows = schedule.transformers[name].rows if name else plan_of(schedule).rows
    return edit(schedule, name, rows=rows | {site: row})


def with_forecast(schedule: Schedule, sources: tuple[Any, ...], weights: tuple[Any, ...]) -> Schedule:
    """Replaces the forecast of the F cell at step 4 of ATTN0."""
    cells = plan_of(schedule).forecasts | {ATTN0: (Forecast(sources, weights),)}
    return edit(schedule, forecasts=cells)


def with_k(schedule: Schedule, site: str, *k: Any) -> Schedule:
    return edit(schedule, k=plan_of(schedule).k | {site: k})


def with_rule(schedule: Schedule, **changes: Any) -> Schedule:
    return replace(schedule, token_rule=replace(TokenRule("feature_mean"), **changes))


def with_coefficient(schedule: Schedule, step: int, j: int, value: Any) -> Schedule:
    rows = [list(row) for row in schedule.update.coefficients]
    rows[step][j] = value
    return with_update(schedule, coefficients=tuple(tuple(row) for row in rows))


def with_update(schedule: Schedule, **changes: Any) -> Schedule:
    return replace(schedule, update=replace(schedule.update, **changes))


def with_time(schedule: Schedule, step: int, value: float) -> Schedule:
    times = list(schedule.times)
    times[step] = value
    return with_update(schedule, times=tuple(times))


def without_trained(schedule: Schedule) -> Schedule:
    return replace(schedule, sampler=replace(schedule.sampler, config={}))


def crossing(relay: Schedule) -> Schedule:
    """Returns a schedule whose second transformer is called at a time between those of the last two steps of the first."""
    update = Update("output", 1, ((1.0, 0.5),) * 6, {})
    rows = dict.fromkeys(relay.transformers["high"].rows, "CR-___")
    resting = replace(edit(relay, "high", stack="..-___", rows=rows), update=update)
    return with_time(resting, 3, (resting.times[1] + resting.times[2]) / 2)


def with_two_turns(relay: Schedule, high: str = "CR__CR", stack: str = "..__..", **changes: Any) -> Schedule:
    """Returns a schedule in which `high` is called at the first and the last two steps, `low` at those between."""
    keys = relay.transformers["low"].rows
    between = edit(relay, "low", stack="__..__", rows=dict.fromkeys(keys, "__CR__"))
    return edit(between, "high", stack=stack, rows=dict.fromkeys(keys, high), **changes)


def all_sites(source: int) -> dict[str, tuple[Forecast, ...]]:
    return dict.fromkeys((ATTN0, FF0, ATTN1, FF1), (Forecast((source,), (1.0,)),))


def skipped_later(skipping: Schedule, source: int) -> Schedule:
    """Returns a schedule with S at steps 2 and 5; the second is forecast from `source`."""
    rows = {site: row[:5] + "-" for site, row in plan_of(skipping).rows.items()}
    cells = (plan_of(skipping).stack_forecasts[0], Forecast((source,), (1.0,)))
    return edit(skipping, stack="..S.-S", rows=rows, stack_forecasts=cells)


def without_network_at_1(skipping: Schedule, **changes: Any) -> Schedule:
    rows = dict.fromkeys(plan_of(skipping).rows, "C-CR-R")
    return edit(skipping, **{"stack": ".-..-.", "rows": rows, "stack_forecasts": ()} | changes)


def many_sources(schedule: Schedule, count: int) -> Schedule:
    rows = dict.fromkeys(plan_of(schedule).rows, "CCCCCF")
    cell = Forecast(tuple(range(count)), (1e-7,) * count)
    return replace(edit(schedule, rows=rows, k={}, forecasts=dict.fromkeys(rows, (cell,))), token_rule=None)


TOKENS = {"transformer_blocks.attn1": 16}
BROKEN = {  # rule -> (fixture, change, what the message says was found)
    "rows_have_one_character_a_step": [
        ("schedule", lambda s: replace(s, transformers={}), "no transformer"),
        ("schedule", lambda s: edit(s, rows={}), "has no rows"),
        ("schedule", lambda s: with_row(s, FF1, "CPRCF"), "5 characters for 6 steps"),
        ("schedule", lambda s: with_row(s, FF1, "CPRCFRR"), "7 characters for 6 steps"),
        ("schedule", lambda s: with_row(s, FF1, "CPRCFX"), "holds 'X'"),
        ("schedule", lambda s: with_row(s, FF1, "CPRCF."), "holds '.'"),
        ("schedule", lambda s: edit(s, stack="....."), "5 characters for 6 steps"),
        ("schedule", lambda s: edit(s, stack=".....C"), "holds 'C'"),
    ],
    "sites_are_known_to_the_fingerprint": [
        ("schedule", lambda s: edit(s, fingerprint={"layers": 2}), "required field `tokens`"),
        ("schedule", lambda s: edit(s, fingerprint={"tokens": None}), "an entry of the fingerprint is wrong: Expected `object`"),
        ("schedule", lambda s: edit(s, fingerprint={"tokens": TOKENS}), "no tokens in the fingerprint"),
        ("schedule", lambda s: edit(s, fingerprint={"tokens": TOKENS | {"transformer_blocks.ff": 0}}), "Expected `int` >= 1"),
        ("schedule", lambda s: edit(s, fingerprint={"tokens": TOKENS | {"transformer_blocks.ff": "16"}}), "got `str`"),
        ("schedule", lambda s: edit(s, fingerprint=plan_of(s).fingerprint | {"kinds": []}), "fingerprint is wrong"),
        ("schedule", lambda s: edit(s, fingerprint=plan_of(s).fingerprint | {"text": 3}), "fingerprint is wrong"),
        ("schedule", lambda s: with_row(s, "ff", "CRRRRR"), "the site 'ff' has no tokens"),
        ("schedule", lambda s: with_row(s, "transformer_blocks.one.ff", "CRRRRR"), "transformer_blocks.one.ff"),
    ],
    "turns_begin_with_full_steps": [
        *(("schedule", lambda s, a=a: with_row(s, ATTN1, a + "RPCFR"), "step 0, the first of a turn") for a in "RPF"),
        ("relay", lambda s: with_row(s, ATTN0, "___RRR", "low"), "low does not compute"),
        ("relay", lambda s: edit(s, "low", stack="______", rows=dict.fromkeys(plan_of(s).rows, "______")),
         "low is never called"),
        *(("skipping", lambda s, a=a: edit(s, stack=a + ".S.-.", rows={site: "-" + row[1:] for site, row in
           plan_of(s).rows.items()}), "step 0, the first of a turn") for a in "S-"),
        ("relay", lambda s: with_two_turns(s, "CR__RC"), "high does not compute everything at step 4"),
        ("relay", lambda s: with_two_turns(s, "CR__-C", "..__S.", stack_forecasts=(Forecast((1,), (1.0,)),)),
         "everything at step 4"),
    ],
    "columns_agree": [
        ("skipping", lambda s: with_row(s, FF0, "C--C-R"), "- under a running stack at step 1"),
        ("skipping", lambda s: with_row(s, FF0, "CR-CRR"), "runs while the network is not called at step 4"),
        ("skipping", lambda s: with_row(s, ATTN0, "CRRC-R"), "other cells than a prefix of C under the S at step 2"),
        ("skipping", lambda s: with_row(with_row(s, ATTN0, "CR-C-R"), FF0, "CRCC-R"), "prefix of C under the S at step 2"),
        ("skipping", lambda s: with_row(s, FF0, "CR_C-R"), "mixes _ with other actions at step 2"),
        ("skipping", lambda s: edit(s, stack="..S.-_"), "mixes _ with other actions at step 5"),
    ],
    "one_transformer_a_step": [
        ("relay", lambda s: edit(s, "low", stack="__....", rows=dict.fromkeys(plan_of(s).rows, "__CCRR")),
         "2 transformers are called at step 2"),
        ("relay", lambda s: edit(s, "low", stack="____..", rows=dict.fromkeys(plan_of(s).rows, "____CR")),
         "0 transformers are called at step 3"),
    ],
    "prunes_have_their_k": [
        ("schedule", lambda s: with_k(s, "transformer_blocks.9.ff", 1), "unknown site transformer/transformer_blocks.9.ff"),
        ("schedule", lambda s: with_k(s, ATTN0), "1 P cells and 0 values of k"),
        ("schedule", lambda s: with_k(s, ATTN0, 4, 4), "1 P cells and 2 values of k"),
        *(("schedule", lambda s, k=k: with_k(s, ATTN0, k), "k outside 0…16") for k in (-1, 17, 4.0, True, "4")),
    ],
    "rule_goes_with_prunes": [
        ("schedule", lambda s: replace(s, token_rule=None), "P cells without a token rule"),
        ("skipping", lambda s: with_rule(s), "token rule without P cells"),
        ("schedule", lambda s: with_rule(s, base="loudest"), "token rule base 'loudest'"),
        ("schedule", lambda s: with_rule(s, age_weight=float("nan")), "no number"),
        ("schedule", lambda s: with_rule(s, bonus="1"), "no number"),
        ("schedule", lambda s: with_rule(s, age_period=float("inf")), "no number"),
        ("schedule", lambda s: with_rule(s, age_period=0.0), "not above 0"),
        ("schedule", lambda s: with_rule(s, bonus_grid=0), "not above 0"),
        ("schedule", lambda s: with_rule(s, bonus_grid=1.5), "not above 0"),
    ],
    "rules_have_what_they_observe": [
        ("schedule", lambda s: with_rule(s, base="cross_attention_entropy"), "no cross_attn site"),
        ("schedule", lambda s: edit(with_rule(s, base="value_norm"), fingerprint={"tokens":
         plan_of(s).fingerprint["tokens"]}), "no attn site"),
        ("schedule", lambda s: with_rule(replace(s, sampler=replace(s.sampler, guidance=Guidance("passes", 4.0))),
         share_halves=True), "guidance of form 'passes'"),
    ],
    "forecasts_have_sources": [
        ("schedule", lambda s: edit(s, forecasts=plan_of(s).forecasts | {"a.0.b": ()}), "unknown site transformer/a.0.b"),
        ("schedule", lambda s: edit(s, forecasts={}), "1 F cells and 0 forecasts"),
        ("schedule", lambda s: many_sources(s, 5), "5 sources"),
        ("relay", lambda s: with_two_turns(s, "CC__CF", forecasts=all_sites(1)), "step 5 from step 1, before its turn"),
        *(("schedule", lambda s, cell=cell: with_forecast(s, *cell), found) for *cell, found in [
            ((), (), "0 sources and 0 weights at step 4"),
            ((0, 3), (1.0,), "2 sources and 1 weights"),
            ((3, 3), (0.5, 0.5), "2 sources"),
            ((4,), (1.0,), "step 4 from step 4"),  # itself
            ((5,), (1.0,), "from step 5"),  # later
            ((1,), (1.0,), "from step 1"),  # an R
            ((2,), (1.0,), "from step 2"),  # a P
            ((-3,), (1.0,), "from step -3"),  # counts from the end: row[-3] is a C
            ((0.0,), (1.0,), "from step 0.0"),
            ((3,), (float("nan"),), "the weight nan"),
            ((3,), (float("inf"),), "the weight inf"),
            ((3,), ("1",), "the weight 1"),
            ((3,), (0.3333333,), "at most 6 significant digits"),
            ((3,), (-1234567.0,), "at most 6 significant digits"),
        ]),
    ],
    "stack_forecasts_have_sources": [
        *(("skipping", lambda s, source=source: skipped_later(s, source), f"step 5 from step {source}") for source in (2, 4)),
        ("relay", lambda s: with_two_turns(s, "CC__C-", "..__.S", stack_forecasts=(Forecast((4, 0), (1.5, -0.5)),)),
         "high/stack forecasts step 5 from step 0, before its turn"),
        *(("skipping", lambda s, cells=cells: edit(s, stack_forecasts=cells), found) for cells, found in [
            ((), "1 S cells and 0 forecasts"),
            ((Forecast((0,), (1.0,)), Forecast((0,), (1.0,))), "1 S cells and 2 forecasts"),
            ((Forecast((0,), (1.0,), "sum"),), "form 'sum'"),
            ((Forecast((2,), (1.0,)),), "step 2 from step 2"),
            ((Forecast((3,), (1.0,)),), "step 2 from step 3"),
            ((Forecast((), ()),), "0 sources"),
            ((Forecast((0, 1), (1.0,)),), "2 sources and 1 weights"),
            ((Forecast((1,), (0.1234567,)),), "at most 6 significant digits"),
        ]),
    ],
    "update_is_complete": [
        ("skipping", lambda s: replace(s, update=None), "no update"),
        ("skipping", lambda s: with_update(s, basis="noise"), "basis 'noise'"),
        ("skipping", lambda s: with_update(s, history=0), "history 0"),
        ("skipping", lambda s: with_update(s, history=9), "history 9"),
        ("skipping", lambda s: with_update(s, initial=(0.0,) * 5), "5 weights of the first latents for 6 steps"),
        ("skipping", lambda s: with_update(s, initial=(0.1234567891,) * 6), "at most 9 significant digits"),
        ("skipping", lambda s: with_update(s, history=3), "6 rows of 4"),
        ("skipping", lambda s: with_update(s, coefficients=s.update.coefficients[1:]), "6 rows of 3"),
        ("skipping", lambda s: with_coefficient(s, 3, 0, float("nan")), "no number of at most 9 significant digits"),
        ("skipping", lambda s: with_coefficient(s, 3, 0, "1"), "no number of at most 9 significant digits"),
        ("skipping", lambda s: with_coefficient(s, 3, 1, 0.1234567891), "at most 9 significant digits"),
        ("skipping", lambda s: with_coefficient(s, 0, 2, 0.1), "step 0 that weighs outputs that do not exist yet"),
        ("skipping", without_network_at_1, "step 1 that weighs outputs that do not exist yet"),
    ],
    "times_keep_the_order": [
        ("skipping", lambda s: with_update(s, times=(1,)), "1 network times for 6 steps"),
        ("skipping", lambda s: with_time(s, 1, float("inf")), "one that is no number"),
        ("skipping", lambda s: with_time(s, 0, 1000.5), "network time 1000.5 at step 0, outside 0…1000"),
        ("skipping", lambda s: with_time(without_trained(s), 0, 1.002 * s.sampler.timesteps[0]), "at step 0, outside 0…"),
        ("skipping", lambda s: with_time(s, 5, -0.5), "network time -0.5 at step 5, outside"),
        ("skipping", lambda s: with_time(s, 1, s.sampler.timesteps[0] + 0.5), "at step 1, at or after that of another"),
        ("skipping", lambda s: with_time(s, 1, s.sampler.timesteps[4]), "at step 1, at or after that of another"),
        ("skipping", lambda s: with_time(s, 4, s.sampler.timesteps[4] - 0.5), "at step 4, at which no network is called"),
        ("relay", lambda s: crossing(s), "at which another transformer begins, step 3"),
    ],
}  # fmt: skip
LEGAL = {  # near the limit of a rule -> (fixture, change)
    "another call of a module shares its tokens": ("schedule", lambda s: with_row(s, FF1 + "#1", "CRRRRR")),
    "a longer prefix of C under an S": ("skipping", lambda s: with_row(s, FF0, "CRCC-R")),
    "another turn of a transformer": ("relay", with_two_turns),
    "a forecast within that turn": ("relay", lambda s: with_two_turns(s, "CC__CF", forecasts=all_sites(4))),
    "a skipped stack within that turn": (
        "relay",
        lambda s: with_two_turns(s, "CC__C-", "..__.S", stack_forecasts=(Forecast((4,), (1.0,)),)),
    ),
    "no token": ("schedule", lambda s: with_k(s, ATTN0, 0)),
    "all tokens": ("schedule", lambda s: with_k(s, ATTN0, 16)),
    "four sources": ("schedule", lambda s: many_sources(s, 4)),
    "a stack forecast from a step of R": ("skipping", lambda s: edit(s, stack_forecasts=(Forecast((1,), (1.0,)),))),
    "a later stack forecast": ("skipping", lambda s: skipped_later(s, 3)),
    "an update without skipped steps": ("skipping", lambda s: with_update(s, basis="data")),
    "times between the sampler's": ("skipping", lambda s: with_time(s, 1, s.sampler.timesteps[1] + 0.5)),
    "one output after a skipped step": ("skipping", lambda s: with_coefficient(without_network_at_1(s), 1, 2, 0.0)),
    "the output of a skipped stack": (
        "skipping",
        lambda s: without_network_at_1(s, stack=".S..-.", stack_forecasts=(Forecast((0,), (1.0,)),)),
    ),
}


@pytest.mark.parametrize(
    ("rule", "name", "change", "found"), [(rule, *case) for rule, cases in BROKEN.items() for case in cases]
)
def test_a_schedule_that_breaks_one_rule_is_refused_by_that_rule(request, rule, name, change, found):
    with pytest.raises(IllegalScheduleError) as caught:
        rules.verify(change(request.getfixturevalue(name)))
    message = str(caught.value)
    assert found in message
    assert [r.__name__ for r in rules.RULES if r.__doc__ in message] == [rule]


@pytest.mark.parametrize("case", LEGAL)
def test_a_schedule_at_the_limit_of_a_rule_is_legal(request, case):
    name, change = LEGAL[case]
    rules.verify(change(request.getfixturevalue(name)))


def test_legal_schedules_pass_every_rule(schedule, skipping, relay):
    for legal in (schedule, skipping, relay):
        assert [list(rule(legal)) for rule in rules.RULES] == [[]] * len(rules.RULES)


def test_every_rule_has_a_line_of_its_own_and_an_example():
    docs = [rule.__doc__ for rule in rules.RULES]
    assert len(set(docs)) == len(docs) == 12
    assert all(doc and "\n" not in doc for doc in docs)
    assert {rule.__name__ for rule in rules.RULES} == set(BROKEN)


@settings(max_examples=60)
@given(st.data())
def test_a_changed_cell_is_legal_or_refused(data):
    """Never another exception, whatever letter is put into whatever row; what is legal can be written and read."""
    schedule = data.draw(legal_schedules())
    name, plan = data.draw(st.sampled_from(sorted(schedule.transformers.items(), key=lambda item: item[0])))
    key = data.draw(st.sampled_from([*plan.rows, "stack"]))
    row, step = plan.rows.get(key, plan.stack), data.draw(st.integers(0, schedule.steps - 1))
    row = row[:step] + data.draw(st.sampled_from(".CRFPS-_X")) + row[step + 1 :]
    changes = {"stack": row} if key == "stack" else {"rows": plan.rows | {key: row}}
    changed = edit(schedule, name, **changes)
    try:
        rules.verify(changed)
    except IllegalScheduleError:
        return
    assert schedule_from_json(json.loads(json.dumps(schedule_to_json(changed))), "") == changed


# ---- whose attention a token rule reads, and at which steps ------------------------------------------------------------

KINDS = {"b.attn1": "attn", "b.attn2": "cross_attn", "b.ff": "mlp"}
SITES = ("b.0.attn1", "b.0.attn2", "b.0.ff")


def plan(*rows: str, k: dict[str, tuple[int, ...]]) -> Plan:
    fingerprint = {"tokens": dict.fromkeys(KINDS, 16), "kinds": KINDS}
    return Plan("X", fingerprint, dict(zip(SITES, rows, strict=True)), "." * len(rows[0]), k)


def test_the_source_is_the_attention_of_the_same_block():
    p = plan("C", "C", "C", k={})
    assert source_of(p, "b.0.ff", "attention_received") == "b.0.attn1"
    assert source_of(p, "b.0.ff", "cross_attention_entropy") == "b.0.attn2"
    assert source_of(p, "b.0.attn2", "cross_attention_entropy") == "b.0.attn2"
    assert source_of(p, "b.1.ff", "value_norm") is None


def test_only_what_is_read_is_observed():
    p = plan("CCRCRC", "CCRCRC", "CPRCPC", k={SITES[2]: (4, 4)})
    # the P of step 1 reads the attention computed in the same step, the P of step 4 that of step 3
    assert observed_steps(p, "attention_received") == {SITES[0]: frozenset({1, 3})}


def test_a_site_that_reads_its_own_attention_reads_it_before_it_is_taken_anew():
    p = plan("CRRRRR", "CPRPCR", "CCCCCC", k={SITES[1]: (4, 4)})
    # step 1 reads step 0; its own 4 rows, new at step 1, are read at step 3; nothing reads those of steps 3 and 4
    assert observed_steps(p, "cross_attention_entropy") == {SITES[1]: frozenset({0, 1})}


def test_rows_of_the_same_step_are_read_by_later_sites():
    p = plan("CRRRRR", "CPRPRR", "CPRPRR", k={SITES[1]: (4, 4), SITES[2]: (4, 4)})
    assert observed_steps(p, "cross_attention_entropy") == {SITES[1]: frozenset({0, 1, 3})}


def test_no_tokens_and_all_tokens_need_no_choice():
    p = plan("CRRR", "CRRR", "CPPR", k={SITES[2]: (0, 16)})
    assert observed_steps(p, "attention_received") == {SITES[0]: frozenset()}
    assert observed_steps(p, "feature_mean") == observed_steps(p, "random") == {}
