"""Replaces a method of one instance for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(instance: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Replaces the method `name` by wrapper(original, *args, **kwargs) while the block runs.

    The replacement has the signature of the original, which pipelines inspect. Afterwards the instance is as before: an
    attribute that a user had set on it is set again.
    """
    absent = object()
    own, original = vars(instance).get(name, absent), getattr(instance, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(instance, name, replacement)
    try:
        yield
    finally:
        if own is absent:
            delattr(instance, name)
        else:
            setattr(instance, name, own)
