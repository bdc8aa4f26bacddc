"""The exceptions of sodaprof, one tree by what the caller can do.

SodaprofError
├── FormatError            a file is broken, or newer than this release
├── IllegalScheduleError   a schedule breaks a rule of the format
├── MismatchError          schedule and pipeline do not belong together
├── UnsupportedModelError  the model or scheduler is of a kind that sodaprof cannot drive
└── BudgetError            the budget cannot be met

Each message says what was found, what was expected, and what to type.
"""

import errno
from collections.abc import Iterator

LONGEST = 1000  # characters of a message
# what the allocators of torch, numpy, the C++ library and the operating system say, each in an exception of its own
NO_MEMORY = (
    "not enough memory", "can't allocate memory", "cannot allocate memory", "unable to allocate", "bad_alloc", "bad allocation",
    "out of memory", "failed to map segment", "can't start new thread",
)  # fmt: skip


def printable(text: str, most: int | None = None, kept: str = "") -> str:
    """Returns the text with every character that a terminal acts on, or does not draw, as its escape (`\\x1b`, `\\u202e`).

    That includes line ends; kept: characters that stay as they are. most: a longer text loses its middle.
    """
    text = _cut(text, most)
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
    return _cut("".join(escaped), most)


def _cut(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 5]} […] {text[-end:]}"


class SodaprofError(Exception):
    """Base of every error that a user can do something about. Its text is safe to print, and at most LONGEST characters."""

    def __str__(self) -> str:
        return printable(super().__str__(), LONGEST, kept="\n")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the exception, if there is one, and those during whose handling it was raised, at most 100."""
    for _ in range(100):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def out_of_memory(error: BaseException) -> bool:
    """Whether the exception, or one that led to it, says that memory ran out."""
    for one in causes(error):
        if isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError":
            return True
        if getattr(one, "errno", None) == errno.ENOMEM:
            return True
        text = "" if isinstance(one, SodaprofError) else str(one).lower()
        if "static tls" not in text and any(words in text for words in NO_MEMORY):
            return True
    return False


class FormatError(SodaprofError):
    """A file is broken, or newer than this release reads."""


class IllegalScheduleError(SodaprofError):
    """A schedule breaks a rule of the format."""


class MismatchError(SodaprofError):
    """A schedule and a pipeline (or a profile and a cost table) do not belong together."""


class UnsupportedModelError(SodaprofError):
    """The model or its scheduler is of a kind that sodaprof cannot drive."""


class BudgetError(SodaprofError):
    """The budget cannot be met; the message says what can."""
