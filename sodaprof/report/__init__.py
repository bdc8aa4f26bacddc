"""Presentation: plain data in, rich renderables and picture files out. Nothing here computes or prints."""

from __future__ import annotations

from typing import Any

from ..errors import printable


def shown(value: Any, most: int = 100) -> str:
    """Returns a value of a file as text for a terminal: cut to `most` characters, control characters escaped."""
    return printable(str(value), most)


def guidance_text(scale: float | None, form: str = "") -> str:
    """Returns guidance in words: "guidance 4.0 in halves", "no guidance scale"; "" for a form is left out."""
    text = "no guidance scale" if scale is None else f"guidance {scale}"
    return text if form in ("", "none") else f"{text} in {form}"
