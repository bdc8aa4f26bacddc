"""Tables in lasting places: what was found comes back the same, and is written anew in place."""

from __future__ import annotations

import pytest
import torch

from sodaprof.runtime.compiled.buffers import LINE, WORD, pack


@pytest.fixture
def found():
    of_run, wide = torch.randn(2, 3), torch.randn(1, 5).expand(4, 5)
    steps = [
        [torch.randn(3, 7, dtype=torch.bfloat16), torch.randn(4, 6).t(), torch.arange(3)],
        [torch.randn(3, 7, dtype=torch.bfloat16), torch.randn(1, 2).expand(5, 2), torch.tensor(2.5)],
    ]
    return [of_run, of_run, None, "name", wide, *steps]


def marks(found):
    return [None] * 5 + [[step] * 3 for step in range(2)]


def leaves(found):
    return [*found[:5], *found[5], *found[6]]


def test_what_was_found_comes_back_in_other_places(found):
    packed = pack(found, marks(found), 2)
    for before, after in zip(leaves(found), leaves(packed.result), strict=True):
        if not torch.is_tensor(before):
            assert after is before
            continue
        assert after is not before
        assert torch.equal(after, before)
        assert after.dtype == before.dtype
        assert after.stride() == before.stride()
    assert packed.result[0] is packed.result[1]


def test_values_are_written_anew_where_they_lie(found):
    packed = pack(found, marks(found), 2)
    held = leaves(packed.result)
    where = [leaf.data_ptr() for leaf in held if torch.is_tensor(leaf)]
    torch.manual_seed(7)
    other = torch.randn(2, 3)
    new = [other, other, None, "name", torch.randn(1, 5).expand(4, 5),
           [torch.randn(3, 7).bfloat16(), torch.randn(4, 6).t(), torch.arange(3) + 9],
           [torch.randn(3, 7).bfloat16(), torch.randn(1, 2).expand(5, 2), torch.tensor(-1.0)]]  # fmt: skip
    packed.write(new)
    assert where == [leaf.data_ptr() for leaf in held if torch.is_tensor(leaf)]
    assert all(torch.equal(a, b) for a, b in zip(held, leaves(new), strict=True) if torch.is_tensor(a))


def test_a_counter_finds_the_values_of_its_step(found):
    packed = pack(found, marks(found), 2)
    for step in range(2):
        row = packed.table.index_select(0, torch.tensor([step]))[0]
        for value in packed.result[5 + step]:
            assert torch.equal(packed.places[id(value)].of(row), value)
    assert packed.table.shape[1] * WORD % (LINE * WORD) == 0
    assert all(place.offset % LINE == 0 for place in packed.places.values())
