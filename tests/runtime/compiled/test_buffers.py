"""Tables in fixed places: values are copied without a change, and later values are written to the same places."""

from __future__ import annotations

import pytest
import torch

from sodaprof.runtime.compiled.buffers import ALIGNMENT, ELEMENT_BYTES, TableValue, pack


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
    values = [*found[:5], *found[5], *found[6]]
    return [value.tensor if isinstance(value, TableValue) else value for value in values]


def test_packed_values_are_equal_copies_in_other_places(found):
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


def test_new_values_are_written_to_the_same_places(found):
    packed = pack(found, marks(found), 2)
    kept = leaves(packed.result)
    addresses = [leaf.data_ptr() for leaf in kept if torch.is_tensor(leaf)]
    torch.manual_seed(7)
    other = torch.randn(2, 3)
    new = [other, other, None, "name", torch.randn(1, 5).expand(4, 5),
           [torch.randn(3, 7).bfloat16(), torch.randn(4, 6).t(), torch.arange(3) + 9],
           [torch.randn(3, 7).bfloat16(), torch.randn(1, 2).expand(5, 2), torch.tensor(-1.0)]]  # fmt: skip
    packed.write(new)
    assert addresses == [leaf.data_ptr() for leaf in kept if torch.is_tensor(leaf)]
    assert all(torch.equal(a, b) for a, b in zip(kept, leaves(new), strict=True) if torch.is_tensor(a))


def test_a_slot_reads_the_value_from_the_row_of_its_step(found):
    packed = pack(found, marks(found), 2)
    for step in range(2):
        row = packed.table.index_select(0, torch.tensor([step]))[0]
        for value, wanted in zip(packed.result[5 + step], found[5 + step], strict=True):
            assert torch.equal(value.read(row), wanted)
            assert torch.equal(value.read(None), wanted)
            assert value.slot.offset % ALIGNMENT == 0
    assert packed.table.shape[1] * ELEMENT_BYTES % (ALIGNMENT * ELEMENT_BYTES) == 0
