"""Pictures in and out: any file that a person may hand over becomes an upright 8-bit RGB picture, or an ImageError."""

from __future__ import annotations

import io
import math
import os
import secrets
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from replan.errors import ConfigError, ImageError
from replan.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image

PILLOW_CEILING = 178_956_970  # twice PIL.Image.MAX_IMAGE_PIXELS; Pillow itself refuses more as a decompression bomb

# No EPS, PDF or the like: Pillow hands some of those to other programs. No ICO: it is decoded before its size is known.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "TGA", "QOI", "DIB")

# What Pillow's decoders let through on damaged files; each was met in the wild or in tests/test_images.py.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
    OverflowError, MemoryError, ZeroDivisionError, NotImplementedError, RuntimeError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What counts as a picture: total pixels, shortest and longest side in pixels, longest over shortest side."""

    max_pixels: int = 100_000_000
    min_side: int = 16
    max_side: int = 32_768
    max_aspect: float = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= PILLOW_CEILING:
            raise ConfigError(f"max_pixels {self.max_pixels}: must lie between 1 and {PILLOW_CEILING}")
        if not 1 <= self.min_side <= self.max_side:
            raise ConfigError(f"min_side {self.min_side}, max_side {self.max_side}: need 1 <= min_side <= max_side")
        if self.max_aspect < 1:
            raise ConfigError(f"max_aspect {self.max_aspect}: must be at least 1")


def load_image(path: str | Path, limits: ImageLimits | None = None) -> Image:
    """Read a picture file: EXIF rotation applied, alpha on white, first frame of an animation, 8-bit RGB.

    Raises ImageError for a file that is missing, unreadable, no picture, truncated or outside `limits`. The size is
    checked on the header, before anything is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    limits = ImageLimits() if limits is None else limits
    path = Path(path)
    try:
        if path.is_dir():
            raise ImageError(f"{path}: is a directory; name a picture file")
        if not path.exists():
            raise ImageError(f"{path}: no such file")
        if not path.is_file():
            raise ImageError(f"{path}: not a regular file")
        with warnings.catch_warnings():  # our own limit is checked next, so Pillow need not warn below its ceiling
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            image = Image.open(path, formats=[form for form in FORMATS if form in Image.OPEN])
        with image:
            check_size(Size(*image.size), limits, str(path))
            return to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a picture in a format that is read ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too large to open safely: {error}") from error
    except PermissionError as error:
        raise ImageError(f"{path}: no permission to read it") from error
    except DECODE_ERRORS as error:
        raise ImageError(f"{path}: damaged or unreadable: {error or type(error).__name__}") from error


def check_size(size: Size, limits: ImageLimits, name: str = "the picture") -> None:
    """Raise ImageError when a picture's size is outside `limits`."""
    shape = f"{name}: {size.width}x{size.height} pixels"
    shortest, longest = min(size), max(size)
    if shortest < limits.min_side:
        raise ImageError(f"{shape}: each side must have at least {limits.min_side}")
    if longest > limits.max_side:
        raise ImageError(f"{shape}: a side may have at most {limits.max_side}; make it smaller first")
    if size.width * size.height > limits.max_pixels:
        raise ImageError(f"{shape}: more than {limits.max_pixels:,} in all; make it smaller first")
    if longest > limits.max_aspect * shortest:
        raise ImageError(f"{shape}: longer than {limits.max_aspect:g} times its short side; crop it first")


def to_rgb(image: Image) -> Image:
    """The first frame as a new upright RGB picture: EXIF rotation applied, alpha on white, 16-bit scaled to 8."""
    from PIL import Image as pil
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow has no direct way
        white = pil.new("RGBA", rgba.size, "white")
        rgb = pil.alpha_composite(white, rgba).convert("RGB")
    else:
        rgb = image.convert("RGB") if image.mode != "RGB" else image.copy()
    rgb.info = {}  # rotation and transparency are done; a stale tag would be written into the result
    return rgb


def _eight_bits(image: Image) -> Image:
    """Integer and float greys as L. Pillow would clip them at 255, which turns a 16-bit picture white."""
    import numpy as np
    from PIL import Image as pil

    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if image.mode.startswith("I;16") or (image.mode == "I" and top > 255):
        values = values * (255 / 65535)
    elif image.mode == "F":
        values = values * (255 if top <= 1 else 1)
    return pil.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), mode=None)


def fit_area(size: Size, max_area: int, multiple: int) -> Size:
    """The size nearest to `size` with sides that are multiples of `multiple` and at most `max_area` pixels.

    Never more than rounding up; a picture above the area shrinks at its own aspect. Same arithmetic as the
    `smart_resize` of Qwen's processors, so that what fits here passes through them unchanged.
    """
    if min(size) < 1 or max_area < multiple * multiple or multiple < 1:
        raise ValueError(f"cannot fit {size.width}x{size.height} into {max_area} pixels in steps of {multiple}")
    width, height = (max(multiple, round(side / multiple) * multiple) for side in size)
    if width * height > max_area:
        shrink = math.sqrt(size.width * size.height / max_area)
        width, height = (max(multiple, math.floor(side / shrink / multiple) * multiple) for side in size)
    return Size(width, height)


def save_image(image: Image, path: str | Path) -> None:
    """Write a picture in the format that the suffix names (PNG without one), whole or not at all."""
    from PIL import Image as pil

    path = Path(path)
    pil.init()
    form = pil.EXTENSION.get(path.suffix.lower(), "PNG" if not path.suffix else "")
    if form not in pil.SAVE:
        raise ImageError(f"{path}: cannot write {path.suffix!r} pictures; use .png, .jpg or .webp")
    content = io.BytesIO()
    try:
        image.save(content, format=form, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    except (OSError, ValueError, KeyError) as error:  # for example a mode or a side that the format does not know
        raise ImageError(f"{path}: cannot be written as {form}: {error}") from error
    write_atomic(path, content.getvalue())


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file through a temporary one beside it: readers see the old content or the new, never a part.

    Makes missing folders. On any error (full disk, no permission) the temporary file is removed and ImageError raised.
    """
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:  # Ctrl-C too must leave no partial file behind
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror or error}") from error
