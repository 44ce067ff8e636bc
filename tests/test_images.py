"""Every kind of picture file that a person may hand over, and saving that leaves no partial file."""

from __future__ import annotations

import errno
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replan.errors import ConfigError, ImageError
from replan.images import ImageLimits, check_size, fit_area, load_image, save_image, to_rgb, write_atomic
from replan.types import Size


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    """Red grows to the right, green downwards; blue is 128."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> float:
    """Largest absolute difference of two RGB pictures."""
    assert (a.mode, a.size, b.mode) == ("RGB", b.size, "RGB")
    return float(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def complaint(path: str | Path, limits: ImageLimits | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(path, limits)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- files that are no picture ---------------------------------------------------------------------------------------


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert "no such file" in complaint(tmp_path / "none.png")
    assert "is a directory" in complaint(tmp_path)
    assert "not a regular file" in complaint("/dev/null")
    assert "File name too long" in complaint("x" * 5000)
    assert complaint("a\0b.png")


def test_text_and_empty_file_named_png(tmp_path: Path) -> None:
    for content in (b"hello, I am a picture", b"", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "a.png").write_bytes(content)
        assert "not a picture" in complaint(tmp_path / "a.png")


def test_truncated_jpeg(tmp_path: Path) -> None:
    gradient(200, 200).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    assert "damaged or unreadable: image file is truncated" in complaint(tmp_path / "a.jpg")


def test_no_permission_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    path.chmod(0)
    if os.geteuid() == 0:  # root reads everything, so the refusal has to be staged

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Image, "open", refuse)
    assert "no permission to read it" in complaint(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_end_in_a_picture_or_an_image_error(tmp_path: Path) -> None:
    rng = random.Random(7)
    outcomes = {"picture": 0, "error": 0}
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "JPEG2000"):
        if form not in Image.SAVE:
            continue
        buffer = io.BytesIO()
        gradient(32, 32).save(buffer, format=form)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for _ in range(rng.randint(1, 6)):
                content[rng.randrange(min(len(content), rng.choice((64, 10**6))))] = rng.randrange(256)
            (tmp_path / "a").write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
            try:
                image = load_image(tmp_path / "a", ImageLimits(max_pixels=1_000_000))
            except ImageError:
                outcomes["error"] += 1
            else:
                outcomes["picture"] += 1
                assert image.mode == "RGB"
    assert min(outcomes.values()) > 50


# --- kinds of picture ------------------------------------------------------------------------------------------------


def test_plain_rgb(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    assert difference(load_image(tmp_path / "a.png"), gradient()) == 0
    assert difference(load_image(str(tmp_path / "a.png")), gradient()) == 0


def test_cmyk(tmp_path: Path) -> None:
    gradient().convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    assert difference(load_image(tmp_path / "a.jpg"), gradient()) < 8


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    expected = Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert difference(load_image(tmp_path / "a.png"), expected) <= 1
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert difference(load_image(tmp_path / "a.tif"), expected) <= 1
    assert difference(to_rgb(Image.fromarray(grey.astype(np.int32))), expected) <= 1


def test_sixteen_bit_rgb(tmp_path: Path) -> None:
    """Pillow cannot write 48-bit PNG, so the file is made by hand."""
    rows = np.stack([np.full((20, 20), value) for value in (65535, 32768, 0)], -1).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    (tmp_path / "a.png").write_bytes(png(20, 20, data, depth=16, colour=2))
    expected = Image.new("RGB", (20, 20), (255, 128, 0))
    assert difference(load_image(tmp_path / "a.png"), expected) <= 1


@pytest.mark.parametrize(("scale", "mode"), [(1.0, "F"), (255.0, "F"), (255.0, "I"), (255.0, "L")])
def test_other_greys(scale: float, mode: str) -> None:
    values = np.linspace(0, scale, 400, dtype=np.float32).reshape(20, 20)
    image = Image.fromarray(values if mode == "F" else values.astype(np.int32 if mode == "I" else np.uint8))
    expected = Image.fromarray((values * (255 / scale)).astype(np.uint8)).convert("RGB")
    assert difference(to_rgb(image), expected) <= 1


def test_float_with_holes() -> None:
    values = np.full((20, 20), np.nan, dtype=np.float32)
    values[0, 0], values[0, 1], values[0, 2] = 1.0, np.inf, -5.0
    assert to_rgb(Image.fromarray(values)).getpixel((0, 0)) == (255, 255, 255)


def test_palette_and_one_bit(tmp_path: Path) -> None:
    paletted = gradient().quantize(64)
    paletted.save(tmp_path / "a.png")
    assert difference(load_image(tmp_path / "a.png"), paletted.convert("RGB")) == 0
    bits = gradient().convert("1")
    bits.save(tmp_path / "a.bmp")
    assert difference(load_image(tmp_path / "a.bmp"), bits.convert("RGB")) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_lies_on_white(mode: str) -> None:
    bands = len(Image.new(mode, (1, 1)).getbands())
    image = Image.new(mode, (20, 20), (0,) * bands)
    image.paste((0,) * (bands - 1) + (255,), (0, 0, 10, 20))
    result = to_rgb(image)
    assert result.getpixel((0, 0)) == (0, 0, 0)
    assert result.getpixel((15, 5)) == (255, 255, 255)


def test_transparent_colour_of_palette_and_rgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), (0, 0, 0))
    image.paste((200, 0, 0), (0, 0, 10, 20))
    image.save(tmp_path / "rgb.png", transparency=(0, 0, 0))
    image.quantize(2).save(tmp_path / "p.png", transparency=image.quantize(2).getpixel((15, 5)))
    for name in ("rgb.png", "p.png"):
        result = load_image(tmp_path / name)
        assert result.getpixel((15, 5)) == (255, 255, 255)
        assert result.getpixel((0, 0)) == (200, 0, 0)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(tmp_path / name).getpixel((5, 5)) == (250, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    """The marker at the top left of the upright picture comes back there, whichever way the camera was held."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 8, 8))
    inverse = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # the transposition that the camera's orientation undoes
    stored = upright if inverse is None else upright.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    result = load_image(tmp_path / "a.png")
    assert result.size == (48, 32)
    assert difference(result, upright) == 0
    assert 0x0112 not in result.getexif()


