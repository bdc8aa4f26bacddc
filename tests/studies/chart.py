"""A figure of a comparison: PSNR over speed-up, one line a method, as SVG text."""

from __future__ import annotations

import math
from html import escape
from typing import Any

WIDTH, HEIGHT = 900, 560
LEFT, RIGHT, TOP, BOTTOM = 56, 230, 34, 46  # room for axes and, on the right, for the names
LINE = 15  # pixels between the names at least


def comparison_svg(data: dict[str, Any]) -> str:
    """Returns the figure of a comparison's tables; new methods are thick, samplers with fewer steps are dashed."""
    lines: dict[str, list[tuple[float, float]]] = {}
    kinds: dict[str, tuple[bool, bool]] = {}
    for entry in data["budgets"]:
        for row in entry["rows"]:
            lines.setdefault(row["name"], []).append((row["flops_speedup"], row["psnr_db"]["mean"]))
            kinds[row["name"]] = row["ours"], row["works_by"] == ["fewer steps"]
    points = [point for line in lines.values() for point in line]
    left, right = math.log(min(x for x, _ in points) * 0.97), math.log(max(x for x, _ in points) * 1.03)
    low, high = math.floor(min(y for _, y in points) / 5) * 5, math.ceil(max(y for _, y in points) / 5) * 5
    across = lambda x: LEFT + (math.log(x) - left) / (right - left) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    down = lambda y: HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731

    title = f"{escape(data['model'])}: PSNR to the full run in dB over speed-up in FLOPs"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
    ]
    for y in range(low, high + 1, 5):
        parts.append(
            f'<path d="M{LEFT} {down(y):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y}</text>'
        )
    for entry in data["budgets"]:
        x = across(entry["budget"])
        parts.append(
            f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{entry["budget"]:g}×</text>'
        )
    names = sorted(lines, key=lambda name: -max(lines[name])[1])
    heights = _apart([down(max(lines[name])[1]) for name in names])
    for number, (name, at) in enumerate(zip(names, heights, strict=True)):
        ours, fewer = kinds[name]
        colour = f"hsl({number * 137 % 360},{75 if ours else 45}%,{38 if ours else 52}%)"
        line = sorted(lines[name])
        path = "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in line)
        style = f'stroke="{colour}" stroke-width="{3 if ours else 1.5}"' + (' stroke-dasharray="5 4"' if fewer else "")
        parts.append(f'<path d="{path}" fill="none" {style}/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y in line]
        x, y = across(line[-1][0]), down(line[-1][1])
        parts.append(
            f'<path d="M{x:.1f} {y:.1f}L{WIDTH - RIGHT + 14} {at:.1f}" fill="none" stroke="{colour}" stroke-width="0.5"/>'
        )
        weight = ' font-weight="bold"' if ours else ""
        parts.append(f'<text x="{WIDTH - RIGHT + 18}" y="{at + 4:.1f}" fill="{colour}"{weight}>{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _apart(heights: list[float]) -> list[float]:
    """Returns the heights, from top to bottom, moved so that none is nearer than LINE to the next and all are in the figure."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + LINE) if placed else max(height, TOP))
    limit = float(HEIGHT - 10)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - LINE
    return placed
