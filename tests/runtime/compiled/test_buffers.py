"""Tables in fixed places: values are copied without a change, and later values are written to the same places."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from sodaprof.runtime.compiled.buffers import ALIGNMENT, TableValue, pack


def values(seed):
    """Returns values that hold for the run, and those of each of two steps."""
    torch.manual_seed(seed)
    of_run, at_both = torch.randn(2, 3), torch.randn(1, 5).expand(4, 5)
    first = [torch.randn(3, 7, dtype=torch.bfloat16), torch.randn(4, 6).t(), torch.arange(3) + seed, of_run]
    second = [
        torch.randn(3, 7, dtype=torch.bfloat16),
        torch.randn(1, 2).expand(5, 2),
        torch.tensor(2.5 + seed),
        at_both,
    ]
    return [of_run, of_run, None, "name"], [[at_both, *first], second]


def packed_leaves(packed):
    """Returns (value in its place, step of it or None) of each leaf."""
    of_run, of_steps = packed.result
    found = [(value, None) for value in of_run]
    for step, of_step in enumerate(of_steps):
        row = packed.table.index_select(0, torch.tensor([step]))[0]
        found += [(v.read(row), step) if isinstance(v, TableValue) else (v, None) for v in of_step]
    return found


def test_packed_values_are_equal_copies_in_other_places():
    found = values(0)
    packed = pack(*found)
    placed = packed_leaves(packed)
    assert [step for _, step in placed] == [None] * 5 + [0] * 3 + [None] + [1] * 3 + [None]
    for before, (after, _) in zip(tree_leaves(found), placed, strict=True):
        if torch.is_tensor(before):
            assert after is not before
            assert torch.equal(after, before)
            assert (after.dtype, after.stride()) == (before.dtype, before.stride())
        else:
            assert after is before
    assert placed[0][0] is placed[1][0] is placed[8][0]  # a copy of each tensor
    assert all(v.offset % ALIGNMENT == 0 for of_step in packed.result[1] for v in of_step if isinstance(v, TableValue))
    assert packed.table.shape[1] % ALIGNMENT == 0


def test_new_values_are_written_to_the_same_places():
    packed, other = pack(*values(0)), values(7)
    before = [leaf.data_ptr() for leaf, step in packed_leaves(packed) if step is None and torch.is_tensor(leaf)]
    packed.write(other)
    after = packed_leaves(packed)
    assert before == [leaf.data_ptr() for leaf, step in after if step is None and torch.is_tensor(leaf)]
    assert all(torch.equal(a, b) for (a, _), b in zip(after, tree_leaves(other), strict=True) if torch.is_tensor(b))
