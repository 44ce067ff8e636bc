"""What lies outside the boxes, put back as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from replan.types import Box, Size

if TYPE_CHECKING:
    from PIL.Image import Image


def paste_background(source: Image, edited: Image, boxes: Sequence[Box]) -> Image:
    """`edited` inside the boxes, `source` byte for byte outside, with a soft seam just inside each box's edges.

    The seam is 1/8 of the box's shorter side wide, 16 pixels at most; edges on the picture's border have none.
    """
    import numpy as np
    from PIL import Image as Images

    width, height = source.size
    alpha = np.zeros((height, width))
    for box in (box.clip(Size(width, height)) for box in boxes):
        if box.area == 0:
            continue
        seam = min(16, min(box.width, box.height) // 8)
        across = _ramp(box.left, box.right, width, seam)
        down = _ramp(box.top, box.bottom, height, seam)
        inside = alpha[box.top : box.bottom, box.left : box.right]
        np.maximum(inside, np.minimum(across[None, :], down[:, None]), out=inside)
    mask = Images.fromarray((alpha * 255).round().astype(np.uint8))
    return Images.composite(edited, source.convert("RGB"), mask)


def _ramp(start: int, stop: int, length: int, seam: int) -> Any:
    """Weights [stop - start], rising from either end to 1 over `seam` pixels; an end on the border does not rise."""
    import numpy as np

    place = np.arange(stop - start)
    from_start = np.ones(stop - start) if start == 0 else (place + 1) / (seam + 1)
    from_stop = np.ones(stop - start) if stop == length else (place[::-1] + 1) / (seam + 1)
    return np.minimum(1.0, np.minimum(from_start, from_stop))
