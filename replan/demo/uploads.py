"""Files that a user hands over: read within limits, then removed at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from replan.errors import ImageError, PlanError
from replan.images import ImageLimits, load_image
from replan.record import read_plan

if TYPE_CHECKING:
    from PIL.Image import Image

    from replan.types import Plan, Size

MOST_BYTES = 25_000_000
LIMITS = ImageLimits(max_pixels=40_000_000, max_side=12_000)


@contextmanager
def _taken(path: str) -> Iterator[Path]:
    """The file while it is needed."""
    file = Path(path)
    try:
        yield file
    finally:
        with suppress(OSError):
            file.unlink()
            file.parent.rmdir()


def read_picture(path: str) -> Image:
    """The upright picture. Raises ImageError, whose text names no path."""
    with _taken(path) as file:
        try:
            return load_image(file, LIMITS)
        except ImageError as error:
            raise ImageError(str(error).replace(str(file), "This file")) from error


def read_plan_upload(path: str, size: Size) -> Plan:
    """A plan for a picture of `size` from a plan file or a sidecar. Raises PlanError, whose text names no path."""
    with _taken(path) as file:
        try:
            if file.stat().st_size > MOST_BYTES:
                raise PlanError("the file is too large for a plan")
            return read_plan(file, size)
        except (PlanError, OSError) as error:
            raise PlanError(str(error).replace(str(file), "this file")) from error
