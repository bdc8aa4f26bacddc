"""Replaces a method of one instance for a while, and knows the copies that are made of the instance in that time."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(
    instance: Any,
    name: str,
    wrapper: Callable[..., Any],
    copies: Callable[..., Any] | None = None,
    owner: Any = None,
) -> Iterator[None]:
    """Replaces the method `name` by wrapper(original, *args, **kwargs) while the block runs; end nested blocks in reverse.

    The instance gets a class of its own, of the same name and with the signatures of the original, which pipelines inspect.
    Afterwards it is as before: an attribute that a user had set on it is set again. A copy of the instance (`copy`,
    `deepcopy`) runs copies(copy, original, *args, **kwargs) while the block runs, by default the method of its class, and that
    method afterwards; what is pickled is a plain instance. owner: found by `owner_of` while the block runs.
    """
    cls, absent, active, inside = type(instance), object(), True, False
    own = vars(instance).pop(name, absent)
    method = getattr(cls, name)

    @functools.wraps(method)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        original = method.__get__(self)
        if active and self is instance and not inside:
            inside = own is not absent  # what a user set may call the method of the class
            try:
                return wrapper(original if own is absent else own, *args, **kwargs)
            finally:
                inside = False
        if active and copies is not None and self in copied:
            return copies(self, original, *args, **kwargs)
        return original(*args, **kwargs)

    body = {name: replacement, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    copied: Any = weakref.WeakSet()  # the deep copies, and theirs; what the class itself makes is none
    body |= {"_original": weakref.ref(instance), "_copied": copied, "_replaced": {} if own is absent else {name: own}}
    body |= {"__deepcopy__": _deepcopy, "__reduce_ex__": _reduce}
    patched_cls: Any = type(cls.__name__, (cls,), body | ({} if owner is None else {"_owner": owner}))
    instance.__class__ = patched_cls
    try:
        yield
    finally:
        active = False
        if owner is not None:
            del patched_cls._owner
        instance.__class__ = cls
        if own is not absent:
            setattr(instance, name, own)


def owner_of(instance: Any) -> Any:
    """Returns the owner of a patch on this instance, or on the one that it is a copy of; None if there is none."""
    for cls in type(instance).__mro__:
        patch = vars(cls)
        if "_owner" in patch and (instance is patch["_original"]() or instance in patch["_copied"]):
            return patch["_owner"]
    return None


def replaced(instance: Any, name: str) -> Any:
    """Returns the attribute that a user had set in place of a method before it was patched, if there is one."""
    classes = (vars(cls).get("_replaced", {}) for cls in type(instance).__mro__)
    return next((found[name] for found in classes if name in found), vars(instance).get(name))


def _plain_class(instance: Any) -> type:
    return next(cls for cls in type(instance).__mro__ if "_replaced" not in vars(cls))


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    with_pipeline = id(getattr(owner_of(self), "pipe", None)) in memo  # the copied pipeline is plain
    made: Any = object.__new__(_plain_class(self) if with_pipeline else type(self))
    memo[id(self)] = made
    vars(made).update(copy.deepcopy(vars(self), memo))
    for cls in type(made).__mro__:
        if "_copied" in vars(cls):
            vars(cls)["_copied"].add(made)
    return made


def _reduce(self: Any, protocol: Any) -> Any:
    # as protocol 1 makes an instance: that of later ones requires the class that the instance has now
    reduced: Any = object.__reduce_ex__(self, 1)
    return reduced[0], (_plain_class(self), *reduced[1][1:]), *reduced[2:]
