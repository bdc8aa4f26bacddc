"""Token rules by hand: what a token scores, and which ones are chosen."""

from __future__ import annotations

import math

import pytest
import torch

from sodaprof.formats.schedule import TokenRule
from sodaprof.opensora.layers import SelfAttention
from sodaprof.pipelines.attention import AttentionCall
from sodaprof.runtime.hooks.tokens import (
    base_score,
    feature_mean,
    mean_attention,
    random_scores,
    statistic,
    top,
    with_age,
    with_bonus,
)

S1, S2, VALUES = TokenRule("attention_received"), TokenRule("cross_attention_entropy"), TokenRule("value_norm")
SHARED = {rule.base: TokenRule(rule.base, share_halves=True) for rule in (S2, VALUES)}


def t(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)


def call_of(weights=None, v=None):
    """Returns an attention with these weights [B, N, L], or with these values [B, H, N, d]."""
    if weights is None:
        return AttentionCall(v, v, v, None, None)
    keys = torch.eye(weights.shape[-1], dtype=weights.dtype).expand(len(weights), 1, -1, -1)
    return AttentionCall(weights.log().clamp_min(-10_000)[:, None], keys, keys, None, 1.0)


def plogp(*shares: float) -> float:
    """−Σ p log(p + 1e-7)."""
    return -sum(p * math.log(p + 1e-7) for p in shares)


# ---- statistics of an attention ---------------------------------------------------------------------------------------


def test_feature_mean():
    assert feature_mean(t([[1, -3], [0, 1]])).tolist() == [[2, 0.5]]


def test_attention_received_is_summed_over_queries():
    """Columns, not rows: each row is one query's and sums to 1."""
    received = statistic(S1, call_of(t([[0.5, 0.5, 0], [0.25, 0.5, 0.25], [0, 0.5, 0.5]])))
    close(received, t([0.75, 1.5, 0.75]))
    close(base_score(S1, received), t([1, 2, 1]) / math.sqrt(6))


def test_attention_is_averaged_over_heads():
    """Two heads of width 1 and two keys; logits log 3 and 0 give 3/4 and 1/4, equal ones a half each."""
    q = t([[[math.log(3)]], [[0.0]]])  # [1, H = 2, N = 1, d = 1]
    k = t([[[1.0], [0.0]], [[1.0], [0.0]]])
    close(mean_attention(q, k), t([[0.625, 0.375]]))
    close(mean_attention(q * 2, k, scale=0.5), t([[0.625, 0.375]]))
    shared = t([[[1.0]], [[1.0]], [[1.0]], [[1.0]]]), t([[[0.0], [0.0]], [[math.log(3)], [0.0]]])  # fewer heads of keys
    close(mean_attention(*shared), t([[0.625, 0.375]]))


def test_attention_is_divided_by_the_root_of_the_head_width():
    q, k = t([[[2 * math.log(3), 0, 0, 0]]]), t([[[1, 0, 0, 0], [0, 0, 0, 0]]])
    close(mean_attention(q, k), t([[0.75, 0.25]]))


@pytest.mark.parametrize("mask", [
    torch.tensor([[[[True, True, False]]]]),  # [B, 1, 1, L]
    torch.tensor([[[[0, 0, -10_000.0]]]]).double().expand(1, 2, 1, 3),  # added, one a head
    torch.tensor([[[0, 0, -10_000.0]]]).double(),
])  # fmt: skip
def test_masked_text_has_no_share(mask):
    q, k = t([[[0.0]], [[0.0]]]), t([[[1.0], [0.0], [5.0]]] * 2)
    assert mean_attention(q, k, mask).tolist() == [[[0.5, 0.5, 0]]]


def test_statistics_are_in_single_precision_at_least():
    x = torch.ones(1, 2, 3, 4, dtype=torch.bfloat16)
    assert {statistic(rule, call_of(v=x)).dtype for rule in (S1, S2, VALUES)} == {torch.float32}


