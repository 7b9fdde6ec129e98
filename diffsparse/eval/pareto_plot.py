"""Speed-up against quality, a point for each config, as an SVG that takes its colours from the page."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 16, 48


@dataclass(frozen=True)
class Point:
    """A config: its speed-up, its mean PSNR in dB, and the interval of that."""

    label: str
    speed_up: float
    psnr_db: float
    interval: tuple[float, float] | None = None


def pareto_svg(points: list[Point]) -> str:
    """The plot: further right is faster, further up is closer to dense; a line joins those that no other beats."""
    highs = [point.interval[1] if point.interval else point.psnr_db for point in points]
    lows = [point.interval[0] if point.interval else point.psnr_db for point in points]
    x_ticks = _ticks(min(1.0, *(point.speed_up for point in points)), max(point.speed_up for point in points))
    y_ticks = _ticks(min(lows), max(highs))

    def x(speed_up: float) -> float:
        return LEFT + (speed_up - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y(psnr_db: float) -> float:
        return HEIGHT - BOTTOM - (psnr_db - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="pareto" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="PSNR against speed-up">',
        *(_line("grid", x(t), y(y_ticks[0]), x(t), y(y_ticks[-1])) for t in x_ticks),
        *(_line("grid", x(x_ticks[0]), y(t), x(x_ticks[-1]), y(t)) for t in y_ticks),
        *(_text(x(t), HEIGHT - BOTTOM + 18, f"{t:g}×", "middle") for t in x_ticks),
        *(_text(LEFT - 8, y(t) + 4, f"{t:g}", "end") for t in y_ticks),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "speed-up over dense, whole video", "middle"),
        f'<g transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">'
        + _text(0, 0, "mean PSNR to dense, dB", "middle")
        + "</g>",
    ]
    front = sorted(unbeaten(points), key=lambda point: point.speed_up)
    path = " ".join(f"{x(point.speed_up):.1f},{y(point.psnr_db):.1f}" for point in front)
    parts.append(f'<polyline class="front" points="{path}"/>')
    for point in points:
        at_x, at_y = x(point.speed_up), y(point.psnr_db)
        if point.interval is not None:
            parts.append(_line("interval", at_x, y(point.interval[0]), at_x, y(point.interval[1])))
        parts.append(f'<circle class="point" cx="{at_x:.1f}" cy="{at_y:.1f}" r="5"/>')
        shown = point.label if len(point.label) <= 24 else f"{point.label[:23]}…"
        parts.append(_text(at_x + 9, at_y + 4, shown, "start"))
    return "\n".join([*parts, "</svg>"])


def unbeaten(points: list[Point]) -> list[Point]:
    """The points than which no other is both at least as fast and at least as close, and better in one."""
    return [
        point
        for point in points
        if not any(
            other.speed_up >= point.speed_up
            and other.psnr_db >= point.psnr_db
            and (other.speed_up, other.psnr_db) != (point.speed_up, point.psnr_db)
            for other in points
        )
    ]


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers from at most low to at least high."""
    span = max(high - low, 0.05 * abs(high), 1e-6)
    step = next(s for e in range(-7, 9) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if span / s <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 9) for index in range(first, max(last, first + 1) + 1)]


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
