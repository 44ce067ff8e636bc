"""Pictures on their way to the browser: data addresses, so that none of a user's pictures is ever a file or a route."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

LARGEST = 1600  # pixels of the longer side of what is shown; boxes and downloads keep the picture's own pixels
THUMB = 192


def data_address(content: bytes, kind: str) -> str:
    """Bytes as a data: address of MIME type `kind`."""
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def shown(image: Image.Image, longest: int = LARGEST) -> str:
    """A picture to look at: small ones exact (PNG), large ones reduced (JPEG)."""
    if max(image.size) <= 512:
        return exact(image)
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=88)
    return data_address(content.getvalue(), "image/jpeg")


def exact(image: Image.Image) -> str:
    """Every pixel as it is, as PNG."""
    return data_address(png(image), "image/png")


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file; the same pixels give the same bytes."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def thumbnail(image: Image.Image) -> str:
    """A small picture for a strip."""
    small = image.copy()
    small.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    return exact(small)


def heat_map(before: Image.Image, after: Image.Image) -> Image.Image:
    """Where two pictures differ: dark where they are equal, to yellow where a channel changed by half its range."""
    longest = LARGEST if max(before.size) > LARGEST else max(before.size)
    scale = longest / max(before.size)
    size = (max(1, round(before.width * scale)), max(1, round(before.height * scale)))
    one, two = (np.asarray(picture.convert("RGB").resize(size), np.float32) for picture in (before, after))
    change = np.clip(np.abs(one - two).max(2) / 128, 0, 1) ** 0.6
    stops = np.array([(16, 18, 38), (92, 30, 110), (214, 68, 80), (252, 168, 60), (252, 246, 180)], np.float32)
    place = change * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    share = (place - low)[..., None]
    return Image.fromarray((stops[low] * (1 - share) + stops[low + 1] * share).astype(np.uint8))