def test_values_count_by_their_length_in_each_head():
    """3-4-5 in one head, 0 in the other: (1 − 5) + (1 − 0); not the length of both together."""
    found = statistic(VALUES, call_of(v=t([[[3.0, 4.0], [0.6, 0.8]], [[0.0, 0.0], [0.3, 0.4]]])))
    close(found, t([-3, 0.5]))
    close(base_score(VALUES, found), t([-3, 0.5]) / math.sqrt(9.25))


def test_values_over_frames_are_in_the_order_of_the_tokens():
    """Called a place at a time on its frames, the module brings values into frame-major order."""
    of_place = torch.tensor([[0, 10, 20], [1, 11, 21], [2, 12, 22], [3, 13, 23]])  # 4 places of 3 frames, one sample
    over_frames, in_frames = (SelfAttention(8, 2, True, temporal) for temporal in (True, False))
    wanted = [[0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]]
    assert over_frames.by_sample(of_place, 1).tolist() == wanted
    assert in_frames.by_sample(of_place.T, 1).tolist() == wanted
    two = over_frames.by_sample(torch.cat((of_place, of_place + 100)), 2)
    assert two.tolist() == [wanted[0], [i + 100 for i in wanted[0]]]


# ---- text, and halves that share scores -------------------------------------------------------------------------------


def test_entropy():
    found = statistic(S2, call_of(t([[0.5, 0.5, 0], [1, 0, 0], [0.25, 0.25, 0.5]])))
    close(found, t([plogp(0.5, 0.5), plogp(1), plogp(0.25, 0.25, 0.5)]))
    assert found[0, 1].item() == pytest.approx(-1e-7, rel=1e-6)  # log(1 + 1e-7), not 0
    scores = [1 + plogp(0.5, 0.5), 1 + plogp(1), 1 + plogp(0.25, 0.25, 0.5)]
    close(base_score(S2, found), t(scores) / math.hypot(*scores))


def test_shared_entropy_is_of_both_texts_in_a_row():
    """One sample, two tokens. Neither the entropy of the mean of both maps nor one a half."""
    rule = SHARED["cross_attention_entropy"]
    maps = t([[0.5, 0.5], [1, 0]], [[0.25, 0.75], [0.5, 0.5]])
    wide = [1 + plogp(0.25, 0.25, 0.125, 0.375), 1 + plogp(0.5, 0, 0.25, 0.25)]
    close(base_score(rule, statistic(rule, call_of(maps))), t(wide, wide) / math.hypot(*wide))


def test_halves_share_with_their_own_sample():
    """Two samples, [half, half]: sample 0 is rows 0 and 2, sample 1 rows 1 and 3."""
    values = t([-3, 1], [0, 2], [-1, 1], [4, 2])
    score = base_score(SHARED["value_norm"], values)
    close(score, t([-2 / math.sqrt(5), 1 / math.sqrt(5)], [1 / math.sqrt(2)] * 2).repeat(2, 1))
    alone = base_score(VALUES, values)
    close(alone[0], t(-3 / math.sqrt(10), 1 / math.sqrt(10)))
    assert not torch.equal(alone[0], alone[2])


