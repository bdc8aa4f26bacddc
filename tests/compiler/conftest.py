"""What the tests of several policies share."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.trajectories import known_products, products, wandering


@pytest.fixture
def values(monkeypatch) -> np.ndarray:
    """Outputs of the sites [G, S = 4, T = 12, D], whose products every profile now holds; the stack's: of sites 0 and 1."""
    made = wandering(4, 12, seed=3)
    table = products(made, 12)
    known_products(monkeypatch, {"t": table}, {"t": {"output": table[0], "drift": table[1]}})
    return made
