"""Whose attention a token rule reads, and when it has to be looked at."""

from __future__ import annotations

from sodaprof.formats.rules import observed_steps, source_of
from sodaprof.formats.schedule import Plan

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
    # step 1 reads step 0; its own 4 rows, new at step 1, are read at step 3; nobody reads those of steps 3 and 4
    assert observed_steps(p, "cross_attention_entropy") == {SITES[1]: frozenset({0, 1})}


def test_rows_of_the_same_step_are_read_by_later_sites():
    p = plan("CRRRRR", "CPRPRR", "CPRPRR", k={SITES[1]: (4, 4), SITES[2]: (4, 4)})
    assert observed_steps(p, "cross_attention_entropy") == {SITES[1]: frozenset({0, 1, 3})}


def test_no_tokens_and_all_tokens_need_no_choice():
    p = plan("CRRR", "CRRR", "CPPR", k={SITES[2]: (0, 16)})
    assert observed_steps(p, "attention_received") == {SITES[0]: frozenset()}
    assert observed_steps(p, "feature_mean") == observed_steps(p, "random") == {}
