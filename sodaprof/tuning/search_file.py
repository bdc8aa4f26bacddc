"""FILE.search: how far a search of `refine` and its joint fit are, so that the same command continues them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..errors import FormatError, MismatchError
from ..formats.files import WHOLE, Number, Record, decode, digest, encode, read_json
from .refine_jumps import JointProgress

Count = Annotated[int, Meta(ge=0, le=WHOLE)]
Half = Annotated[int, Meta(ge=0, lt=2**32)]  # 32 bits of the random generator


class Progress(msgspec.Struct, forbid_unknown_fields=True):
    """How far a search is: what its file holds. Columns are one letter a step, as in `step_letters`."""

    evaluations: Count
    columns: str  # of the incumbent
    score: Number  # of the incumbent on the search generations, dB
    best: str
    best_score: Number  # on the validation generations, dB
    best_at: Count  # number of evaluations after which it was found
    misses: Count  # improvements since then that the validation generations did not confirm
    tried: list[str]
    # state of the random generator: its version, 624 halves and a position, no Gaussian kept
    generator: tuple[Literal[3], Annotated[tuple[Half, ...], Meta(min_length=625, max_length=625)], None]


class SearchFile(Record, frozen=True):
    """The content of FILE.search."""

    FORMAT = "sodaprof.refine", 4
    request: str  # digest of all settings
    digest: str  # of the search and the joint fit
    search: Progress
    joint: JointProgress | None = None


def state_file(output: Path) -> Path:
    """Returns the file that holds how far the search for `output` is."""
    return output.with_name(output.name + ".search")


def read_state(path: Path, request: str) -> SearchFile | None:
    """Returns the content of a file; None if there is no file, MismatchError if it is of another request."""
    if not path.exists():
        return None
    anew = "Delete it to search anew, with --force if the output is there."
    try:
        state = decode(read_json(path), SearchFile, str(path), "")
        if state.digest != digest((encode(state.search), encode(state.joint))):
            raise FormatError("its content is not that of its digest")
    except FormatError as error:
        raise FormatError(f"{path}: no state of a search that this release continues ({error}). {anew}") from None
    if state.request != request:
        raise MismatchError(
            f"{path}: holds a search from another schedule or with other settings. Repeat its settings to continue it. {anew}"
        )
    return state
