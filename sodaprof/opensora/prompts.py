"""How Open-Sora v1.2 prepares a prompt for its tokenizer, and its names of sizes."""

from __future__ import annotations

from functools import partial

from diffusers import PixArtAlphaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from ..errors import SodaprofError


def with_scores(prompt: str, aes: float | None, flow: float | None, camera_motion: str | None) -> str:
    """Returns the prompt with the scores of the training captions appended, except for those that it names itself."""
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
    """Returns the prompt lower-cased and without addresses, markup and odd punctuation, as DeepFloyd cleans captions.

    Raises SodaprofError if the packages that this needs are missing.
    """
    if not (is_ftfy_available() and is_bs4_available()):
        raise SodaprofError(
            "Open-Sora's prompts are cleaned with ftfy and beautifulsoup4, which are not installed. "
            "Type: pip install ftfy beautifulsoup4 (or pass clean_caption=False; the published weights were trained with "
            "cleaned captions)"
        )
    clean = partial(PixArtAlphaPipeline._clean_caption, PixArtAlphaPipeline)  # which needs a pattern of its class alone
    return clean(clean(prompt))


RATIOS = ("9:16", "16:9", "1:1", "3:4", "4:3", "1:2", "2:1")  # height:width
SIZES: dict[str, tuple[tuple[int, int], ...]] = {  # (height, width) in the order of RATIOS; no formula gives them all
    "144p": ((144, 256), (256, 144), (192, 192), (166, 221), (221, 165), (135, 270), (271, 135)),
    "240p": ((240, 426), (426, 240), (320, 320), (276, 368), (370, 278), (226, 452), (452, 226)),
    "360p": ((360, 640), (640, 360), (480, 480), (416, 554), (554, 416), (340, 680), (678, 340)),
    "480p": ((480, 854), (854, 480), (640, 640), (554, 738), (740, 555), (452, 904), (906, 454)),
    "720p": ((720, 1280), (1280, 720), (960, 960), (832, 1110), (1108, 832), (678, 1356), (1358, 680)),
}


def size_of(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Returns height and width in pixels of a name such as "480p" and a ratio height:width such as "9:16"."""
    if resolution not in SIZES or aspect_ratio not in RATIOS:
        raise SodaprofError(
            f"No size {resolution} {aspect_ratio}; expected {', '.join(SIZES)} and {', '.join(RATIOS)} (height:width). "
            "Give height and width for others."
        )
    return SIZES[resolution][RATIOS.index(aspect_ratio)]
