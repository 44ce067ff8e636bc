"""The exact judge of the mini world: scores an edit by comparing pixels with the exact target. No model, no opinion.

Scores are on the scales of the published protocol: target 1 or 5, effect and consistency 1, 3 or 5, quality 1 to 5.
All distances are root mean squares over a cell of 32 x 32 pixels, in grey levels of 0 .. 255.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from replan.errors import JudgeError
from replan.mini.instructions import Item
from replan.mini.scenes import CELL, COLOURS, COLUMNS, KINDS, ROWS, SIZE, Scene, Thing, draw

ASKED = 3.0  # a cell in which target and source differ by more than this is one that the edit is about
TOUCHED = 0.35  # share of the asked difference from which on a cell counts as changed
DONE, HALF_DONE = 0.4, 0.75  # distance to the target, relative to the asked difference
CALM, DISTURBED = 10.0, 22.0  # distance to the source where nothing was asked
SOUND = ((10.0, 5), (16.0, 4), (24.0, 3), (36.0, 2))  # distance to the nearest thing that the world can draw -> quality

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MiniVerdict:
    """The four scores, whether the edit is a success (all of them right), and how far the rest of the picture moved."""

    target: int
    effect: int
    consistency: int
    quality: int
    outside_psnr: float

    @property
    def success(self) -> bool:
        return self.target == 5 and self.effect == 5 and self.consistency == 5 and self.quality >= 4

    @property
    def overall(self) -> float:
        return (self.target + self.effect + self.consistency + self.quality) / 4

    @property
    def weighted(self) -> float:
        """(T + E + (Q + C) E / 5) / 4, as the published evaluation computes it."""
        return (self.target + self.effect + (self.quality + self.consistency) * self.effect / 5) / 4


def judge(item: Item, result: Image.Image) -> MiniVerdict:
    """Score `result` as the edit of `item`. Raises JudgeError when it is not a picture of the world's size."""
    if result.size != SIZE:
        raise JudgeError(f"result of {result.size} pixels: the mini world's pictures have {tuple(SIZE)}")
    source, target, edited = (_pixels(p) for p in (draw(item.scene), draw(item.target), result))
    asked = {cell: _distance(source, target, cell) for cell in _cells() if _distance(source, target, cell) > ASKED}
    rest = [cell for cell in _cells() if cell not in asked]
    touched = all(_distance(edited, source, cell) >= TOUCHED * amount for cell, amount in asked.items())
    residual = [_distance(edited, target, cell) / amount for cell, amount in asked.items()]
    effect = 1
    if touched and residual:
        effect = 5 if max(residual) <= DONE else 3 if sum(residual) / len(residual) <= HALF_DONE else 1
    moved = max((_distance(edited, source, cell) for cell in rest), default=0.0)
    return MiniVerdict(
        target=5 if touched else 1,
        effect=effect if asked else 5,
        consistency=5 if moved <= CALM else 3 if moved <= DISTURBED else 1,
        quality=_quality(item, source, target, edited),
        outside_psnr=_outside_psnr(item, source, edited),
    )


def _quality(item: Item, source: np.ndarray, target: np.ndarray, edited: np.ndarray) -> int:
    """How near every cell is to something that the world can draw there; the worst cell counts."""
    worst = 0.0
    for cell in _cells():
        near = min(_distance(edited, source, cell), _distance(edited, target, cell))
        if near > SOUND[0][0]:
            near = min([near, *(_distance(edited, picture, cell) for picture in _alternatives(item.scene, cell))])
        worst = max(worst, near)
    return next((score for limit, score in SOUND if worst <= limit), 1)


def _alternatives(scene: Scene, cell: Cell) -> Iterator[np.ndarray]:
    """Pictures of the scene with everything else that could stand in a cell, and with nothing there."""
    for index, thing in enumerate(scene.things):
        if (thing.column, thing.row) == cell:
            yield _pixels(draw(scene.swap(index, None)))
            for kind in KINDS:
                for colour in COLOURS:
                    yield _pixels(draw(scene.swap(index, replace(thing, kind=kind, colour=colour))))


def _outside_psnr(item: Item, source: np.ndarray, edited: np.ndarray) -> float:
    """PSNR in dB between source and result outside the boxes of what was asked, before and after; inf when equal."""
    outside = np.ones(source.shape[:2], bool)
    for thing in (*_asked_things(item, item.scene), *_asked_things(item, item.target)):
        box = thing.box
        outside[box.top : box.bottom, box.left : box.right] = False
    if not outside.any():
        return float("inf")
    error = float(np.square((edited - source)[outside]).mean())
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


def _asked_things(item: Item, scene: Scene) -> list[Thing]:
    places = {
        (item.scene.things[c.index].column, item.scene.things[c.index].row) for c in item.changes if c.task != "keep"
    }
    return [thing for thing in scene.things if (thing.column, thing.row) in places]


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), np.float32)


def _cells() -> list[Cell]:
    return [(column, row) for row in range(ROWS) for column in range(COLUMNS)]


def _distance(a: np.ndarray, b: np.ndarray, cell: Cell) -> float:
    column, row = cell
    part = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    return float(np.sqrt(np.square(a[part] - b[part]).mean()))
