"""Token rules: which k tokens a pruned site recomputes. Pure functions of what the site holds."""

from __future__ import annotations

import torch

from ..schedule import TokenRule


def feature_mean(cache: torch.Tensor) -> torch.Tensor:
    """Returns score_i = (1/D) Σ_d |cache[i, d]| for each token: cache [B, N, D] -> [B, N] (SODA, UAS)."""
    return cache.abs().mean(-1)


BASES = {"feature_mean": feature_mean}


def select(rule: TokenRule, cache: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the k tokens of highest score, ascending: cache [B, N, D] -> int64 [B, k]."""
    return BASES[rule.base](cache).topk(k, dim=1).indices.sort(dim=1).values
