"""The maker of the comparison: what cannot be compiled is left out with its reason, what exists is not made again."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

import sodaprof
from sodaprof.formats.schedule_file import load_schedule
from tests.studies import table
from tests.studies.table_maker import Maker, Variant
from tests.tiny_pipelines import STEPS, tiny_pipe

FORA, SODA = Variant("fora", "FORA", "--policy fora"), Variant("soda", "SODA", "--policy soda")


@pytest.fixture
def maker(tmp_path, monkeypatch):
    """A maker of files for an untrained network."""
    pipe = tiny_pipe()
    pipe.save_pretrained(tmp_path / "m")
    sodaprof.profile(
        sodaprof.load_pipeline(str(tmp_path / "m")), tmp_path / "profile", steps=STEPS, samples=2, max_interval=4
    )
    maker = Maker(argparse.Namespace(again=[], device="cpu", batch_size=4, samples=2))
    maker.commands = []
    run = maker.sodaprof
    monkeypatch.setattr(maker, "sodaprof", lambda *words: maker.commands.append(words) or run(*words))
    return maker


def test_schedules_are_made_once_and_gaps_have_their_reasons(maker, tmp_path):
    lost = Variant("refined", "update, refined", "--evaluations 9", refines="solver-fit")
    variants = [FORA, SODA, Variant("other", "other", "--policy other"), lost]
    compiled = lambda: maker.compile(variants, str(tmp_path / "m"), tmp_path / "profile", 1.6, tmp_path / "1.6x")  # noqa: E731
    made, left_out = compiled()
    assert [variant.key for variant, _ in made] == ["fora", "soda"]
    assert [load_schedule(path).policy["name"] for _, path in made] == ["fora", "soda"]
    assert left_out[0]["name"] == "other"
    assert "--policy is 'other'" in left_out[0]["reason"]
    assert left_out[1:] == [{"name": "update, refined", "reason": "there is no solver-fit to start from"}]
    tried = len(maker.commands)
    assert compiled() == (made, left_out)
    assert [words[-3] for words in maker.commands[tried:]] == ["other"]
    maker.options.again = ["soda"]
    assert compiled() == (made, left_out)
    assert [words[-3] for words in maker.commands[tried + 1 :]] == ["soda", "other"]
    with pytest.raises(RuntimeError, match="No such option"):
        maker.sodaprof("compile", str(tmp_path / "profile"), "--nonsense")


def test_evaluations_are_kept_by_what_they_are_of(maker, tmp_path):
    model = str(tmp_path / "m")
    made, _ = maker.compile([FORA, SODA], model, tmp_path / "profile", 1.6, tmp_path / "1.6x")
    cache = tmp_path / "1.6x" / "evaluation" / "table.json"
    first = maker.evaluate(made, model, 1.6, cache, samples=2, controls=False)
    assert [row["name"] for row in first["rows"]] == ["FORA", "SODA"]
    maker.pipes.clear()
    assert maker.evaluate(made, model, 1.6, cache, samples=2, controls=False) == first
    assert not maker.pipes  # nothing was sampled
    again = maker.evaluate(made, model, 1.6, cache, samples=3, controls=False)
    assert again["samples"] == 3
    rows = table.kept_rows(again, made)
    assert [row["ours"] for row in rows] == [False, False]
    assert rows[0]["psnr_db"]["mean"] == pytest.approx(again["rows"][0]["psnr_db"]["mean"], rel=1e-4)


def test_data_is_drawn_for_the_entries_that_are_evaluated():
    for model in ("tiny-dit", "tiny-pixart"):
        data = table.training_pictures(model, 120, table.DATA_SEED)
        assert data.shape == (120, 32, 32, 3)
        assert 0 <= data.min() < 0.2
        assert 0.8 < data.max() <= 1
        turn = 10 if model == "tiny-dit" else 100
        assert not np.array_equal(data[0], data[turn])  # another drawing of the same entry


def test_every_variant_has_a_key_and_a_name_of_its_own():
    assert len({v.key for v in table.VARIANTS}) == len({v.name for v in table.VARIANTS}) == len(table.VARIANTS)
    keys = [v.key for v in table.VARIANTS]
    assert all(keys.index(v.refines) < keys.index(v.key) for v in table.VARIANTS if v.refines)
    assert sum(not v.options.startswith("--policy") for v in table.VARIANTS) == sum(
        bool(v.refines) for v in table.VARIANTS
    )
