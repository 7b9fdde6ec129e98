"""One video of two, side by side, each under its title."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsparse.eval.video_io import Image, as_bytes

# Smaller videos are enlarged by a whole number, pixel by pixel, so that nothing is smoothed over.
SMALLEST_PANE = 320

BACKGROUND = (24, 24, 24)
TITLE_COLOUR = (240, 240, 240)
SUBTITLE_COLOUR = (170, 170, 170)


def side_by_side(
    left: NDArray[Any],
    right: NDArray[Any],
    titles: tuple[str, str],
    subtitles: tuple[str, str] = ("", ""),
    heading: str = "",
) -> Image:
    """Two videos [F, H, W, 3] in one of uint8, of even height and width.

    The heading stands above both, a title and a subtitle above each.

    Raises:
        ValueError: the videos differ in shape.
    """
    if left.shape != right.shape:
        raise ValueError(f"The videos must have one shape to lie side by side, got {left.shape} and {right.shape}.")
    height, width = left.shape[1:3]
    factor = max(1, -(-SMALLEST_PANE // width))
    pane_height, pane_width = height * factor, width * factor
    gap = max(4, pane_width // 80)
    strip = titles_strip(pane_width, gap, titles, subtitles, heading)

    # Even sizes, as H.264 wants them.
    total_height = _even(strip.shape[0] + pane_height)
    canvas = np.empty((left.shape[0], total_height, _even(strip.shape[1]), 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    canvas[:, : strip.shape[0], : strip.shape[1]] = strip
    for start, video in ((0, left), (pane_width + gap, right)):
        enlarged = as_bytes(video).repeat(factor, axis=1).repeat(factor, axis=2)
        canvas[:, strip.shape[0] : strip.shape[0] + pane_height, start : start + pane_width] = enlarged
    return canvas


def titles_strip(pane_width: int, gap: int, titles: tuple[str, str], subtitles: tuple[str, str], heading: str) -> Image:
    """What stands above the two panes [height, 2 × pane_width + gap, 3]."""
    import PIL.Image
    from PIL import ImageDraw

    title_size, subtitle_size = max(14, pane_width // 20), max(11, pane_width // 28)
    margin = title_size // 2
    full_width = 2 * pane_width + gap
    # Text, size, colour, left edge and width of its room; one list for each line.
    panes = (0, pane_width + gap)
    lines = [[(heading, subtitle_size, SUBTITLE_COLOUR, 0, full_width)]]
    lines += [[(text, title_size, TITLE_COLOUR, left, pane_width) for text, left in zip(titles, panes)]]
    lines += [[(text, subtitle_size, SUBTITLE_COLOUR, left, pane_width) for text, left in zip(subtitles, panes)]]

    height = margin + sum(line[0][1] + margin for line in lines)
    strip = PIL.Image.new("RGB", (full_width, height), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    top = margin
    for line in lines:
        for text, size, colour, left, width in line:
            # A line break, as a prompt may have, cannot be drawn on a line.
            text = " ".join(text.split())
            draw.text((left + margin, top), text, colour, _font(text, size, width - 2 * margin), anchor="lt")
        top += line[0][1] + margin
    return np.asarray(strip)


def _font(text: str, size: int, room: int) -> Any:
    """A font of the size, or the largest smaller one in which the text fits the room in pixels."""
    import matplotlib
    from PIL import ImageFont

    # Pillow's own font has no × and few letters beyond English.
    # As a string: Pillow 10.1 opens no Path.
    file = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    while size > 7 and ImageFont.truetype(file, size).getlength(text) > room:
        size -= 1
    return ImageFont.truetype(file, size)


def _even(size: int) -> int:
    return size + size % 2
