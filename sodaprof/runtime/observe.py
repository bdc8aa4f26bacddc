"""Looks at the attention of a site while it runs, and keeps of it what a token rule scores by.

The module's output is untouched: the statistic is computed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import UnsupportedModelError
from ..models.attention import Heard, listen
from ..schedule import TokenRule
from .tokens import attention_received, entropy, mean_attention, value_smallness


def observed(
    site: str, rule: TokenRule, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor]:
    """Returns the module's output, and its statistic [B, N] of one value a token that was computed.

    Raises UnsupportedModelError where the module does not compute one scaled_dot_product_attention.
    """
    out, heard = listen(forward, args, kwargs)
    if len(heard) != 1:
        raise UnsupportedModelError(
            f"{site} called scaled_dot_product_attention {len(heard)} times, and the token rule {rule.base!r} "
            "needs its one map. Type pipe.transformer.set_attention_backend('native'), or compile with --policy soda."
        )
    return out, statistic(rule, heard[0])


def statistic(rule: TokenRule, heard: Heard) -> Tensor:
    """Returns the values [B, N] that `rule` scores by."""
    if rule.base == "value_norm":
        return value_smallness(heard.v)
    weights = mean_attention(heard.q, heard.k, heard.mask, heard.scale)
    if rule.base == "attention_received":
        return attention_received(weights)
    return entropy(weights, 0.5 if rule.share_halves else 1.0)
