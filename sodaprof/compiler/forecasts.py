"""Linear forecasts Y_t ≈ Σ w · Y_s: their weights, and their errors from inner products alone.

products [S, T, T]: for each of S outputs the mean inner products of its values at two steps, NaN if they are unknown.
Sources are steps, newest first, [..., K]; targets later steps [n]; weights [S or 1, ..., K, n], of 6 significant digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import BudgetError
from ..formats.schedule import Forecast

Weigh = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (products, sources, targets) -> weights
DIGITS = 6  # significant digits of a weight in a file
AT_ONCE = 32_768  # forecasts whose weights are found at once, of whole sites: about what a processor's cache holds
METRICS = ("l2", "absolute")


def ridge(strength: float) -> Weigh:
    """Returns the weights that minimise |Y_t − Σ w Y_s|² + strength · energy · |w − reuse|².

    reuse: 1 on the newest source. energy: mean energy of the sources. Raises BudgetError unless strength is above 0.
    """
    if strength <= 0:
        raise BudgetError(f"Knob ridge is {strength:g}; expected a number above 0, say 1e-4.")

    def weigh(products: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        between, across = _blocks(products, sources, targets)
        energy = np.stack([between[i, i] for i in range(len(between))]).mean(axis=0)
        pull = np.where(energy > 0, strength * energy, 1.0)  # an output that is all zeros is reused
        change = across - between[0]  # from reuse, whose products are those of the newest
        for i in range(len(between)):
            between[i, i] += pull
        _solve(between, change)
        change[0] += 1
        return np.moveaxis(round_weights(change), (0, 2), (-2, -1))

    return weigh


def _solve(matrices: np.ndarray, right: np.ndarray) -> None:
    """Replaces `right` by the x of matrices · x = right; overwrites both. matrices [K, K, ...] positive definite, right [K, ...].

    All systems at once, by elimination: they are many and small, and a LAPACK call for each would take most of the time.
    """
    count = len(right)
    for i in range(count):
        for j in range(i + 1, count):
            factor = matrices[i, j] / matrices[i, i]
            matrices[j, j:] -= factor * matrices[i, j:]
            right[j] -= factor * right[i]
    for i in reversed(range(count)):
        for j in range(i + 1, count):
            right[i] -= matrices[i, j] * right[j]
        right[i] /= matrices[i, i]


def taylor(formula: str) -> Weigh:
    """Returns the weights of a finite-difference extrapolation, of an order one below the number of sources.

    `published` (TaylorSeer): Σ_i x^i / i! · Δ^i, x steps after the newest source, each difference over the distance of the
    two newest. It is exact on what is linear in time; from order 2 on it is late on a quadratic, since a backward
    difference is the derivative half a distance earlier. `lagrange` is the polynomial through the sources: exact.
    """

    def weigh(products: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        if formula == "lagrange":
            found = _lagrange(sources, targets)
        else:
            ahead, distance = targets - sources[..., :1], -np.diff(sources)[..., None]
            found, power = np.zeros((*sources.shape, len(targets))), np.ones(ahead.shape)
            differences = np.eye(sources.shape[-1])  # [..., source at which it is taken, weight of each source]
            for order in range(1, 1 + sources.shape[-1]):
                found += differences[..., 0, :, None] * power[..., None, :]
                power = power * ahead / order
                differences = -np.diff(differences, axis=-2) / distance[..., : differences.shape[-2] - 1, :]
        return round_weights(found)[None]

    return weigh


def _lagrange(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the weights [..., K, n] of the polynomial through the sources: Π_j≠i (t − s_j) / (s_i − s_j)."""
    same = np.eye(sources.shape[-1], dtype=bool)
    apart = sources[..., :, None] - sources[..., None, :] + same
    factors = (targets - sources[..., None, :, None]) / apart[..., None]
    return np.where(same[..., None], 1.0, factors).prod(axis=-2)


def round_weights(weights: np.ndarray) -> np.ndarray:
    """Returns the weights with 6 significant digits, as a file holds them."""
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log10(np.abs(weights)))
    scale = 10.0 ** (DIGITS - 1 - np.clip(exponent, -12, 300))
    found: np.ndarray = np.rint(weights * scale) / scale
    return found


