"""Methods that are replaced on one instance, and restored."""

from __future__ import annotations

import inspect

import pytest

from sodaprof.measure.evaluate import evaluate
from sodaprof.pipelines.patch import patched
from tests.tiny_pipelines import schedule_for, tiny_pipe


class Counter:
    def add(self, number, *, twice=False):
        return number + number * twice


def plus_one(add, *args, **kwargs):
    return add(*args, **kwargs) + 1


def test_a_patched_method_calls_the_wrapper_and_keeps_its_signature():
    counter, other = Counter(), Counter()
    with patched(counter, "add", plus_one):
        assert counter.add(2, twice=True) == 5
        assert other.add(2) == 2
        assert inspect.signature(counter.add) == inspect.signature(other.add)
        with patched(counter, "add", plus_one):
            assert counter.add(2) == 4
        assert counter.add(2) == 3
    assert counter.add(2) == 2
    assert not vars(counter)


def test_a_users_own_method_is_wrapped_and_restored_after_an_error():
    counter = Counter()
    counter.add = own = lambda number: 10 + number
    with patched(counter, "add", plus_one):
        assert counter.add(2) == 13
    assert vars(counter) == {"add": own}
    with pytest.raises(TypeError), patched(counter, "add", plus_one):
        counter.add(None)
    assert vars(counter) == {"add": own}


def test_an_evaluation_leaves_a_users_own_decoder_on_the_pipeline():
    pipe, calls = tiny_pipe(), []
    decode = pipe.vae.decode

    def own(*args, **kwargs):
        calls.append(1)
        return decode(*args, **kwargs)

    pipe.vae.decode = own
    evaluate(pipe, [schedule_for(pipe)], samples=2, batch_size=2, controls=False)
    assert calls
    assert pipe.vae.decode is own
