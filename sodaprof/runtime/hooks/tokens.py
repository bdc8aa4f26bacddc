"""Token rules: which k tokens a pruned site recomputes. Pure functions of tensors.

B: samples, both guidance halves in one batch as [half, half]; N: tokens; H: heads; L: text tokens; d: width of a head.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedModelError
from ...formats.schedule import TokenRule
from ...pipelines.attention import AttentionCall, record_attention


def feature_mean(cache: Tensor) -> Tensor:
    """Returns score_i = (1/D) Σ_d |cache[i, d]| for each token: cache [B, N, D] -> [B, N] (SODA, UAS)."""
    return cache.abs().mean(-1)


def random_scores(seed: int, site: str, step: int, tokens: int) -> Tensor:
    """Returns scores [1, N] uniform in [0, 1), the same for all samples, so that none depends on its batch."""
    key = zlib.crc32(f"{seed}:{site}@{step}".encode())  # torch uses 32 bits of a seed
    return torch.rand(1, tokens, generator=torch.Generator().manual_seed(key))


def mean_attention(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Returns softmax(q kᵀ · scale + mask) averaged over heads: [B, H, N, d], [B, H, M, d] -> [B, N, M].

    In fp32 or wider, one head at a time: a map of all heads would be the largest tensor of many models.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide, heads = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    total = torch.zeros(1, dtype=wide, device=q.device)
    for head in range(heads):
        scores = (q[:, head].to(wide) * scale) @ k[:, head * k.shape[1] // heads].to(wide).transpose(1, 2)
        if mask is not None:
            own = mask if mask.ndim < 4 else mask[:, head if mask.shape[1] > 1 else 0]
            scores = scores.masked_fill(~own, float("-inf")) if own.dtype == torch.bool else scores + own
        total = total + scores.softmax(-1)
    return total / heads


def base_score(rule: TokenRule, statistic: Tensor) -> Tensor:
    """Returns the base scores [B, N], of L2 norm 1 over the tokens, from the statistic [B, N].

    With shared halves both have the same scores: from the sum of their entropies, or the mean of other statistics.
    """
    if rule.share_halves:
        pair = statistic.unflatten(0, (2, -1))
        both = pair.sum(0) if rule.base == "cross_attention_entropy" else pair.mean(0)
        statistic = torch.cat((both, both))
    if rule.base == "cross_attention_entropy":
        statistic = 1 + statistic
    return F.normalize(statistic, p=2, dim=1)


def with_age(rule: TokenRule, score: Tensor, age: Tensor) -> Tensor:
    """Returns score + age_weight · age / age_period; age fp32 [B, N] or [1, N], steps since the token was computed."""
    return score + rule.age_weight * age / rule.age_period


def with_bonus(score: Tensor, bonus: float, grid: int, raster: tuple[int, int]) -> Tensor:
    """Returns scores [B, N] in which the largest of each grid x grid block of the raster is times 1 + bonus.

    A factor, not a term: if scores are negative it makes the largest smaller (as published).
    """
    rows, columns = raster
    blocks = score.unflatten(1, (rows // grid, grid, columns // grid, grid)).transpose(2, 3).flatten(3)
    best = blocks.argmax(-1, keepdim=True)
    blocks = blocks.scatter(-1, best, blocks.gather(-1, best) * (1 + bonus))
    return blocks.unflatten(-1, (grid, grid)).transpose(2, 3).flatten(1)


def top(score: Tensor, k: int) -> Tensor:
    """Returns the k tokens of highest score, ascending: [B, N] -> int64 [B, k]."""
    return score.topk(k, dim=1).indices.sort(dim=1).values


def observed(
    site: str, rule: TokenRule, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor]:
    """Returns the module's output, and its statistic [B, N] of one value a token that was computed.

    Raises UnsupportedModelError if the module does not compute one scaled_dot_product_attention.
    """
    out, recorded = record_attention(forward, args, kwargs)
    if len(recorded) != 1:
        raise UnsupportedModelError(
            f"{site} called scaled_dot_product_attention {len(recorded)} times, and the token rule {rule.base!r} "
            "needs its one map. Type pipe.transformer.set_attention_backend('native'), or compile with --policy soda."
        )
    return out, statistic(rule, recorded[0])


def statistic(rule: TokenRule, call: AttentionCall) -> Tensor:
    """Returns the values [B, N] that `rule` scores tokens by; a [B, N, L] are the attention weights, v [B, H, N, d] the values.

    attention_received: Σ_i a[i, j], what token j receives of all queries i (ToCa, s1).
    cross_attention_entropy: −Σ_j p log(p + 1e-7) of token i, p = a[i, j]; with shared halves p = a[i, j] / 2, since ToCa puts
    the text of both halves next to each other, and the entropy is the sum of two such (ToCa, s2).
    value_norm: Σ_h (1 − ‖v[h, j]‖₂) (DuCa, V-caching).
    """
    if rule.base == "value_norm":
        return (1 - call.v.to(torch.promote_types(call.v.dtype, torch.float32)).norm(dim=-1)).sum(1)
    weights = mean_attention(call.q, call.k, call.mask, call.scale)
    if rule.base == "attention_received":
        return weights.sum(1)
    p = weights * (0.5 if rule.share_halves else 1.0)
    return -(p * (p + 1e-7).log()).sum(-1)
