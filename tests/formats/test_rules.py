"""Each rule of the format: a legal schedule passes, each way to break the rule is refused by that rule and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from sodaprof.errors import IllegalScheduleError
from sodaprof.formats import rules as legal
from sodaprof.formats.schedule import Forecast, Plan, Schedule, TokenRule

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


def with_stack_forecast(schedule: Schedule, *cells: Forecast) -> Schedule:
    return edit(schedule, stack_forecasts=cells)


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


def refused(schedule: Schedule, rule: Callable[..., Any], found: str) -> None:
    """Asserts that `rule`, and only it, is what verify names, and that the message says what was found."""
    with pytest.raises(IllegalScheduleError) as caught:
        legal.verify(schedule)
    message = str(caught.value)
    assert rule.__doc__ in message
    assert found in message
    assert [r.__name__ for r in legal.RULES if r.__doc__ in message] == [rule.__name__]


def test_legal_schedules_pass(schedule, skipping, relay):
    for legal_one in (schedule, skipping, relay):
        legal.verify(legal_one)
        assert [list(rule(legal_one)) for rule in legal.RULES] == [[]] * len(legal.RULES)


def test_every_rule_has_a_line_of_its_own():
    docs = [rule.__doc__ for rule in legal.RULES]
    assert len(set(docs)) == len(docs) == 12
    assert all(doc and "\n" not in doc for doc in docs)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda s: replace(s, transformers={}), "no transformer"),
        (lambda s: edit(s, rows={}), "has no rows"),
        (lambda s: with_row(s, FF1, "CPRCF"), "5 characters for 6 steps"),
        (lambda s: with_row(s, FF1, "CPRCFRR"), "7 characters for 6 steps"),
        (lambda s: with_row(s, FF1, "CPRCFX"), "holds 'X'"),
        (lambda s: with_row(s, FF1, "CPRCF."), "holds '.'"),
        (lambda s: edit(s, stack="....."), "5 characters for 6 steps"),
        (lambda s: edit(s, stack=".....C"), "holds 'C'"),
    ],
)
def test_rows_have_one_character_a_step(schedule, broken, found):
    refused(broken(schedule), legal.rows_have_one_character_a_step, found)


@pytest.mark.parametrize(
    "tokens",
    [
        {"transformer_blocks.attn1": 16},
        {"transformer_blocks.attn1": 16, "transformer_blocks.ff": 0},
        {"transformer_blocks.attn1": 16, "transformer_blocks.ff": "16"},
        None,
    ],
)
def test_sites_are_known_to_the_fingerprint(schedule, tokens):
    broken = edit(schedule, fingerprint={"layers": 2, "tokens": tokens})
    refused(broken, legal.sites_are_known_to_the_fingerprint, "no tokens in the fingerprint")


def test_a_site_key_must_be_a_module_path(schedule):
    refused(with_row(schedule, "ff", "CRRRRR"), legal.sites_are_known_to_the_fingerprint, "transformer/ff")


def test_a_second_call_shares_the_tokens_of_its_module(schedule):
    legal.verify(with_row(schedule, FF1 + "#1", "CRRRRR"))


@pytest.mark.parametrize("action", "RPF")
def test_first_step_computes(schedule, action):
    refused(with_row(schedule, ATTN1, action + "RPCFR"), legal.first_step_computes, "first step 0")


def test_first_step_of_the_second_transformer_computes(relay):
    refused(with_row(relay, ATTN0, "___RRR", "low"), legal.first_step_computes, "low does not compute")
    never = edit(relay, "low", stack="______", rows=dict.fromkeys(relay.transformers["low"].rows, "______"))
    refused(never, legal.first_step_computes, "low is never called")


def test_first_step_is_not_skipped(skipping):
    rows = {site: "-" + row[1:] for site, row in plan_of(skipping).rows.items()}
    for action in "S-":
        refused(edit(skipping, stack=action + ".S.-.", rows=rows), legal.first_step_computes, "first step 0")


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda s: with_row(s, FF0, "C--C-R"), "- under a running stack at step 1"),
        (lambda s: with_row(s, FF0, "CR-CRR"), "at work while the network is not called at step 4"),
        (lambda s: with_row(s, ATTN0, "CRRC-R"), "other cells than a prefix of C under the S at step 2"),
        (lambda s: with_row(with_row(s, ATTN0, "CR-C-R"), FF0, "CRCC-R"), "prefix of C under the S at step 2"),
        (lambda s: with_row(s, FF0, "CR_C-R"), "mixes _ with other actions at step 2"),
        (lambda s: edit(s, stack="..S.-_"), "mixes _ with other actions at step 5"),
    ],
)
def test_columns_agree(skipping, broken, found):
    refused(broken(skipping), legal.columns_agree, found)


def test_a_longer_prefix_of_computed_sites_under_a_skip_is_legal(skipping):
    legal.verify(with_row(skipping, FF0, "CRCC-R"))


def test_one_transformer_a_step(relay):
    plan = relay.transformers["low"]
    both = edit(relay, "low", stack="__....", rows=dict.fromkeys(plan.rows, "__CCRR"))
    refused(both, legal.one_transformer_a_step, "2 transformers are at work at step 2")
    none = edit(relay, "low", stack="____..", rows=dict.fromkeys(plan.rows, "____CR"))
    refused(none, legal.one_transformer_a_step, "0 transformers are at work at step 3")


def again(relay: Schedule, high: str = "CR__CR", stack: str = "..__..", **changes: Any) -> Schedule:
    """Returns a schedule in which `high` has the first and the last two steps, `low` those between."""
    keys = relay.transformers["low"].rows
    between = edit(relay, "low", stack="__..__", rows=dict.fromkeys(keys, "__CR__"))
    return edit(between, "high", stack=stack, rows=dict.fromkeys(keys, high), **changes)


def forecasts(source: int) -> dict[str, tuple[Forecast, ...]]:
    return dict.fromkeys((ATTN0, FF0, ATTN1, FF1), (Forecast((source,), (1.0,)),))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"high": "CR__RC"}, "high does not compute everything at step 4"),
        ({"high": "CR__-C", "stack": "..__S.", "stack_forecasts": (Forecast((1,), (1.0,)),)}, "everything at step 4"),
        ({"high": "CC__CF", "forecasts": forecasts(1)}, "forecasts step 5 from before step 4"),
        (
            {"high": "CC__C-", "stack": "..__.S", "stack_forecasts": (Forecast((4, 0), (1.5, -0.5)),)},
            "high/stack forecasts step 5 from before step 4",
        ),
    ],
)
def test_turns_begin_anew(relay, changes, found):
    refused(again(relay, **changes), legal.turns_begin_anew, found)


def test_within_a_turn_that_comes_again_all_is_as_ever(relay):
    legal.verify(again(relay))
    legal.verify(again(relay, "CC__CF", forecasts=forecasts(4)))
    legal.verify(again(relay, "CC__C-", "..__.S", stack_forecasts=(Forecast((4,), (1.0,)),)))


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda s: with_k(s, "transformer_blocks.9.ff", 1), "unknown site transformer/transformer_blocks.9.ff"),
        (lambda s: with_k(s, ATTN0), "1 P cells and 0 values of k"),
        (lambda s: with_k(s, ATTN0, 4, 4), "1 P cells and 2 values of k"),
        (lambda s: edit(s, k={}), "1 P cells and 0 values of k"),
        (lambda s: with_k(s, ATTN0, -1), "k outside 0…16"),
        (lambda s: with_k(s, ATTN0, 17), "k outside 0…16"),
        (lambda s: with_k(s, ATTN0, 4.0), "k outside 0…16"),
        (lambda s: with_k(s, ATTN0, True), "k outside 0…16"),
        (lambda s: with_k(s, ATTN0, "4"), "k outside 0…16"),
    ],
)
def test_prunes_have_their_k(schedule, broken, found):
    refused(broken(schedule), legal.prunes_have_their_k, found)


@pytest.mark.parametrize("k", [0, 16])
def test_the_ends_of_k_are_legal(schedule, k):
    legal.verify(with_k(schedule, ATTN0, k))


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda s: replace(s, token_rule=None), "P cells without a token rule"),
        (lambda s: with_rule(s, base="loudest"), "token rule base 'loudest'"),
        (lambda s: with_rule(s, age_weight=float("nan")), "no number"),
        (lambda s: with_rule(s, bonus="1"), "no number"),
        (lambda s: with_rule(s, age_period=float("inf")), "no number"),
        (lambda s: with_rule(s, age_period=0.0), "not above 0"),
        (lambda s: with_rule(s, bonus_grid=0), "not above 0"),
        (lambda s: with_rule(s, bonus_grid=1.5), "not above 0"),
    ],
)
def test_rule_goes_with_prunes(schedule, broken, found):
    refused(broken(schedule), legal.rule_goes_with_prunes, found)


def test_a_token_rule_without_prunes_is_refused(skipping):
    refused(with_rule(skipping), legal.rule_goes_with_prunes, "token rule without P cells")


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda s: with_rule(s, base="cross_attention_entropy"), "no cross_attn site"),
        (lambda s: edit(with_rule(s, base="value_norm"), fingerprint={"tokens": plan_of(s).fingerprint["tokens"]}),
         "no attn site"),
        (lambda s: with_rule(replace(s, sampler=replace(s.sampler, guidance_form="passes")), share_halves=True),
         "guidance of form 'passes'"),
    ],
)  # fmt: skip
def test_rules_have_what_they_observe(schedule, broken, found):
    refused(broken(schedule), legal.rules_have_what_they_observe, found)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda s: edit(s, forecasts=plan_of(s).forecasts | {"a.0.b": ()}), "unknown site transformer/a.0.b"),
        (lambda s: edit(s, forecasts={}), "1 F cells and 0 forecasts"),
        (lambda s: with_forecast(s, (), ()), "0 sources and 0 weights at step 4"),
        (lambda s: with_forecast(s, (0, 3), (1.0,)), "2 sources and 1 weights"),
        (lambda s: with_forecast(s, (3, 3), (0.5, 0.5)), "2 sources"),
        (lambda s: with_forecast(s, (4,), (1.0,)), "step 4 from step 4"),  # itself
        (lambda s: with_forecast(s, (5,), (1.0,)), "from step 5"),  # later
        (lambda s: with_forecast(s, (1,), (1.0,)), "from step 1"),  # an R
        (lambda s: with_forecast(s, (2,), (1.0,)), "from step 2"),  # a P
        (lambda s: with_forecast(s, (-3,), (1.0,)), "from step -3"),  # counts from the end: row[-3] is a C
        (lambda s: with_forecast(s, (0.0,), (1.0,)), "from step 0.0"),
        (lambda s: with_forecast(s, (3,), (float("nan"),)), "the weight nan"),
        (lambda s: with_forecast(s, (3,), (float("inf"),)), "the weight inf"),
        (lambda s: with_forecast(s, (3,), ("1",)), "the weight 1"),
        (lambda s: with_forecast(s, (3,), (0.3333333,)), "more than 6 significant digits"),
        (lambda s: with_forecast(s, (3,), (1 / 3,)), "more than 6 significant digits"),
        (lambda s: with_forecast(s, (3,), (-1234567.0,)), "more than 6 significant digits"),
    ],
)
def test_forecasts_have_sources(schedule, broken, found):
    refused(broken(schedule), legal.forecasts_have_sources, found)


@pytest.mark.parametrize("count", [4, 5])
def test_at_most_four_sources(schedule, count):
    rows = dict.fromkeys(plan_of(schedule).rows, "CCCCCF")
    cell = Forecast(tuple(range(count)), (1e-7,) * count)
    many = replace(edit(schedule, rows=rows, k={}, forecasts=dict.fromkeys(rows, (cell,))), token_rule=None)
    if count == 4:
        legal.verify(many)
    else:
        refused(many, legal.forecasts_have_sources, "5 sources")


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        ((), "1 S cells and 0 stack forecasts"),
        ((Forecast((0,), (1.0,)), Forecast((0,), (1.0,))), "1 S cells and 2 stack forecasts"),
        ((Forecast((0,), (1.0,), "sum"),), "form 'sum'"),
        ((Forecast((2,), (1.0,)),), "step 2 from step 2"),
        ((Forecast((3,), (1.0,)),), "step 2 from step 3"),
        ((Forecast((), ()),), "0 sources"),
        ((Forecast((0, 1), (1.0,)),), "2 sources and 1 weights"),
        ((Forecast((1,), (0.1234567,)),), "more than 6 significant digits"),
    ],
)
def test_stack_forecasts_have_sources(skipping, cells, found):
    refused(with_stack_forecast(skipping, *cells), legal.stack_forecasts_have_sources, found)


def test_both_forms_of_stack_forecast_are_legal_from_steps_that_reuse(skipping):
    """The hidden state is written at every step whose last block runs, also when that step is all R."""
    for form in ("output", "drift"):
        legal.verify(with_stack_forecast(skipping, Forecast((1,), (1.0,), form)))


@pytest.mark.parametrize("source", [2, 4])
def test_a_skipped_step_is_no_source_of_a_stack_forecast(skipping, source):
    rows = {site: row[:5] + "-" for site, row in plan_of(skipping).rows.items()}
    later = edit(skipping, stack="..S.-S", rows=rows)
    first = plan_of(skipping).stack_forecasts[0]
    legal.verify(with_stack_forecast(later, first, Forecast((3,), (1.0,))))
    refused(
        with_stack_forecast(later, first, Forecast((source,), (1.0,))),
        legal.stack_forecasts_have_sources,
        f"step 5 from step {source}",
    )


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda s: replace(s, update=None), "no update"),
        (lambda s: with_update(s, basis="noise"), "basis 'noise'"),
        (lambda s: with_update(s, history=0), "history 0"),
        (lambda s: with_update(s, history=5), "history 5"),
        (lambda s: with_update(s, history=3), "6 rows of 4"),
        (lambda s: with_update(s, coefficients=s.update.coefficients[1:]), "6 rows of 3"),
        (lambda s: with_coefficient(s, 3, 0, float("nan")), "no number of at most 9 significant digits"),
        (lambda s: with_coefficient(s, 3, 0, "1"), "no number of at most 9 significant digits"),
        (lambda s: with_coefficient(s, 3, 1, 0.1234567891), "at most 9 significant digits"),
        (lambda s: with_coefficient(s, 0, 2, 0.1), "an update at step 0 that weighs outputs that do not exist yet"),
    ],
)
def test_update_is_complete(skipping, broken, found):
    refused(broken(skipping), legal.update_is_complete, found)


def test_a_step_without_network_adds_no_output(skipping):
    """After steps 0 (.), 1 (-): one output exists, so the second coefficient of step 1 must be 0, that of 2 need not."""
    rows = dict.fromkeys(plan_of(skipping).rows, "C-CR-R")
    moved = edit(skipping, stack=".-..-.", rows=rows, stack_forecasts=())
    refused(moved, legal.update_is_complete, "step 1 that weighs outputs that do not exist yet")
    legal.verify(with_coefficient(moved, 1, 2, 0.0))


def test_a_skipped_stack_adds_an_output(skipping):
    """The forecast output of an S step is an output like any other: step 1 may weigh two."""
    rows = dict.fromkeys(plan_of(skipping).rows, "C-CR-R")
    forecast = Forecast((0,), (1.0,))
    legal.verify(edit(skipping, stack=".S..-.", rows=rows, stack_forecasts=(forecast,)))


def test_an_update_goes_with_any_columns(schedule, skipping):
    legal.verify(replace(schedule, update=skipping.update))
    legal.verify(replace(schedule, update=replace(skipping.update, basis="data")))
