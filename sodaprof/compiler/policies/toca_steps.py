"""When ToCa (arXiv 2410.05317) and DuCa (arXiv 2412.18911) compute, and how many tokens: their released arithmetic.

Steps are counted as everywhere here, 0 the noisiest; `s` is the counter of the published code, which runs down from
T - 1 to 0 for DiT and up for the others. Letters: F all tokens, T some tokens, A nothing (the stack is skipped; DuCa).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

KINDS = ("attn", "cross_attn", "mlp")


@dataclass(frozen=True)
class StepType:
    """One step's letters, one for each of KINDS: in layer 0, and in all other layers. They differ in mixed steps only."""

    first: str
    rest: str

    def letter(self, layer: int, kind: str) -> str:
        return (self.rest if layer else self.first)[KINDS.index(kind)]


@dataclass(frozen=True)
class Ratio:
    """Share of tokens that a T cell recomputes: R · (1 + tilt · (1 − 2 l / (L − 1))) · (start + slope · s / T) · module."""

    start: float
    slope: float
    tilt: float
    modules: dict[str, float]  # one factor a kind of site
    descending: bool  # whether s runs down

    def tokens(self, kind: str, rate: float, steps: int, layers: int, tokens: int) -> np.ndarray:
        """Returns k [T, L] at R = `rate`: the share as float32 within [0, 1], times the tokens, rounded down."""
        s = np.arange(steps)[::-1] if self.descending else np.arange(steps)
        layer = 1 + self.tilt - 2 * self.tilt * np.arange(layers) / max(layers - 1, 1)
        step = self.start + self.slope * s / steps
        share = np.clip(rate * layer * step[:, None] * self.modules[kind], 0, 1).astype(np.float32)
        return (share * np.float32(tokens)).astype(int)


RATIOS = {
    "ddim50": Ratio(3.0, -4.0, -0.2, {"mlp": 2.5}, True),  # no token in the first quarter
    "ddpm250": Ratio(1.4, -0.8, 0.8, {"mlp": 2.5}, True),
    "pixart": Ratio(1.9, -1.8, 0.6, {"cross_attn": 0.6, "mlp": 1.6}, False),
    "opensora": Ratio(1.0, 0.0, 0.0, {"cross_attn": 1 - 0.67 * 1.5, "mlp": 1.495}, False),  # below 0: no token
}


def dit_types(steps: int, period: int, rate: float, skips: bool, once: bool) -> list[StepType]:
    """Returns the steps of DiT: F where the descending counter is a multiple of a period that changes as it goes.

    period: the base period N. rate: R; at 0 the period stays N. skips: A where the remainder is even (DuCa). once:
    decide once a step; the published code decides once a layer, and layer 0 changes the period (mixed steps).
    """

    def renewed(s: int) -> int:
        if rate and int(0.2 * steps) <= s < int(0.4 * steps):
            return 2
        return _period(s, steps, period, 0.4 if rate else 0.0)

    return _periodic(range(steps - 1, -1, -1), period, renewed, skips, once)


def pixart_types(steps: int, period: int, rate: float, skips: bool, once: bool) -> list[StepType]:
    """Returns the steps of PixArt: as DiT's, but counted upwards, without a band of period 2; constant N for DuCa."""
    weight = -0.2 if rate and not skips else 0.0
    return _periodic(range(steps), period, lambda s: _period(s, steps, period, weight), skips, once)


def opensora_types(steps: int, period: int, rate: float, skips: bool, once: bool) -> list[StepType]:
    """Returns the steps of Open-Sora: F in the first three, then every N steps, for cross-attention every 2 N.

    The published code has 3 and 6 as constants. It decides a module at a time, so there are no mixed steps.
    """
    types = []
    for s in range(steps):
        short = "F" if s <= 2 else _letter(s, period, skips)
        # between two of its own full steps, cross-attention keeps to the letters of the others
        long = "F" if s <= 2 or s % (2 * period) == 0 else "T" if short == "F" else short
        letters = short + long + short
        types.append(StepType(letters, letters))
    return types


def _period(s: int, steps: int, base: int, weight: float) -> int:
    """Returns N / (1 + w − 2 w s / T) in float32, rounded half to even."""
    return int(np.rint(np.float32(base) / np.float32(1 + weight - 2 * weight * s / steps)))


def _letter(s: int, period: int, skips: bool) -> str:
    remainder = s % period
    if remainder == 0:
        return "F"
    return "A" if skips and remainder % 2 == 0 else "T"


def _periodic(
    counter: Iterable[int], period: int, renewed: Callable[[int], int], skips: bool, once: bool
) -> list[StepType]:
    """Returns the steps of a counter; a full layer 0 renews the period, by which the other layers then decide."""
    types: list[StepType] = []
    for s in counter:
        first = rest = "F" if not types else _letter(s, period, skips)
        if first == "F":
            period = renewed(s)
            if types and not once:
                rest = _letter(s, period, skips)
        types.append(StepType(first * 3, rest * 3))
    return types