def test_scores_of_nothing_are_0():
    assert base_score(VALUES, torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


# ---- age, bonus, choice -----------------------------------------------------------------------------------------------


def test_age():
    rule = TokenRule("attention_received", age_weight=0.25, age_period=2.0)
    age = torch.tensor([[0.0, 1.0, 4.0]])
    assert with_age(rule, t([0.5, 0.5, 0.5]), age).tolist() == [[0.5, 0.625, 1.0]]
    assert with_age(rule, t([0, 0, 0], [1, 1, 1]), age).tolist() == [[0, 0.125, 0.5], [1, 1.125, 1.5]]
    assert with_age(rule, torch.zeros(1, 3, dtype=torch.float16), age).dtype == torch.float32


def test_the_largest_of_a_block_gets_a_bonus():
    """4 x 4 tokens, blocks of 2 x 2; the winners are tokens 5, 2, 8 and 15."""
    score = t([
        0, 1, 9, 3,
        2, 4, 1, 5,
        8, 0, 1, 2,
        1, 7, 3, 4,
    ])  # fmt: skip
    wanted = t([
        0, 1, 18, 3,
        2, 8, 1, 5,
        16, 0, 1, 2,
        1, 7, 3, 8,
    ])  # fmt: skip
    assert torch.equal(with_bonus(score, 1.0, 2, (4, 4)), wanted)
    assert torch.equal(with_bonus(score, 0.5, 4, (4, 4)).argmax(), torch.tensor(2))
    assert (with_bonus(score, 0.5, 4, (4, 4)) != score).sum() == 1
    assert torch.equal(with_bonus(score, 1.0, 1, (4, 4)), 2 * score)


def test_blocks_of_a_raster_that_is_no_square():
    """2 rows of 4: the left block holds tokens 0, 1, 4 and 5."""
    score = t([1, 2, 1, 1, 1, 1, 3, 1], [0, 0, 0, 5, 7, 0, 0, 0])
    wanted = t([1, 3, 1, 1, 1, 1, 4.5, 1], [0, 0, 0, 7.5, 10.5, 0, 0, 0])
    assert torch.equal(with_bonus(score, 0.5, 2, (2, 4)), wanted)


def test_the_bonus_of_negative_scores_is_a_penalty():
    """The winner of the block may fall behind the others."""
    score = t([-1.0, -1.25, -2.0, -3.0])
    boosted = with_bonus(score, 0.5, 2, (2, 2))
    assert boosted.tolist() == [[-1.5, -1.25, -2.0, -3.0]]
    assert top(score, 1).tolist() == [[0]]
    assert top(boosted, 1).tolist() == [[1]]


def test_scores_given_are_left_as_they_are():
    score = t([1, 2, 3, 4])
    with_bonus(score, 1.0, 2, (2, 2))
    with_age(TokenRule("random", age_weight=1.0), score, torch.ones(1, 4))
    assert score.tolist() == [[1, 2, 3, 4]]


def test_the_chosen_are_in_ascending_order():
    chosen = top(t([0.1, 0.9, 0.5, 0.7], [4, 3, 2, 1]), 2)
    assert chosen.tolist() == [[1, 3], [0, 1]]
    assert chosen.dtype == torch.int64
    assert top(t([1, 2, 3]), 3).tolist() == [[0, 1, 2]]


# ---- random -----------------------------------------------------------------------------------------------------------


def test_random_scores_are_the_same_each_time():
    found = random_scores(7, "blocks.0.ff", 3, 50)
    assert found.shape == (1, 50)
    assert ((found >= 0) & (found < 1)).all()
    torch.manual_seed(0)
    assert torch.equal(random_scores(7, "blocks.0.ff", 3, 50), found)
    state = torch.get_rng_state()
    random_scores(7, "blocks.0.ff", 4, 50)
    assert torch.equal(torch.get_rng_state(), state)  # the pipeline's own draws are left alone


@pytest.mark.parametrize("other", [(8, "blocks.0.ff", 3), (7, "blocks.1.ff", 3), (7, "blocks.0.ff", 4)], ids=str)
def test_random_scores_differ_by_seed_site_and_step(other):
    found = random_scores(7, "blocks.0.ff", 3, 50)
    changed = random_scores(*other, 50)
    assert abs(torch.corrcoef(torch.cat((found, changed)))[0, 1]) < 0.5


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32, 2**63])
def test_random_scores_of_any_seed(seed):
    assert not torch.equal(random_scores(seed, "blocks.0.ff", 3, 50), random_scores(0, "blocks.0.ff", 3, 50))
