"""Makes the picture of README.md: the full run, the default policy at 3.5x and the best published method at its cost.

Under the pictures of a method are their differences to the full run, enlarged tenfold.

python -m tests.studies.readme_picture docs/studies/results/readme.png

The figures under each row are those of `sodaprof.evaluate` on 64 held-out seeds, on the machine that runs this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sodaprof

MODEL, SCHEDULE = "tiny-dit", "schedules/tiny-dit/solver-3.5x.json"
PUBLISHED = "fewer steps, UniPC"  # the best published row of docs/studies/results.md at 3.5x
TILE, GAP, PICTURES, ENLARGED = 80, 4, 8, 10


def main() -> None:
    """Evaluates the schedule and its control, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the PNG to write")
    parser.add_argument("--samples", type=int, default=64, help="held-out seeds")
    arguments = parser.parse_args()
    pipe = sodaprof.load_pipeline(MODEL)
    schedule = sodaprof.load_schedule(SCHEDULE)
    result = sodaprof.evaluate(pipe, [schedule], samples=arguments.samples, controls=[PUBLISHED])
    sheet(captions(result), list(result["pictures"].values())).save(arguments.output, optimize=True)
    print("\n".join(captions(result)))


def captions(result: dict[str, object]) -> list[str]:
    """Returns one line a row: the method, the seconds a picture, the PSNR to the full run."""
    full_seconds = result["full"]["seconds_a_sample"]  # type: ignore[index]
    ours, published = result["rows"]  # type: ignore[misc]
    lines = [f"full run, 50 steps: {full_seconds:.2f} s a picture"]
    spacing = published["detail"].replace("anchors", "placed as ours")
    for name, row in (("sodaprof, solver --fit", ours), (f"best published: UniPC, {spacing}", published)):
        seconds = full_seconds / row["wall_speedup"]
        quality = row["psnr_db"]["mean"]
        lines.append(
            f"{name}, {row['flops_speedup']:.1f}x: {seconds:.2f} s a picture, {quality:.1f} dB to the full run"
        )
    return lines


def sheet(lines: list[str], methods: list[np.ndarray]) -> Image.Image:
    """Returns the pictures [n, H, W, 3] in [0, 1] of each method, its line below, and the differences to the first method."""
    font = ImageFont.load_default(size=14)
    rows: list[tuple[str, np.ndarray]] = [(lines[0], methods[0])]
    for line, pictures in zip(lines[1:], methods[1:], strict=True):
        rows += [("", pictures), (line, 1 - ENLARGED * np.abs(pictures - methods[0]))]
    width = PICTURES * (TILE + GAP) - GAP
    image = Image.new("RGB", (width, sum(TILE + (26 if line else GAP) for line, _ in rows)), "white")
    draw, top = ImageDraw.Draw(image), 0
    for line, pictures in rows:
        for x, picture in enumerate(pictures[:PICTURES]):
            pixels = Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))
            image.paste(pixels.resize((TILE, TILE), Image.Resampling.NEAREST), (x * (TILE + GAP), top))
        draw.text((0, top + TILE + 2), line, fill="black", font=font)
        top += TILE + (26 if line else GAP)
    return image


if __name__ == "__main__":
    main()
