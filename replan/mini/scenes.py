"""Scenes: a few everyday things on a shelf, a desk or a lawn, drawn antialiased from a seed.

A scene is data (`Scene`); `draw` turns it into 96 x 96 pixels. Editing a scene and drawing it again gives the exact
target picture of an edit. Things stand in the cells of a 3 x 3 grid: no two of them share an image token of 16 pixels.
Some kinds have a second state (a lamp that is off, an open box), and the whole scene has a light.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image, ImageChops, ImageDraw

from replan.types import Box, Size

SIZE = Size(96, 96)
CELL = 32
COLUMNS = ROWS = 3
OVERSAMPLE = 4

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (212, 50, 46),
    "orange": (240, 140, 36),
    "yellow": (246, 214, 60),
    "green": (52, 150, 72),
    "blue": (48, 102, 208),
    "purple": (132, 68, 184),
    "white": (242, 242, 238),
    "black": (46, 46, 52),
}
LEAF, WOOD, METAL = (70, 158, 66), (124, 84, 52), (96, 98, 106)
PLACES = ("shelf", "desk", "garden")
LIGHTS: dict[str, Colour] = {"day": (255, 255, 255), "evening": (255, 198, 142), "night": (124, 138, 196)}
Cell = tuple[int, int]  # column, row
POSITIONS = (
    ("top left", "top middle", "top right"),
    ("middle left", "center", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its kind and colour, the cell it stands in, its height and its shift from the middle in pixels.

    `altered`: in its kind's second state, for kinds that have one.
    """

    kind: str
    colour: str
    column: int
    row: int
    height: int
    shift: int = 0
    altered: bool = False

    @property
    def box(self) -> Box:
        """The tight box in pixels of the picture."""
        width, height = (max(2, round(share * self.height)) for share in SHAPES[self.kind].share)
        left = self.column * CELL + CELL // 2 + self.shift - width // 2
        bottom = self.row * CELL + CELL - 3
        return Box(left, bottom - height, left + width, bottom)

    @property
    def position(self) -> str:
        return POSITIONS[self.row][self.column]

    @property
    def name(self) -> str:
        """The planner's shorthand, e.g. "cup red top left": the kind leads, so that one can look up the rest by it."""
        return f"{self.kind} {self.colour} {self.position}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A place, its tint in [0, 1], the things in it and the light that falls on them."""

    place: str
    tint: float
    things: tuple[Thing, ...]
    light: str = "day"

    @property
    def empty(self) -> tuple[Cell, ...]:
        """Cells in which nothing stands, row by row."""
        taken = {(thing.column, thing.row) for thing in self.things}
        cells = ((column, row) for row in range(ROWS) for column in range(COLUMNS))
        return tuple(cell for cell in cells if cell not in taken)

    def swap(self, index: int, thing: Thing | None) -> Scene:
        """The scene with thing `index` replaced, or removed when `thing` is None."""
        rest = [t for i, t in enumerate(self.things) if i != index]
        return replace(
            self, things=tuple(rest) if thing is None else (*self.things[:index], thing, *self.things[index + 1 :])
        )