def test_to_rgb_is_a_copy() -> None:
    image = gradient()
    to_rgb(image).paste((0, 0, 0), (0, 0, 40, 30))
    assert difference(image, gradient()) == 0


# --- limits ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says what we like."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), "1x1 pixels: each side must have at least 16"),
        ((30_000, 1), "30000x1 pixels: each side must have at least 16"),
        ((30_000, 20), "30000x20 pixels: longer than 100 times its short side"),
        ((40_000, 1000), "40000x1000 pixels: a side may have at most 32768"),
        ((10_001, 10_000), "10001x10000 pixels: more than 100,000,000 in all"),
        ((13_000, 13_000), "13000x13000 pixels: more than 100,000,000 in all"),
        ((30_000, 30_000), "too large to open safely"),
    ],
)
def test_sizes_are_checked_before_decoding(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    assert message in complaint(tmp_path / "a.png")


def test_real_decompression_bomb_costs_no_memory(tmp_path: Path) -> None:
    """A 170 MP picture in a file of 500 kB is refused by a process that has 100 MB to spare."""
    data = zlib.compressobj()
    body = b"".join(data.compress(bytes(13_000 * 3 + 1)) for _ in range(13_000)) + data.flush()
    whole = png(13_000, 13_000)
    empty = zlib.compress(b"")
    at = whole.index(empty) - 8
    chunk = b"IDAT" + body
    whole = whole[:at] + struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[at + 20 :]
    (tmp_path / "bomb.png").write_bytes(whole)
    code = (
        "import resource, sys; from PIL import Image; import replan.images as images\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: images.load_image(sys.argv[1])\n"
        "except images.ImageError as error: print(error)\n"
        "sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bomb.png"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "more than 100,000,000" in done.stdout


def test_limits_can_be_moved(tmp_path: Path) -> None:
    gradient(4, 4).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", ImageLimits(min_side=1)).size == (4, 4)
    assert "more than 10 in all" in complaint(tmp_path / "a.png", ImageLimits(min_side=1, max_pixels=10))
    check_size(Size(30_000, 1), ImageLimits(min_side=1, max_aspect=30_000))
    for bad in ({"max_pixels": 0}, {"max_pixels": 10**9}, {"min_side": 0}, {"max_side": 8}, {"max_aspect": 0.5}):
        with pytest.raises(ConfigError):
            ImageLimits(**bad)


# --- fit_area --------------------------------------------------------------------------------------------------------


def test_fit_area_equals_the_processors_own_arithmetic() -> None:
    smart = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    rng = random.Random(3)
    for _ in range(5000):
        size = Size(rng.randrange(28, 6000), rng.randrange(28, 6000))
        factor, area = rng.choice((28, 32)), rng.choice((200_704, 1_204_224, 12_845_056))
        if max(size) / min(size) > 190:
            continue
        height, width = smart(size.height, size.width, factor, 1, area)
        assert fit_area(size, area, factor) == (width, height)


def test_fit_area_is_stable_and_bounded() -> None:
    assert fit_area(Size(500, 375), 1_204_224, 28) == (504, 364)
    assert fit_area(Size(10, 10), 1_204_224, 28) == (28, 28)
    assert fit_area(Size(4000, 3000), 1_204_224, 1) == (1267, 950)
    for size in (Size(500, 375), Size(4000, 3000), Size(720, 404), Size(96, 96)):
        once = fit_area(size, 1_204_224, 28)
        assert once.width * once.height <= 1_204_224
        assert fit_area(once, 1_204_224, 28) == once
    with pytest.raises(ValueError, match="cannot fit"):
        fit_area(Size(10, 10), 100, 28)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tolerance"), [("a.png", 0), ("a.PNG", 0), ("a", 0), ("a.jpg", 12), ("a.webp", 60)])
def test_save_and_load(tmp_path: Path, name: str, tolerance: float) -> None:
    path = tmp_path / "new" / "folder" / name
    save_image(gradient(), path)
    assert difference(load_image(path), gradient()) <= tolerance
    save_image(gradient().rotate(180), path)  # replaces what was there
    assert difference(load_image(path), gradient().rotate(180)) <= tolerance
    assert os.listdir(path.parent) == [name]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_unknown_suffix_and_unfit_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot write '\.xyz' pictures; use \.png"):
        save_image(gradient(), tmp_path / "a.xyz")
    with pytest.raises(ImageError, match="cannot be written as JPEG"):
        save_image(gradient().convert("RGBA"), tmp_path / "a.jpg")
    assert os.listdir(tmp_path) == []


def test_no_permission_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "a.png", Path("/proc/self/a.png"), tmp_path):
        with pytest.raises(ImageError, match="cannot be written"):
            write_atomic(path, b"content")
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    """A child process may write no file beyond 1,000 bytes, so the write stops half-way as on a full disk."""
    save_image(Image.new("RGB", (16, 16)), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    code = (
        "import resource, signal, sys; from replan.errors import ImageError; from replan.images import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomic(sys.argv[1], bytes(5000))\n"
        "except ImageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True, check=True)
    assert "a.png: cannot be written: File too large" in done.stdout
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_disk_that_fails_late_or_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    full = OSError(errno.ENOSPC, "No space left on device")
    for raised, expected in ((full, ImageError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def fail(_: int, error: BaseException = raised) -> None:
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(expected):
            write_atomic(tmp_path / "a.png", b"new")
        assert os.listdir(tmp_path) == ["a.png"]
        assert (tmp_path / "a.png").read_bytes() == b"old"


def test_a_size_is_checked_before_anything_is_decoded(tmp_path: Path) -> None:
    """An ICO that claims 16 x 16 may hold a picture of any size, and Pillow decodes it as it opens the file."""
    inner, path = io.BytesIO(), tmp_path / "small.ico"
    Image.new("L", (4000, 4000)).save(inner, format="PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner.getvalue()), 22)
    path.write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + inner.getvalue())
    assert "not a picture in a format that is read" in complaint(path)
