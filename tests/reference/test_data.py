"""The pictures that the reference models were trained on, drawn again."""

from __future__ import annotations

import numpy as np
import pytest

from sodaprof.errors import SodaprofError
from tests.reference.data import training_pictures


def test_drawings_of_the_shipped_models():
    pictures = training_pictures("tiny-dit", 12, 5)
    assert pictures.shape == (12, 32, 32, 3)
    assert 0 <= pictures.min() < 0.2 < 0.8 < pictures.max() <= 1
    assert np.array_equal(pictures, training_pictures("tiny-dit", 12, 5))
    assert not np.array_equal(pictures, training_pictures("tiny-dit", 12, 6))
    assert training_pictures("tiny-pixart", 3, 5).shape == (3, 32, 32, 3)
    with pytest.raises(SodaprofError, match="No data is known for tiny-opensora"):
        training_pictures("tiny-opensora", 3, 5)
