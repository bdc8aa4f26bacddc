"""What Open-Sora v1.2 makes of a prompt before its tokenizer sees it."""

from __future__ import annotations

from diffusers import PixArtAlphaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from ...errors import SodaprofError


class _Cleaner:
    """The caption cleaner of DeepFloyd as diffusers has it, without a pipeline around it."""

    bad_punct_regex = PixArtAlphaPipeline.bad_punct_regex
    clean = PixArtAlphaPipeline._clean_caption


def with_scores(prompt: str, aes: float | None, flow: float | None, camera_motion: str | None) -> str:
    """Returns the prompt with the scores that the captions of the training set had, each where it has none of its own."""
    suffixes = {
        "aesthetic score:": None if aes is None else f"{aes:.1f}",
        "motion score:": None if flow is None else f"{flow:.1f}",
        "camera motion:": camera_motion,
    }
    for phrase, value in suffixes.items():
        if value is not None and phrase not in prompt:
            prompt = f"{prompt} {phrase} {value}."
    return prompt


def cleaned(prompt: str) -> str:
    """Returns the prompt lower-cased and without addresses, markup and odd punctuation.

    SodaprofError where the packages that this takes are missing.
    """
    if not (is_ftfy_available() and is_bs4_available()):
        raise SodaprofError(
            "Open-Sora's prompts are cleaned with ftfy and beautifulsoup4, which are not installed. "
            "Type: pip install ftfy beautifulsoup4 (or pass clean_caption=False, which the published weights have not seen)"
        )
    cleaner = _Cleaner()
    return cleaner.clean(cleaner.clean(prompt))