class Pen:
    """Draws in the unit square of one thing's box; `shade` 0 is the thing's colour, below 0 darker, above lighter."""

    def __init__(self, canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
        self._canvas, self._box, self._colour = canvas, box, colour

    def tone(self, shade: float, colour: Colour | None = None) -> Colour:
        base = colour or self._colour
        goal, share = (255, shade) if shade > 0 else (0, -shade)
        red, green, blue = (round(c + (goal - c) * share) for c in base)
        return red, green, blue

    def _points(self, points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
        b = self._box
        return [(OVERSAMPLE * (b.left + x * b.width), OVERSAMPLE * (b.top + y * b.height)) for x, y in points]

    def polygon(self, *points: tuple[float, float], shade: float = 0, colour: Colour | None = None) -> None:
        self._canvas.polygon(self._points(points), fill=self.tone(shade, colour))

    def ellipse(
        self, x0: float, y0: float, x1: float, y1: float, shade: float = 0, colour: Colour | None = None
    ) -> None:
        self._canvas.ellipse(self._span(x0, y0, x1, y1), fill=self.tone(shade, colour))

    def rectangle(
        self, x0: float, y0: float, x1: float, y1: float, shade: float = 0, colour: Colour | None = None
    ) -> None:
        self._canvas.rectangle(self._span(x0, y0, x1, y1), fill=self.tone(shade, colour))

    def ring(self, x0: float, y0: float, x1: float, y1: float, width: float, shade: float = 0) -> None:
        span = self._span(x0, y0, x1, y1)
        self._canvas.ellipse(span, outline=self.tone(shade), width=round(width * OVERSAMPLE * self._box.width))

    def _span(self, x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
        return self._points(((x0, y0), (x1, y1)))


def _cup(pen: Pen) -> None:
    pen.ring(0.52, 0.26, 0.99, 0.76, 0.1, shade=-0.25)
    pen.polygon((0.0, 0.08), (0.76, 0.08), (0.66, 0.92), (0.1, 0.92))
    pen.ellipse(0.1, 0.84, 0.66, 0.99)
    pen.polygon((0.5, 0.1), (0.76, 0.1), (0.66, 0.92), (0.5, 0.95), shade=-0.16)
    pen.ellipse(0.0, 0.0, 0.76, 0.18, shade=0.35)
    pen.ellipse(0.06, 0.03, 0.7, 0.15, shade=-0.5)


def _plant(pen: Pen) -> None:
    for x0, y0, x1, y1, shade in ((0.0, 0.2, 0.5, 0.5, -0.2), (0.5, 0.16, 1.0, 0.46, -0.1), (0.3, 0.0, 0.7, 0.6, 0.12)):
        pen.ellipse(x0, y0, x1, y1, shade, LEAF)
    pen.ellipse(0.14, 0.04, 0.5, 0.44, 0.0, LEAF)
    pen.ellipse(0.54, 0.34, 0.86, 0.6, -0.3, LEAF)
    pen.polygon((0.2, 0.6), (0.8, 0.6), (0.7, 1.0), (0.3, 1.0))
    pen.rectangle(0.15, 0.54, 0.85, 0.66, shade=0.25)
    pen.polygon((0.62, 0.66), (0.79, 0.66), (0.7, 1.0), (0.58, 1.0), shade=-0.2)


def _book(pen: Pen) -> None:
    pen.polygon((0.12, 0.0), (1.0, 0.06), (1.0, 1.0), (0.12, 1.0), shade=-0.1)
    pen.rectangle(0.88, 0.08, 0.96, 0.96, colour=(248, 244, 228))
    pen.rectangle(0.0, 0.0, 0.86, 1.0)
    pen.rectangle(0.0, 0.0, 0.16, 1.0, shade=-0.35)
    pen.rectangle(0.28, 0.16, 0.74, 0.28, shade=0.6)
    pen.rectangle(0.28, 0.36, 0.64, 0.43, shade=0.6)


def _lamp(pen: Pen) -> None:
    pen.rectangle(0.45, 0.4, 0.56, 0.92, colour=METAL)
    pen.ellipse(0.2, 0.86, 0.8, 1.0, -0.2, METAL)
    pen.polygon((0.3, 0.0), (0.7, 0.0), (1.0, 0.48), (0.0, 0.48))
    pen.polygon((0.3, 0.0), (0.46, 0.0), (0.36, 0.48), (0.0, 0.48), shade=0.3)
    pen.ellipse(0.0, 0.42, 1.0, 0.56, colour=(255, 240, 170))


def _ball(pen: Pen) -> None:
    pen.ellipse(0.0, 0.0, 1.0, 1.0, shade=-0.25)
    pen.ellipse(0.03, 0.02, 0.92, 0.9)
    pen.ellipse(0.18, 0.14, 0.52, 0.44, shade=0.3)
    pen.ellipse(0.25, 0.2, 0.4, 0.34, shade=0.75)


def _box(pen: Pen) -> None:
    pen.polygon((0.0, 0.26), (0.28, 0.0), (1.0, 0.0), (0.74, 0.26), shade=0.4)
    pen.polygon((0.74, 0.26), (1.0, 0.0), (1.0, 0.72), (0.74, 1.0), shade=-0.35)
    pen.rectangle(0.0, 0.26, 0.74, 1.0)
    pen.rectangle(0.3, 0.26, 0.44, 1.0, shade=0.3)


def _bottle(pen: Pen) -> None:
    pen.rectangle(0.33, 0.0, 0.67, 0.12, colour=METAL)
    pen.rectangle(0.36, 0.1, 0.64, 0.4)
    pen.polygon((0.36, 0.28), (0.64, 0.28), (1.0, 0.5), (1.0, 1.0), (0.0, 1.0), (0.0, 0.5))
    pen.rectangle(0.72, 0.5, 1.0, 1.0, shade=-0.25)
    pen.rectangle(0.0, 0.58, 1.0, 0.84, colour=(246, 240, 220))
    pen.rectangle(0.14, 0.44, 0.28, 0.56, shade=0.5)


def _apple(pen: Pen) -> None:
    pen.ellipse(0.0, 0.16, 0.62, 1.0, shade=0.0)
    pen.ellipse(0.38, 0.16, 1.0, 1.0, shade=-0.2)
    pen.ellipse(0.14, 0.2, 0.84, 0.98)
    pen.polygon((0.46, 0.24), (0.52, 0.0), (0.6, 0.02), (0.56, 0.26), colour=WOOD)
    pen.ellipse(0.56, 0.0, 0.92, 0.18, 0.0, LEAF)
    pen.ellipse(0.14, 0.3, 0.36, 0.54, shade=0.5)


def _bloom(pen: Pen) -> None:
    for x, y in ((0.2, 0.3), (0.5, 0.12), (0.8, 0.3), (0.52, 0.42)):
        pen.ellipse(x - 0.15, y - 0.13, x + 0.15, y + 0.13, colour=(250, 120, 190))
        pen.ellipse(x - 0.06, y - 0.05, x + 0.06, y + 0.05, colour=(255, 232, 90))


def _off(pen: Pen) -> None:
    pen.polygon((0.3, 0.0), (0.7, 0.0), (1.0, 0.48), (0.0, 0.48), shade=-0.45)
    pen.ellipse(0.0, 0.42, 1.0, 0.56, colour=(52, 50, 48))


def _open(pen: Pen) -> None:
    pen.polygon((0.0, 0.26), (0.28, 0.0), (1.0, 0.0), (0.74, 0.26), shade=-0.75)
    pen.polygon((0.0, 0.26), (0.74, 0.26), (0.7, 0.42), (0.0, 0.42), shade=0.5)


def _bitten(pen: Pen) -> None:
    pen.ellipse(0.6, 0.3, 1.02, 0.74, colour=(250, 240, 206))
    pen.ellipse(0.56, 0.52, 0.86, 0.8, colour=(250, 240, 206))


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kind is drawn, its (width, height) as shares of a thing's height, and what its second state adds."""

    draw: Callable[[Pen], None]
    share: tuple[float, float]
    altered: Callable[[Pen], None] | None = None


SHAPES: dict[str, Shape] = {
    "cup": Shape(_cup, (1.0, 0.84)),
    "plant": Shape(_plant, (0.88, 1.0), _bloom),
    "book": Shape(_book, (0.78, 0.96)),
    "lamp": Shape(_lamp, (0.8, 1.0), _off),
    "ball": Shape(_ball, (0.84, 0.84)),
    "box": Shape(_box, (1.0, 0.86), _open),
    "bottle": Shape(_bottle, (0.5, 1.0)),
    "apple": Shape(_apple, (0.86, 0.9), _bitten),
}
KINDS = tuple(SHAPES)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _gradient(canvas: ImageDraw.ImageDraw, top: float, bottom: float, first: Colour, last: Colour) -> None:
    """Fill the rows between two heights (pixels of the picture) with a vertical gradient."""
    start, stop = round(top * OVERSAMPLE), round(bottom * OVERSAMPLE)
    for y in range(start, stop, OVERSAMPLE):
        canvas.rectangle(
            (0, y, SIZE.width * OVERSAMPLE, y + OVERSAMPLE), fill=_mix(first, last, (y - start) / (stop - start))
        )


def _place(canvas: ImageDraw.ImageDraw, place: str, tint: float) -> None:
    width = SIZE.width * OVERSAMPLE
    if place == "shelf":
        wall = _mix((206, 190, 166), (170, 186, 196), tint)
        for row in range(ROWS):
            _gradient(canvas, row * CELL, (row + 1) * CELL, _mix(wall, (70, 62, 58), 0.22), wall)
            y = ((row + 1) * CELL - 4) * OVERSAMPLE
            canvas.rectangle((0, y, width, y + 4 * OVERSAMPLE), fill=_mix(wall, WOOD, 0.75))
    elif place == "desk":
        wall, desk = _mix((196, 208, 214), (222, 206, 196), tint), _mix((186, 146, 104), (160, 128, 108), tint)
        _gradient(canvas, 0, 24, wall, _mix(wall, (255, 255, 255), 0.25))
        _gradient(canvas, 24, SIZE.height, _mix(desk, (255, 240, 220), 0.3), desk)
    else:
        sky, lawn = _mix((156, 200, 232), (232, 202, 178), tint), _mix((150, 192, 110), (166, 178, 112), tint)
        _gradient(canvas, 0, 22, sky, _mix(sky, (255, 255, 255), 0.45))
        _gradient(canvas, 22, SIZE.height, _mix(lawn, (230, 240, 170), 0.3), lawn)


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB picture of `SIZE`, antialiased."""
    picture = Image.new("RGB", (SIZE.width * OVERSAMPLE, SIZE.height * OVERSAMPLE))
    canvas = ImageDraw.Draw(picture)
    _place(canvas, scene.place, scene.tint)
    for thing in scene.things:
        shape, pen = SHAPES[thing.kind], Pen(canvas, thing.box, COLOURS[thing.colour])
        shape.draw(pen)
        if thing.altered and shape.altered:
            shape.altered(pen)
    small = picture.reduce(OVERSAMPLE)
    return small if scene.light == "day" else ImageChops.multiply(small, Image.new("RGB", SIZE, LIGHTS[scene.light]))


def random_thing(rng: random.Random, cell: int) -> Thing:
    """A random thing standing in cell 0 .. 8, counted row by row."""
    row, column = divmod(cell, COLUMNS)
    kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
    return _in_some_state(rng, Thing(kind, colour, column, row, rng.randint(21, 27), rng.randint(-1, 1)))


def _in_some_state(rng: random.Random, thing: Thing) -> Thing:
    return replace(thing, altered=SHAPES[thing.kind].altered is not None and rng.random() < 0.25)


def random_scene(rng: random.Random, fewest: int = 3, most: int = 7) -> Scene:
    """A cluttered scene with look-alikes: some things repeat another's kind, colour or both."""
    cells = rng.sample(range(COLUMNS * ROWS), rng.randint(fewest, most))
    things: list[Thing] = []
    for cell in sorted(cells):
        thing = random_thing(rng, cell)
        if things and rng.random() < 0.45:
            twin = rng.choice(things)
            thing = replace(thing, kind=twin.kind, colour=rng.choice((twin.colour, thing.colour)))
            thing = _in_some_state(rng, thing)
        things.append(thing)
    return Scene(rng.choice(PLACES), rng.random(), tuple(things))


def random_odd_scene(rng: random.Random) -> Scene:
    """A scene in which all things but one are of one kind."""
    scene = random_scene(rng, fewest=4)
    kind, other = rng.sample(KINDS, 2)
    odd = rng.randrange(len(scene.things))
    things = (replace(t, kind=other if i == odd else kind) for i, t in enumerate(scene.things))
    return replace(scene, things=tuple(_in_some_state(rng, thing) for thing in things))
