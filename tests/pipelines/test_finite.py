"""NaN is named where it first appears."""

from __future__ import annotations

import pytest

import sodaprof
from sodaprof.errors import SodaprofError
from sodaprof.measure.evaluate import evaluate
from sodaprof.pipelines.finite import finite_pictures
from sodaprof.pipelines.load import call
from tests.tiny_pipelines import tiny_pipe

SETTINGS = {"steps": 3, "samples": 2, "batch_size": 2, "max_interval": 3}
PLACE = r"first in the output of transformer\.transformer_blocks\.1\.ff\.net\.2 at step 0\."


def test_weights_with_nan_at_profile_eval_and_run(tmp_path):
    pipe = tiny_pipe(2)
    sodaprof.profile(pipe, tmp_path / "p", **SETTINGS)
    schedule = sodaprof.compile_schedule(tmp_path / "p", "1.2x", "fora")
    pipe.transformer.transformer_blocks[1].ff.net[2].weight.data[0, 0] = float("nan")
    with pytest.raises(SodaprofError, match=PLACE):
        sodaprof.profile(pipe, tmp_path / "q", **SETTINGS)
    with pytest.raises(SodaprofError, match=PLACE):
        evaluate(pipe, [schedule], samples=2, seed=50, batch_size=2)
    with pytest.raises(SodaprofError, match=PLACE), sodaprof.apply(pipe, schedule):
        finite_pictures(pipe, lambda: call(pipe, [1], [7], 3, 4.0))


def test_weights_of_the_decoder_with_nan():
    pipe = tiny_pipe(1)
    next(pipe.vae.decoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(SodaprofError, match="first in the pictures alone"):
        finite_pictures(pipe, lambda: call(pipe, [1], [7], 3, 4.0))
