"""The captioned pictures that tiny-pixart is trained on: pictures and captions say the same, and what is held out is."""

from __future__ import annotations

import pytest
import torch

from sodaprof.measure.classifier import Classifier, load_classifier
from sodaprof.pipelines.entries import read_prompts
from tests.reference import scenes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(**values):
    """One scene: a large red disk, a small blue square beside it, on black."""
    default = {"shape": [[0, 3]], "colour": [[0, 2]], "size": [[1, 0]], "axis": [0], "ground": [0], "style": [0]}
    return scenes.Scenes(**{k: torch.tensor(v) for k, v in (default | values).items()})


def test_pictures_are_repeatable_and_vary():
    batch = scenes.sample(20, generator(1))
    a, b = (scenes.draw(batch, generator(2)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (20, 3, 32, 32)
    assert a.abs().max() <= 1
    assert (a - scenes.draw(batch, generator(3))).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_the_first_object_is_drawn_left_or_above_in_its_colour(axis):
    red, _, blue = scenes.draw(scene(axis=[axis]), generator())[0]
    place = torch.arange(32.0)[:, None] if axis else torch.arange(32.0)
    where = [(place * (c > 0.5)).sum() / (c > 0.5).sum() for c in (red, blue)]
    assert where[0] < 12 < 20 < where[1]
    assert (red > 0.5).sum() > 1.5 * (blue > 0.5).sum() > 40  # large and small


def test_objects_stay_apart_and_inside():
    pictures = [scenes.draw(scene(size=[[1, 1]], axis=[i % 2]), generator(i))[0] for i in range(200)]
    for i, picture in enumerate(pictures):
        filled = (picture.amax(0) > 0).any(i % 2)  # columns or rows with anything in them, on a black ground
        assert not filled[[0, 31]].any()
        assert (filled.int().diff() == 1).sum() == 2


def test_every_word_of_a_caption_is_in_the_vocabulary_and_all_are_used():
    batch = scenes.sample(2000, generator())
    words = {w for row in range(2000) for w in scenes.caption(batch, row, generator(row)).text.split()}
    assert words == set(scenes.vocabulary())


def test_captions_name_what_is_there():
    texts = {scenes.caption(scene(), 0, generator(seed)).text for seed in range(3000)}
    assert "a large red disk left of a small blue square" in texts
    assert "a small blue square to the right of a large red disk on a black background" in texts
    assert "a drawing of a red disk to the left of a small blue square" in texts
    assert not any(
        w in text.split() for text in texts for w in ("above", "over", "below", "under", "green", "gradient")
    )
    texts = {scenes.caption(scene(axis=[1]), 0, generator(seed)).text for seed in range(3000)}
    assert {"a large red disk above a small blue square", "a small blue square under a large red disk"} <= texts


def test_owners_are_the_words_of_each_object():
    for seed in range(50):
        made = scenes.caption(scene(), 0, generator(seed))
        words = made.text.split()
        assert len(made.owners) == len(words)
        first = [w for w, owner in zip(words, made.owners, strict=True) if owner == 1]
        assert first == ["a", *["large"] * made.says_size[0], "red", "disk"]
        assert [w for w, owner in zip(words, made.owners, strict=True) if owner == 2][-2:] == ["blue", "square"]
        assert made.says_ground == ("black" in words)


def test_one_combination_in_ten_is_held_out_and_holds_every_attribute():
    everything = scenes.Scenes(
        torch.cartesian_prod(torch.arange(5), torch.arange(5)).repeat_interleave(72, 0),
        torch.cartesian_prod(torch.arange(6), torch.arange(6)).repeat_interleave(2, 0).repeat(25, 1),
        torch.zeros(1800, 2, dtype=torch.long),
        torch.arange(2).repeat(900),
        torch.zeros(1800, dtype=torch.long),
        torch.zeros(1800, dtype=torch.long),
    )
    kept = everything[scenes.held_out(everything)]
    assert 0.08 < len(kept) / 1800 < 0.12
    for values, count in ((kept.shape, 5), (kept.colour, 6)):
        assert all(set(column.tolist()) == set(range(count)) for column in values.T)


def test_samples_are_held_out_or_not_as_asked():
    assert scenes.held_out(scenes.sample(500, generator(), unseen=True)).all()
    seen = scenes.sample(500, generator())
    assert len(seen) == 500
    assert not scenes.held_out(seen).any()
    assert (seen.colour[:, 0] != seen.colour[:, 1]).all()


def test_what_is_followed():
    asked, right = scene(), [0, 0, 0, 1, 3, 2, 0]
    said = torch.tensor([[True, True]])

    def verdict(answers, said=said):
        return {k for k, v in scenes.followed(asked, said, torch.tensor([answers])).items() if v.item()}

    assert scenes.answers(asked).tolist() == [right]
    assert verdict(right) == {"shape", "colour", "size", "relation", "all"}
    assert verdict([1, *right[1:]]) == {"shape", "colour", "size"}  # above each other instead
    assert verdict([0, *right[4:], *right[1:4]]) == {"shape", "colour", "size"}  # changed places
    assert verdict([0, 1, 0, 1, 3, 2, 0]) == {"colour", "size", "relation"}  # a ring for the disk
    assert verdict([0, 0, 0, 1, 3, 5, 0]) == {"shape", "size", "relation"}  # white for blue
    assert verdict([0, 0, 0, 0, 3, 2, 0]) == {"shape", "colour", "relation"}
    assert verdict([0, 0, 0, 0, 3, 2, 0], torch.tensor([[False, True]])) == {
        "shape", "colour", "size", "relation", "all"
    }  # fmt: skip
    assert verdict([0, 4, 4, 1, 4, 4, 0]) == {"size"}  # nothing alike: no relation either


def test_calibration_prompts_are_captions_that_are_not_held_out():
    made = generator(100)
    batch = scenes.sample(100, made)
    assert read_prompts("tiny-pixart") == [scenes.caption(batch, row, made).text for row in range(100)]


def test_a_judge_of_several_questions_survives_saving(tmp_path):
    torch.manual_seed(0)
    model = Classifier(tuple("abxyz"), width=2, heads=(2, 3), grid=2).bfloat16().float().eval()
    model.save(tmp_path / "classifier", torch.bfloat16)
    loaded = load_classifier(tmp_path)
    pictures = 2 * torch.rand(50, 3, 32, 32, generator=generator()) - 1
    assert torch.equal(loaded(pictures), model(pictures))
    found = loaded.predictions(pictures)
    assert torch.equal(found[:, 0], model(pictures)[:, :2].argmax(1))
    assert torch.equal(found[:, 1], model(pictures)[:, 2:].argmax(1))
    mirrored = loaded.features(pictures.flip(3)) - loaded.features(pictures)
    assert mirrored.abs().max() > 1e-3
