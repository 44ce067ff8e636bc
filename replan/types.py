"""The nouns of replan: frozen, slotted, standard library and PIL only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class Grid(NamedTuple):
    """Columns and rows of image tokens."""

    columns: int
    rows: int


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A half-open rectangle in integer pixels: left <= x < right, top <= y < bottom."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def area(self) -> int:
        """Pixels covered; 0 when empty."""
        return max(0, self.width) * max(0, self.height)

    def as_tuple(self) -> tuple[int, int, int, int]:
        return (self.left, self.top, self.right, self.bottom)

    def clip(self, size: Size) -> Box:
        """The part inside a picture of `size`."""
        return Box(
            min(max(self.left, 0), size.width),
            min(max(self.top, 0), size.height),
            min(max(self.right, 0), size.width),
            min(max(self.bottom, 0), size.height),
        )

    def expand(self, ratio: float, size: Size) -> Box:
        """Move each side out by `ratio` of the box's own width or height, truncate to integers, clip to `size`."""
        ratio = min(ratio, 1e9)  # covers any picture; a product that overflows would be no integer
        dx, dy = ratio * self.width, ratio * self.height
        return Box(int(self.left - dx), int(self.top - dy), int(self.right + dx), int(self.bottom + dy)).clip(size)

    def rescale(self, source: Size, target: Size) -> Box:
        """Map from a picture of size `source` to one of size `target`; exact integers, rounded outward."""
        return Box(
            self.left * target.width // source.width,
            self.top * target.height // source.height,
            -(-self.right * target.width // source.width),
            -(-self.bottom * target.height // source.height),
        ).clip(target)

    def cells(self, size: Size, grid: Grid) -> Box:
        """The grid cells that the box touches, as a box in (column, row) units: floor of the start, ceil of the end."""
        return self.rescale(size, Size(grid.columns, grid.rows))

    def iou(self, other: Box) -> float:
        """Intersection over union, 0 when both are empty."""
        inner = Box(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )
        shared = inner.area if inner.width > 0 and inner.height > 0 else 0
        union = self.area + other.area - shared
        return shared / union if union else 0.0


@dataclass(frozen=True, slots=True)
class Region:
    """Where (box, optional point) and what (hint). "keep this cup unchanged" makes a negative region."""

    box: Box
    hint: str
    point: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A planner's answer: reasoning, a global prompt, and regions whose boxes live in a frame of `size` pixels.

    `notes` say what was repaired, clipped or dropped on the way; `raw` is the planner's answer word for word.
    """

    reasoning: str
    prompt: str
    regions: tuple[Region, ...]
    size: Size
    notes: tuple[str, ...] = ()
    raw: str = field(default="", compare=False)

    def to(self, size: Size) -> Plan:
        """The same plan in the frame of a picture of `size` pixels."""
        if size == self.size:
            return self
        regions = tuple(
            Region(
                r.box.rescale(self.size, size),
                r.hint,
                None
                if r.point is None
                else (r.point[0] * size.width // self.size.width, r.point[1] * size.height // self.size.height),
            )
            for r in self.regions
        )
        return Plan(self.reasoning, self.prompt, regions, size, self.notes, self.raw)


@dataclass(frozen=True, slots=True)
class EditRequest:
    """A picture and an instruction. A given `plan` skips planning: one edited by hand takes the same path.

    `extra_images` are further pictures to look at, for editors that take several; `image` is the one that is edited.
    """

    image: Image
    instruction: str
    seed: int = 0
    plan: Plan | None = None
    extra_images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Edit:
    """A finished edit: what judges, demo, evaluation and trainers exchange. `timings` are seconds per stage."""

    request: EditRequest
    plan: Plan | None
    image: Image
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer: named scores, each in [0, 1], and the reason."""

    scores: Mapping[str, float]
    reason: str = ""

    def __post_init__(self) -> None:
        for name, score in self.scores.items():
            if not (math.isfinite(score) and 0.0 <= score <= 1.0):
                raise ValueError(f"score {name} = {score}: must lie in [0, 1]")


@dataclass(frozen=True, slots=True)
class Failure:
    """Stands in for an Edit or a Verdict when our own machinery broke; never becomes a number."""

    stage: str
    error: str
