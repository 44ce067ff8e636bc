"""What a service takes on, and the one error type that becomes an answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from replan.errors import ConfigError, ReplanError
from replan.images import PILLOW_CEILING

MESSAGE, FIELD = 600, 120  # characters of what a client is told: enough to mend a request, and no copy of it


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one service; the defaults stand here and nowhere else.

    queue        requests that may wait; the next is turned away with 429
    batch        edits made in one forward where they fit; 1 keeps every edit's bytes independent of its neighbours
    timeout      seconds that a request may take, waiting included; a request may ask for less
    max_bytes    of a request's body
    max_pixels   of each picture
    max_steps    denoising steps that a request may ask for
    stuck        seconds of one batch after which the worker counts as hung and the service as not alive
    """

    queue: int = 16
    batch: int = 1
    timeout: float = 300.0
    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 16_777_216
    max_steps: int = 100
    stuck: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("queue", "batch", "max_bytes", "max_pixels", "max_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be 1 or more")
        if self.max_pixels > PILLOW_CEILING:
            raise ConfigError(f"max_pixels = {self.max_pixels}: must be {PILLOW_CEILING} or less, Pillow reads no more")
        for name in ("timeout", "stuck"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be finite and exceed 0")


class Problem(ReplanError):
    """An answer that is no result: HTTP status, type (see wire.Trouble), message, the field at fault, the call's id."""

    def __init__(
        self, status: int, type: str, message: str, field: str | None = None, after: int | None = None
    ) -> None:
        message, field = _cut(message, MESSAGE), None if field is None else _cut(field, FIELD)
        super().__init__(message)
        self.status, self.type, self.message, self.field, self.after = status, type, message, field, after
        self.id: str | None = None

    def plain(self) -> dict[str, str | int | None]:
        """As data, for the way between processes."""
        return {
            "status": self.status, "type": self.type, "message": self.message, "field": self.field, "after": self.after
        }  # fmt: skip


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def invalid(field: str, message: object) -> Problem:
    """422: the request can be read but not done."""
    return Problem(422, "invalid", str(message), field)
