"""The exact judge of the mini world: scores an edit by comparing pixels with the exact target. No model, no opinion.

Scores are on the scales of the published protocol: target 1 or 5, effect and consistency 1, 3 or 5, quality 1 to 5.
All distances are root mean squares over a cell of 32 x 32 pixels, in grey levels of 0 .. 255.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from replan.errors import JudgeError
from replan.mini.changes import ADDED_HEIGHT
from replan.mini.instructions import Item
from replan.mini.scenes import CELL, COLOURS, COLUMNS, KINDS, ROWS, SHAPES, SIZE, Cell, Thing, draw
from replan.types import Box

ASKED = 3.0  # a cell in which target and source differ by more than this is one that the edit is about
TOUCHED = 0.35  # share of the asked difference from which on a cell counts as changed
DONE, HALF_DONE = 0.4, 0.75  # distance to the target, relative to the asked difference
CALM, DISTURBED = 10.0, 22.0  # distance to the source where nothing was asked
SOUND = ((10.0, 5), (16.0, 4), (24.0, 3), (36.0, 2))  # distance to the nearest thing that the world can draw -> quality


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
    """Score `result` as the edit of `item`. Raises JudgeError when it is not a picture of the world's size.

    Where another light is asked for, everything else is compared with the source scene in that light, and the light
    itself is one more thing asked for.
    """
    if result.size != SIZE:
        raise JudgeError(f"result of {result.size} pixels: the mini world's pictures have {tuple(SIZE)}")
    source, edited = _pixels(draw(item.scene)), _pixels(result)
    relit = _pixels(draw(replace(item.scene, light=item.light)))
    target = _pixels(draw(item.target))
    asked = {cell: _distance(relit, target, cell) for cell in _cells() if _distance(relit, target, cell) > ASKED}
    rest = [cell for cell in _cells() if cell not in asked]
    touched = [_distance(edited, relit, cell) >= TOUCHED * amount for cell, amount in asked.items()]
    residual = [_distance(edited, target, cell) / amount for cell, amount in asked.items()]
    if item.light != "day" and rest:
        amount = _mean(_distance(source, relit, cell) for cell in rest)
        touched.append(_mean(_distance(edited, source, cell) for cell in rest) >= TOUCHED * amount)
        residual.append(_mean(_distance(edited, relit, cell) for cell in rest) / amount)
    effect = 1
    if all(touched) and residual:
        effect = 5 if max(residual) <= DONE else 3 if _mean(residual) <= HALF_DONE else 1
    moved = max((min(_distance(edited, source, cell), _distance(edited, relit, cell)) for cell in rest), default=0.0)
    return MiniVerdict(
        target=5 if all(touched) else 1,
        effect=effect if residual else 5,
        consistency=5 if moved <= CALM else 3 if moved <= DISTURBED else 1,
        quality=_quality(item, (source, relit, target), edited),
        outside_psnr=_outside_psnr(item, relit, edited),
    )


def _quality(item: Item, known: Sequence[np.ndarray], edited: np.ndarray) -> int:
    """How near every cell is to something that the world can draw there; the worst cell counts."""
    worst = 0.0
    for cell in _cells():
        near = min(_distance(edited, picture, cell) for picture in known)
        if near > SOUND[0][0]:
            near = min([near, *(_distance(edited, picture, cell) for picture in _alternatives(item, cell))])
        worst = max(worst, near)
    return next((score for limit, score in SOUND if worst <= limit), 1)


def _alternatives(item: Item, cell: Cell) -> Iterator[np.ndarray]:
    """Pictures of the scene in the asked light, with everything else that could stand in a cell, or nothing."""
    scene = replace(item.scene, light=item.light)
    standing = next((i for i, t in enumerate(scene.things) if (t.column, t.row) == cell), None)
    thing = Thing(KINDS[0], "red", *cell, ADDED_HEIGHT) if standing is None else scene.things[standing]
    bare = scene if standing is None else scene.swap(standing, None)
    yield _pixels(draw(bare))
    for kind, shape in SHAPES.items():
        for altered in (False, True) if shape.altered else (False,):
            for colour in COLOURS:
                other = replace(thing, kind=kind, colour=colour, altered=altered)
                yield _pixels(draw(replace(bare, things=(*bare.things, other))))


def _outside_psnr(item: Item, expected: np.ndarray, edited: np.ndarray) -> float:
    """PSNR in dB against what is expected outside the boxes of what was asked, before and after; inf when equal."""
    outside = np.ones(expected.shape[:2], bool)
    for box in _asked_boxes(item):
        outside[box.top : box.bottom, box.left : box.right] = False
    if not outside.any():
        return float("inf")
    error = float(np.square((edited - expected)[outside]).mean())
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


def _asked_boxes(item: Item) -> list[Box]:
    """Boxes of the changes, and of what stands there afterwards."""
    changes = [change for change in item.changes if change.task != "keep"]
    places = [change.cell or _cell(item.scene.things[change.index]) for change in changes]
    after = [thing.box for thing in item.target.things if _cell(thing) in places]
    return [*(change.box(item.scene) for change in changes), *after]


def _cell(thing: Thing) -> Cell:
    return thing.column, thing.row


def _mean(values: Iterable[float]) -> float:
    told = list(values)
    return sum(told) / len(told)


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), np.float32)


def _cells() -> list[Cell]:
    return [(column, row) for row in range(ROWS) for column in range(COLUMNS)]


def _distance(a: np.ndarray, b: np.ndarray, cell: Cell) -> float:
    column, row = cell
    part = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    return float(np.sqrt(np.square(a[part] - b[part]).mean()))