def forecast_error(
    products: np.ndarray, sources: np.ndarray, targets: np.ndarray, weights: np.ndarray, metric: str = "l2"
) -> np.ndarray:
    """Returns the errors [S, ..., n] of forecasts: root of the mean squared error, for `l2` relative to the target's size."""
    between, across = _blocks(products, sources, targets)
    energy = np.diagonal(products, axis1=1, axis2=2)[:, targets]
    energy = energy.reshape(*energy.shape, *[1] * (sources.ndim - 1))
    own = np.moveaxis(weights, (-2, -1), (0, 2))  # [K, S or 1, n, ...]
    squared = np.broadcast_to(energy, across.shape[1:]).copy()
    for i in range(len(own)):
        part = between[i, i] * own[i] - 2 * across[i]
        for j in range(i):
            part += 2 * between[i, j] * own[j]
        squared += part * own[i]
    error: np.ndarray = np.sqrt(np.maximum(squared, 0.0))
    error = error / np.sqrt(np.where(energy > 0, energy, 1.0)) if metric == "l2" else error
    return np.moveaxis(error, 1, -1)


def _blocks(products: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the products of the sources with each other [K, K, S, 1, ...] and with the targets [K, S, n, ...].

    The many tuples of sources come last, so that arithmetic runs over long rows.
    """
    own, steps = np.moveaxis(sources, -1, 0), products.shape[1]  # [K, ...]
    flat = products.reshape(len(products), -1)
    between = np.take(flat, own[:, None] * steps + own, axis=1)  # [S, K, K, ...]
    ahead = targets.reshape(-1, *[1] * (sources.ndim - 1))
    across = np.take(flat, own[:, None] * steps + ahead, axis=1)  # [S, K, n, ...]
    return np.moveaxis(between, 0, 2)[:, :, :, None], np.moveaxis(across, 0, 1)


def segment_costs(
    products: np.ndarray, history: int, longest: int, weigh: Weigh, power: float = 1.0, metric: str = "l2"
) -> np.ndarray:
    """Returns the error of each segment, [T, (longest + 1)^(history − 1) …, longest + 1]: Σ of error^power over its cells.

    Entry [a, g_1, g_2, …, n]: full step a serves the n − 1 steps after it; the full steps before it are g_1, g_1 + g_2, …
    steps earlier, 0 if there is none. Inf beyond the last step or beyond what is known. Sources whose product with the target
    is not known are left out.
    """
    steps = products.shape[1]
    known = ~np.isnan(products).any(axis=0)
    segment = np.full((steps, *[longest + 1] * history), np.inf)
    segment[..., 1] = 0.0
    for anchor in range(steps):
        ages = next((n for n in range(1, longest) if anchor + n >= steps or not known[anchor, anchor + n]), longest)
        targets = np.arange(anchor + 1, anchor + ages)
        cells = np.zeros(len(targets))  # [g_1, …, targets], by the number of sources
        for count in range(1, history + 1):
            each, older = min(longest, anchor), count - 1
            gaps = 1 + np.indices((each,) * older).reshape(older, each**older).T  # all tuples of gaps 1…each
            sources = anchor - np.pad(gaps.cumsum(axis=1), ((0, 0), (1, 0)))
            possible = sources[:, -1] >= 0
            possible[possible] = known[anchor, sources[possible, -1]]
            gaps, sources = gaps[possible], sources[possible]
            found = np.zeros((len(sources), len(targets)))
            for some in np.array_split(products, min(len(products), 1 + len(products) * found.size // AT_ONCE)):
                error = forecast_error(some, sources, targets, weigh(some, sources, targets), metric)
                found += (error**power).sum(axis=0)
            if count == 1:
                cells = found[0]
                continue
            # a further axis; if the product with the oldest source is unknown the forecast leaves it out
            cells = np.repeat(cells[..., None, :], longest + 1, axis=-2)
            index = tuple(gaps.T)
            cells[index] = np.where(known[sources[:, -1:], targets], found, cells[index])
        segment[anchor, ..., 2 : ages + 1] = cells.cumsum(axis=-1)
    return segment


def sources_of(
    anchors: Sequence[int], turns: Sequence[range], history: int, known: np.ndarray
) -> dict[int, tuple[int, ...]]:
    """Returns for each step that is not full the last `history` full steps of its turn, newest first, as `segment_costs`.

    known [T, T]: which steps may be sources of which.
    """
    found = {}
    for turn in turns:
        for step in turn:
            past = [a for a in anchors if turn.start <= a < step][: -1 - history : -1]
            if step not in anchors:
                found[step] = tuple(a for a in past if known[a, step])
    return found


def forecasts_at(
    products: np.ndarray, cells: dict[int, tuple[int, ...]], weigh: Weigh, form: str = "output"
) -> dict[int, list[Forecast]]:
    """Returns one forecast for each output at each step of `cells`, {step: sources}."""
    found = {}
    for step, sources in cells.items():
        weights = weigh(products, np.array(sources), np.array([step]))[..., 0]
        rows = np.broadcast_to(weights, (len(products), len(sources)))
        found[step] = [Forecast(sources, tuple(float(f"{w:.{DIGITS}g}") for w in row), form) for row in rows]
    return found
