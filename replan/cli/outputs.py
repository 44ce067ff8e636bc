"""Where results go, checked before anything slow starts."""

from __future__ import annotations

import os
from pathlib import Path

from replan.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def targets(output: str | None, default: str, count: int) -> list[Path]:
    """The files that `count` pictures go to. `output` may be a file or a folder; several get `_0`, `_1`, ... appended.

    Makes the folder and tries to write there. Raises ConfigError, or OSError naming the place that cannot be written.
    """
    path = Path(default if output is None else output)
    if path.is_dir() or (output or "").endswith(("/", os.sep)):
        path = path / default
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{path}: unknown kind of picture; use {', '.join(SUFFIXES)}, or a folder with a / at its end"
        )
    writable(path.parent)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{number}{path.suffix}") for number in range(count)]


def writable(folder: Path) -> None:
    """Make the folder and try to write there. Raises ConfigError, OSError."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{place}: is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".replan-{os.getpid()}"
    try:
        probe.touch()
    except OSError as error:  # the folder is what the user knows, not the probe
        raise OSError(error.errno, error.strerror, str(folder)) from error
    probe.unlink()


def unused(folder: Path, stem: str) -> Path:
    """The first of `<stem>_001.png`, `<stem>_002.png`, ... that is not there yet."""
    number = 1
    while (folder / f"{stem}_{number:03d}.png").exists():
        number += 1
    return folder / f"{stem}_{number:03d}.png"
