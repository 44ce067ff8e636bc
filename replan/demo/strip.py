"""A row of labelled thumbnails: the examples, and the history of a session."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from replan.demo.pictures import thumbnail
from replan.demo.widget import stamped

if TYPE_CHECKING:
    from PIL.Image import Image


def strip_value(items: Iterable[tuple[Image, str]], label: str, empty: str = "") -> dict[str, Any]:
    """The value of a strip: (picture, text) pairs, a name for the whole, and what stands there when it is empty."""
    thumbs = [{"picture": thumbnail(picture), "label": text} for picture, text in items]
    return stamped({"items": thumbs, "label": label, "empty": empty})
