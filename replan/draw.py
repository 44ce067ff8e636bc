"""Pictures for people: a plan over its picture, and the matrix of who reads whom. PIL and its built-in font only."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from replan.rules import RoleKind, Rules, matrix
from replan.types import Box, Grid, Plan, Size

Colour = tuple[int, int, int]
Schedule = Sequence[tuple[float, Rules]]  # (until this share of the steps, rules), as `rules.schedule` gives it

SMALLEST, LARGEST = 640, 2048  # pixels of the longer side; smaller pictures are magnified by a whole factor
WHITE, BLACK, INK, FAINT = (255, 255, 255), (0, 0, 0), (31, 41, 55), (233, 236, 240)
NEUTRAL = (71, 85, 105)  # a cell of the matrix that belongs to no region
_PALETTE: tuple[Colour, ...] = (
    (230, 57, 70),
    (29, 122, 214),
    (34, 160, 84),
    (240, 140, 0),
    (147, 51, 200),
    (0, 160, 170),
    (214, 51, 132),
    (140, 100, 40),
)
_FAMILIES = {
    RoleKind.MAIN.value: "text",
    RoleKind.VISION.value: "text",
    RoleKind.HINT.value: "hints",
    RoleKind.NOISE_REGION.value: "noise",
    RoleKind.NOISE_BACKGROUND.value: "noise",
    RoleKind.REF_REGION.value: "ref",
    RoleKind.REF_BACKGROUND.value: "ref",
}


def colour(number: int) -> Colour:
    """The colour of region `number`, from 1: eight chosen ones, then hues that keep apart."""
    if number <= len(_PALETTE):
        return _PALETTE[number - 1]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.381966 % 1.0, 0.75, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_plan(image: Image.Image, plan: Plan, grid: Grid | None = None, expand: float = 0.0) -> Image.Image:
    """The picture with numbered boxes and hints, and below it the prompts in full.

    With `grid`, also the token grid, and the tokens that belong to each region (of the box grown by `expand`) tinted.
    """
    size = Size(*image.size)
    factor = -(-SMALLEST // max(size)) if max(size) < SMALLEST else min(1.0, LARGEST / max(size))
    canvas = Size(max(1, round(size.width * factor)), max(1, round(size.height * factor)))
    picture = image.convert("RGB").resize(canvas, Image.Resampling.LANCZOS)
    boxes = [region.box for region in plan.to(size).regions]
    if grid is not None:
        picture = _tint(picture, [box.expand(expand, size) for box in boxes], size, grid)
    draw = ImageDraw.Draw(picture)
    line = max(3, max(canvas) // 220)
    scaled = [box.rescale(size, canvas) for box in boxes]
    for number, box in enumerate(scaled, 1):
        _frame(draw, box, colour(number), line)
    placed: list[Box] = []
    for number, (box, region) in enumerate(zip(scaled, plan.regions, strict=True), 1):
        placed.append(_label(draw, box, f"{number}  {region.hint}", colour(number), placed))
    lines = [("main", INK, plan.prompt), *((str(n), colour(n), r.hint) for n, r in enumerate(plan.regions, 1))]
    return stack([picture, _caption(lines, canvas.width)])


def draw_matrix(schedule: Schedule, *, vision: bool = True, width: int = 0) -> Image.Image:
    """Who reads whom, one panel per phase: a row per reader, a column per what it reads; region colours as in the plan.

    `vision=False` leaves out the image prompt (Flux has none); `width` asks for a canvas at least that wide.
    """
    names, _ = matrix(schedule[0][1], vision=vision)
    cell = max(11, min(30, 620 // len(names)))
    tables = [matrix(rules, vision=vision)[1] for _, rules in schedule]
    changing = {
        (row, column)
        for row in range(len(names))
        for column in range(len(names))
        if len({table[row][column] for table in tables}) > 1
    }
    panels, start = [], 0.0
    for (until, _), table in zip(schedule, tables, strict=True):
        panels.append(_panel(f"steps {start:.0%} to {until:.0%}", names, table, changing, cell))
        start = until
    across = sum(panel.width for panel in panels)
    wide = across <= max(width, 1400) or len(names) > 24
    if not wide:
        return stack(panels, width)
    canvas = Image.new("RGB", (max(width, across), max(panel.height for panel in panels)), WHITE)
    left = (canvas.width - across) // 2
    for panel in panels:
        canvas.paste(panel, (left, 0))
        left += panel.width
    return canvas


def draw_mask(
    image: Image.Image, plan: Plan, schedule: Schedule, grid: Grid, *, expand: float = 0.0, vision: bool = True
) -> Image.Image:
    """The plan over its token grid, and below it the matrix of every phase."""
    picture = draw_plan(image, plan, grid, expand)
    return stack([picture, draw_matrix(schedule, vision=vision, width=picture.width)])


def matrix_table(schedule: Schedule, *, vision: bool = True) -> str:
    """The same matrix as text: one block per phase, a dot where the row's role reads the column's."""
    names, _ = matrix(schedule[0][1], vision=vision)
    codes = [_code(name) for name in names]
    margin = max(len(name) for name in names)
    blocks, start = [], 0.0
    for until, rules in schedule:
        lines = [f"steps {start:.0%} to {until:.0%}".ljust(margin) + " reads"]
        lines.append(" " * margin + "".join(f" {code:>3}" for code in codes))
        for name, row in zip(names, matrix(rules, vision=vision)[1], strict=True):
            lines.append(name.ljust(margin) + "".join("   ●" if seen else "   ·" for seen in row))
        blocks.append("\n".join(line.rstrip() for line in lines))
        start = until
    return "\n\n".join(blocks)


def stack(parts: Sequence[Image.Image], width: int = 0) -> Image.Image:
    """Pictures one above the other, centred on white."""
    width = max(width, *(part.width for part in parts))
    canvas = Image.new("RGB", (width, sum(part.height for part in parts)), WHITE)
    top = 0
    for part in parts:
        canvas.paste(part, ((width - part.width) // 2, top))
        top += part.height
    return canvas


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _tint(picture: Image.Image, boxes: Sequence[Box], size: Size, grid: Grid) -> Image.Image:
    """Colour the tokens of each region and rule the token grid, both see-through."""
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    xs = [column * picture.width // grid.columns for column in range(grid.columns + 1)]
    ys = [row * picture.height // grid.rows for row in range(grid.rows + 1)]
    for number, box in enumerate(boxes, 1):
        part = box.cells(size, grid)
        if part.area:
            shade = Image.new("RGBA", picture.size, (0, 0, 0, 0))
            corners = (xs[part.left], ys[part.top], xs[part.right] - 1, ys[part.bottom] - 1)
            ImageDraw.Draw(shade).rectangle(corners, fill=(*colour(number), 70))
            layer = Image.alpha_composite(layer, shade)
    draw = ImageDraw.Draw(layer)
    # dark and light side by side show on any ground; very fine grids stay fainter
    strength = 90 if xs[1] - xs[0] >= 12 else 45
    for x in xs[1:-1]:
        draw.line((x, 0, x, picture.height), fill=(255, 255, 255, strength))
        draw.line((x - 1, 0, x - 1, picture.height), fill=(0, 0, 0, strength))
    for y in ys[1:-1]:
        draw.line((0, y, picture.width, y), fill=(255, 255, 255, strength))
        draw.line((0, y - 1, picture.width, y - 1), fill=(0, 0, 0, strength))
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def _frame(draw: ImageDraw.ImageDraw, box: Box, tone: Colour, line: int) -> None:
    """A coloured outline with a white edge on both sides."""
    left, top, right, bottom = box.left, box.top, max(box.left, box.right - 1), max(box.top, box.bottom - 1)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=WHITE, width=line + 2)
    draw.rectangle((left, top, right, bottom), outline=tone, width=line)


def _label(draw: ImageDraw.ImageDraw, box: Box, text: str, tone: Colour, placed: Sequence[Box]) -> Box:
    """Write a hint at its box where no other label is yet, outlined, on the region's colour; return where."""
    canvas = draw.im.size
    font = _font(max(15, max(canvas) // 42))
    width = min(max(box.width, canvas[0] * 2 // 5), canvas[0] - 4)
    lines = _wrap(text, font, width - 12)
    lines = lines if len(lines) <= 2 else [lines[0], _shorten(lines[1], font, width - 12)]
    block = "\n".join(lines)
    extent = draw.multiline_textbbox((0, 0), block, font=font, stroke_width=2)
    wide, high = int(extent[2] - extent[0]) + 10, int(extent[3] - extent[1]) + 8
    left = max(0, min(box.left, canvas[0] - wide))
    spots = [box.top - high, box.bottom, box.top, box.bottom - high, *range(0, canvas[1] - high, max(1, high // 2))]
    spots = [Box(left, top, left + wide, top + high) for top in spots if 0 <= top <= canvas[1] - high]
    spot = next((each for each in spots if all(each.iou(other) == 0.0 for other in placed)), None)
    spot = spot or Box(left, max(0, box.top - high), left + wide, max(0, box.top - high) + high)
    draw.rounded_rectangle(spot.as_tuple(), radius=4, fill=tone, outline=WHITE, width=1)
    at = (spot.left + 5 - extent[0], spot.top + 4 - extent[1])
    dark: Colour = (tone[0] // 3, tone[1] // 3, tone[2] // 3)
    draw.multiline_text(at, block, font=font, fill=WHITE, stroke_width=2, stroke_fill=dark)
    return spot


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break text into lines of at most `width` pixels; a single word may be cut."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word if font.getlength(word) <= width else _shorten(word, font, width))
    return lines or [""]


def _shorten(text: str, font: Any, width: int) -> str:
    """Text with an ellipsis that fits."""
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _caption(lines: Sequence[tuple[str, Colour, str]], width: int) -> Image.Image:
    """The prompts in full: a coloured tag and wrapped text each."""
    font = _font(max(15, width // 46))
    step = round(font.size * 1.35)
    indent = int(font.getlength("main")) + 30
    wrapped = [(tag, tone, _wrap(text.strip() or "(none)", font, width - indent - 14)) for tag, tone, text in lines]
    strip = Image.new("RGB", (width, sum(len(rows) for *_, rows in wrapped) * step + 20), WHITE)
    draw, top = ImageDraw.Draw(strip), 10
    for tag, tone, rows in wrapped:
        draw.rounded_rectangle((10, top + 2, indent - 8, top + step - 3), radius=4, fill=tone)
        draw.text(((indent + 2) / 2, top + step / 2), tag, font=font, fill=WHITE, anchor="mm")
        for row in rows:
            draw.text((indent + 2, top + step / 2), row, font=font, fill=INK, anchor="lm")
            top += step
    return strip


def _panel(
    title: str, names: Sequence[str], table: Sequence[Sequence[bool]], changing: set[tuple[int, int]], cell: int
) -> Image.Image:
    """One phase of the matrix; families of roles stand a little apart, cells that differ between phases are framed."""
    font, heading = _font(max(10, min(17, cell * 2 // 3))), _font(20)
    margin = round(max(font.getlength(name) for name in names)) + 16
    places, at = [], 0
    for position, name in enumerate(names):
        at += 6 if position and _family(name) != _family(names[position - 1]) else 0
        places.append(at)
        at += cell
    top = 44 + margin
    panel = Image.new("RGB", (margin + max(at, 390 if changing else 230) + 20, top + at + 34), WHITE)
    draw = ImageDraw.Draw(panel)
    draw.text((margin, 10), title, font=heading, fill=INK)
    for name, place in zip(names, places, strict=True):
        tone = _tone(name, INK)
        draw.text((margin - 8, top + place + cell / 2), name, font=font, fill=tone, anchor="rm")
        _upright(panel, name, (margin + place, top - 8), font, tone, cell)
    for query, row in enumerate(table):
        for key, seen in enumerate(row):
            left, high = margin + places[key], top + places[query]
            edge = INK if (query, key) in changing else None
            tone = _tone(names[key], NEUTRAL) if seen else FAINT
            draw.rectangle((left, high, left + cell - 2, high + cell - 2), fill=tone, outline=edge, width=2)
    note = "a row reads the coloured columns" + ("; framed: changes between phases" if changing else "")
    draw.text((margin, top + at + 8), note, font=_font(13), fill=NEUTRAL)
    return panel


def _upright(panel: Image.Image, text: str, at: tuple[int, int], font: Any, tone: Colour, cell: int) -> None:
    """Text that runs upwards from `at`, centred on a column of `cell` pixels."""
    strip = Image.new("RGB", (int(font.getlength(text)) + 4, cell), WHITE)
    ImageDraw.Draw(strip).text((0, cell / 2), text, font=font, fill=tone, anchor="lm")
    turned = strip.rotate(90, expand=True)
    panel.paste(turned, (at[0], at[1] - turned.height))


def _family(name: str) -> str:
    return _FAMILIES[name.rstrip("0123456789 ")]


def _tone(name: str, other: Colour) -> Colour:
    """The colour of the region in a role's name, or `other`."""
    number = name.rpartition(" ")[2]
    return colour(int(number)) if number.isdigit() else other


def _code(name: str) -> str:
    """A short column head: "noise region 2" -> "N2", "ref background" -> "RB"."""
    words = name.replace("region ", "").split()
    return "".join(word if word.isdigit() else word[0].upper() for word in words)
