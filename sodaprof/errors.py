"""The exceptions of sodaprof, one tree by what the caller can do.

SodaprofError
├── FormatError            a file is broken, or newer than this release
├── IllegalScheduleError   a schedule breaks a rule of the format
├── MismatchError          schedule and pipeline do not belong together
├── UnsupportedModelError  the model or scheduler is of a kind that sodaprof cannot drive
└── BudgetError            the budget cannot be met

Each message says what was found, what was expected, and what to type.
"""


class SodaprofError(Exception):
    """Base of every error that a user can do something about."""


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
