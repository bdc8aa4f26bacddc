"""The sizes that Open-Sora v1.2 names. Other sizes have no names: give their pixels."""

from __future__ import annotations

from ...errors import SodaprofError

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
