"""The knobs of a policy: a frozen dataclass, one field a knob, with its default, its meaning and the values that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..errors import BudgetError

K = TypeVar("K")


@dataclass(frozen=True)
class Values:
    """What a knob means, and the values that it takes: of a kind, and one of several or a number from `least` to `most`.

    depth: it says how many outputs are kept, down to 1.
    """

    help: str
    kind: type
    one_of: tuple[Any, ...]
    least: float
    most: float
    depth: bool

    def __str__(self) -> str:
        if self.one_of:
            return f"one of {', '.join(map(str, self.one_of))}"
        if self.least == -math.inf:
            return self.kind.__name__
        return f"at least {self.least:g}" if self.most == math.inf else f"{self.least:g} to {self.most:g}"

    def read(self, name: str, given: Any) -> Any:
        """Returns the given text or value in the knob's kind; BudgetError if it is none of the knob's values."""
        try:
            value = self.kind(given)
            if self.kind is not str and (not math.isfinite(value) or value != float(given)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise BudgetError(f"Knob {name} is {given!r}; expected {self.kind.__name__}.") from None
        if value not in self.one_of if self.one_of else self.kind is not str and not self.least <= value <= self.most:
            raise BudgetError(f"Knob {name} is {value if self.kind is not str else repr(value)}; expected {self}.")
        return value


def knob(
    default: Any,
    help: str,
    *,
    kind: type | None = None,
    one_of: Iterable[Any] = (),
    least: float = -math.inf,
    most: float = math.inf,
    depth: bool = False,
) -> Any:
    """Returns a field of a knobs dataclass. kind: of a knob whose default is None, which the policy fills in."""
    values = Values(help, kind or type(default), tuple(one_of), least, most, depth)
    return field(default=default, metadata={"values": values})


def values_of(knobs: type) -> dict[str, Values]:
    """Returns the values of each knob of a knobs dataclass, by name."""
    return {one.name: one.metadata["values"] for one in fields(knobs)}


def read_knobs(policy: str, knobs: type[K], given: Mapping[str, Any]) -> K:
    """Returns the knobs with the given texts or values in place of their defaults.

    Raises BudgetError for a knob that the policy does not have, a value of another type, and one out of range.
    """
    known = values_of(knobs)
    for name in given:
        if name not in known:
            raise BudgetError(f"Policy {policy} has no knob {name!r}; it has {', '.join(known)}.")
    return knobs(**{name: known[name].read(name, value) for name, value in given.items()})
