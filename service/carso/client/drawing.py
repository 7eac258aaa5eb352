"""One picture of one explained prediction: input | amplified difference | purified | votes.

It needs Pillow, which the base install does not hold.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from carso.client.results import Explanation, RobustPrediction

if TYPE_CHECKING:
    from PIL.Image import Image

TILE = 168  # pixels: the least that the longer side of an image is shown at
GAP, CAPTION = 12, 18  # pixels, round each tile and below it
COLUMNS = 3  # of the small pictures
BACKGROUND, INK, QUIET, LEADER = "#ffffff", "#1c2430", "#5b6675", "#0b6e6e"
BELOW, ABOVE = (33, 102, 172), (178, 24, 43)  # what purifying made brighter and darker: blue and red of ColorBrewer


def picture(prediction: RobustPrediction) -> bytes:
    """Draw an explained prediction as a PNG file. Raises ImportError without Pillow."""
    from PIL import Image, ImageDraw

    explanation = prediction.explanation
    if explanation is None or prediction.tally is None:
        raise ValueError("this prediction has no explanation: ask for it with explain=True")
    read, purified = (_opened(png) for png in (explanation.input, explanation.mean))
    difference, amplified = _difference(read, purified)
    factor = -(-TILE // max(read.size))
    width, height = (factor * side for side in read.size)
    small = _votes(explanation, width)
    bars_width = max(width, 12 * GAP)
    lower = max(height, small.height)
    whole = Image.new("RGB", (4 * width + bars_width + 6 * GAP, lower + CAPTION + 2 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(whole)
    tiles = (
        (read.convert("RGB"), f"input: the fast path says {explanation.first_pass.class_name}"),
        (difference, f"difference x {amplified:g}"),
        (purified.convert("RGB"), f"purified: mean of {explanation.averaged}"),
    )
    left = GAP
    for tile, caption in tiles:
        whole.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, GAP))
        draw.text((left, GAP + lower + 3), caption, fill=QUIET)
        left += width + GAP
    whole.paste(small, (left, GAP))
    draw.text((left, GAP + lower + 3), f"the first {len(explanation.votes)} of {prediction.votes} votes", fill=QUIET)
    left += width + GAP
    _bars(draw, prediction, box=(left, GAP, left + bars_width, GAP + lower))
    draw.text((left, GAP + lower + 3), f"the vote says {prediction.class_name}", fill=INK)
    file = io.BytesIO()
    whole.save(file, "PNG")
    return file.getvalue()


def _opened(png: bytes) -> Image:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def _difference(read: Image, purified: Image) -> tuple[Image, float]:
    """Show where `purified` is darker (red) or brighter (blue) than what was read, and how much it is amplified."""
    from PIL import Image, ImageChops

    before, after = (image.convert("L") for image in (read, purified))
    darker, brighter = ImageChops.subtract(before, after), ImageChops.subtract(after, before)
    largest = max(level for image in (darker, brighter) for level, count in enumerate(image.histogram()) if count)
    amplified = max(1.0, round(255 / max(largest, 1), 1))
    shown = Image.new("RGB", read.size, BACKGROUND)
    for part, colour in ((darker, ABOVE), (brighter, BELOW)):
        mask = part.point([min(255, round(amplified * value)) for value in range(256)])
        shown.paste(colour, (0, 0), mask)
    return shown, amplified


def _votes(explanation: Explanation, width: int) -> Image:
    """Show the purified images of the first votes in rows of COLUMNS, `width` pixels wide, each with its class."""
    from PIL import Image, ImageDraw

    across = (width - (COLUMNS - 1) * 6) // COLUMNS
    pictures = [(_opened(vote.image), vote.class_name) for vote in explanation.votes]
    wide, high = pictures[0][0].size
    down = max(1, across * high // wide)
    rows = -(-len(pictures) // COLUMNS)
    whole = Image.new("RGB", (width, rows * (down + CAPTION)), BACKGROUND)
    draw = ImageDraw.Draw(whole)
    for index, (image, name) in enumerate(pictures):
        row, column = divmod(index, COLUMNS)
        at = (column * (across + 6), row * (down + CAPTION))
        whole.paste(image.convert("RGB").resize((across, down), Image.Resampling.NEAREST), at)
        draw.text((at[0], at[1] + down + 1), name[:12], fill=INK)
    return whole


def _bars(draw: object, prediction: RobustPrediction, *, box: tuple[int, int, int, int]) -> None:
    """Draw the classes with most votes, as many as fit, as bars."""
    from PIL.ImageDraw import ImageDraw

    assert isinstance(draw, ImageDraw)  # noqa: S101  narrows the type; Pillow is imported late
    tally = prediction.tally or ()
    left, top, right, bottom = box
    shown = sorted(range(len(tally)), key=lambda label: (-tally[label], label))[: (bottom - top) // CAPTION]
    most = max(tally)
    for row, label in enumerate(label for label in shown if tally[label]):
        y = top + row * CAPTION
        end = left + 28 + round((right - left - 70) * tally[label] / most)
        draw.text((left, y + 2), str(label), fill=QUIET)
        draw.rectangle((left + 28, y + 3, end, y + CAPTION - 5), fill=LEADER if label == prediction.label else QUIET)
        draw.text((end + 5, y + 2), str(tally[label]), fill=INK)
