"""A sampler's own steps in the form of the schedule's state update: the numbers that a fitted update starts from.

A step is linear where it can be written x' = c0 · x + Σ c_j · V_j + noise · n, V_j being the j-th newest guided output of
the network (basis `output`: DDIM, DDPM, Euler, rectified flow) or the data prediction formed from it and the state at its
own step (basis `data`: DPM-Solver++ 2M, UniPC).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FormatError
from .files import exact_keys, header, is_number

FORMAT, VERSION = "sodaprof.solver", 1
BASES = ("output", "data")
MAX_HISTORY = 4  # outputs that an update may weigh
RIDGE = 1e-4  # of each regressor's energy, towards the sampler's own coefficients
DIGITS = 9  # significant digits of an update's coefficients in a file


@dataclass(frozen=True)
class OwnUpdate:
    """x_{t+1} = coefficients[t][0] · x_t + Σ_j coefficients[t][j] · V_j + noise[t] · n; V_t = data[t] · (x_t, v_t).

    v_t is the guided output as the scheduler is given it, n standard normal. Pure numbers.
    """

    basis: str  # one of BASES
    coefficients: tuple[tuple[float, ...], ...]  # [T][1 + history]
    data: tuple[tuple[float, float], ...]  # [T]; (0, 1) under basis `output`
    noise: tuple[float, ...]  # [T]

    @property
    def history(self) -> int:
        return len(self.coefficients[0]) - 1

    @property
    def steps(self) -> int:
        return len(self.coefficients)

    def padded(self, history: int) -> tuple[tuple[float, ...], ...]:
        """Returns the coefficients [T][1 + history] with zeros for older outputs; history is at least the sampler's."""
        return tuple((*row, *[0.0] * (history - self.history)) for row in self.coefficients)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION, "basis": self.basis,
            "coefficients": [list(row) for row in self.coefficients], "data": [list(row) for row in self.data],
            "noise": list(self.noise),
        }  # fmt: skip


def own_update_from_json(data: Any, where: str) -> OwnUpdate:
    """Returns what `OwnUpdate.to_json` wrote; FormatError on anything else."""
    exact_keys(
        header(data, FORMAT, VERSION, where), {"format", "version", "basis", "coefficients", "data", "noise"}, where
    )
    rows, pairs, noise = data["coefficients"], data["data"], data["noise"]
    if data["basis"] not in BASES:
        raise FormatError(f"{where}: basis {data['basis']!r}; expected one of {', '.join(BASES)}. Profile again.")
    if not (isinstance(rows, list) and rows and len(rows) == len(pairs) == len(noise)):
        raise FormatError(f"{where}: coefficients, data and noise must be lists of one length. Profile again.")
    numbers = [*noise, *(c for row in [*rows, *pairs] for c in row)]
    widths = {len(row) for row in rows}
    if not all(map(is_number, numbers)) or len(widths) != 1 or not 2 <= min(widths) <= 1 + MAX_HISTORY:
        raise FormatError(f"{where}: each step needs 2 to {1 + MAX_HISTORY} coefficients. Profile again.")
    return OwnUpdate(data["basis"], _tuples(rows), _tuples(pairs), tuple(map(float, noise)))  # type: ignore[arg-type]


def rounded(coefficients: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Returns coefficients as a file holds them, before anything is predicted from them."""
    return tuple(tuple(float(f"{c:.{DIGITS}g}") for c in row) for row in coefficients)


def own_weights(own: OwnUpdate, step: int, ring: Sequence[int]) -> np.ndarray:
    """Returns the sampler's own coefficients [1 + outputs] at a step, for outputs of the steps in `ring`, newest first.

    The weight of an output that was not computed goes to the newest one before it that was.
    """
    row = own.coefficients[step]
    weights = np.zeros(1 + len(ring))
    weights[0] = row[0]
    for j, weight in enumerate(row[1:]):
        at = next((i for i, source in enumerate(ring) if source <= step - j), len(ring) - 1)
        weights[1 + at] += weight
    return weights


def ridge_solve(products: np.ndarray, target: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """Returns the weights w [n] of least |y − Σ w_i r_i|² + ridge · Σ |r_i|² (w_i − prior_i)².

    products [n, n] of the regressors r, target [n] their products with y.
    """
    energy = ridge * np.diag(products)
    return np.linalg.solve(products + np.diag(energy), target + energy * prior)


def _tuples(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(c) for c in row) for row in rows)
