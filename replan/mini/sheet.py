"""A contact sheet: items side by side with their exact plans, exact targets and, if given, results."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from replan.mini.instructions import Item
from replan.mini.scenes import SIZE, draw

ZOOM, GAP, TEXT = 2, 8, 44
BOX_COLOURS = ("#e6194b", "#4363d8", "#f58231", "#911eb4")


def contact_sheet(items: Sequence[Item], results: Sequence[Image.Image] = (), columns: int = 3) -> Image.Image:
    """One tile per item: the instruction, then source with boxes, exact target and (when given) the result."""
    pictures = 3 if results else 2
    width, height = pictures * (SIZE.width * ZOOM + GAP) + GAP, SIZE.height * ZOOM + TEXT + GAP
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height + GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, item in enumerate(items):
        left, top = number % columns * width + GAP, number // columns * height + GAP
        per_line = (width - 2 * GAP) // 7
        canvas.multiline_text((left, top), "\n".join(textwrap.wrap(item.instruction, per_line)[:2]), "#222222", font)
        tile = [draw(item.scene), draw(item.target), *([results[number]] if results else [])]
        for place, picture in enumerate(tile):
            zoomed = picture.resize((SIZE.width * ZOOM, SIZE.height * ZOOM), Image.Resampling.LANCZOS)
            sheet.paste(zoomed, (left + place * (SIZE.width * ZOOM + GAP), top + TEXT - GAP))
            if place == 0:
                _outline(canvas, item, left, top + TEXT - GAP)
    return sheet


def _outline(canvas: ImageDraw.ImageDraw, item: Item, left: int, top: int) -> None:
    """The plan's boxes, drawn at the sheet's resolution so that the lines stay thin."""
    for number, region in enumerate(item.plan.regions):
        box = region.box
        corners = (left + box.left * ZOOM, top + box.top * ZOOM, left + box.right * ZOOM, top + box.bottom * ZOOM)
        canvas.rectangle(corners, outline=BOX_COLOURS[number % len(BOX_COLOURS)], width=2)
