"""How fast it goes and how long it still takes."""

from __future__ import annotations

import time

EVERY = 30.0  # seconds between two lines where there is no terminal


class Pace:
    """Counts results; those that were there before say nothing about the speed."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seen = 0
        self.worked = 0
        self.began = self.told = time.monotonic()

    def tick(self, worked: bool) -> str | None:
        """One more result; a line to tell now and then, and at the end."""
        if self.worked == 0 and not worked:
            self.began = time.monotonic()
        self.seen += 1
        self.worked += worked
        now = time.monotonic()
        if now - self.told < EVERY:
            return None
        self.told = now
        return f"{self.seen} of {self.total}, {self.rest()}"

    def rest(self) -> str:
        """Rate and time left in words; empty before the first real work."""
        spent = time.monotonic() - self.began
        if not self.worked or spent <= 0:
            return ""
        rate = self.worked / spent
        left = (self.total - self.seen) / rate
        pace = f"{rate:.1f} per second" if rate >= 1 else f"{1 / rate:.1f} s each"
        return f"{pace}, {_span(left)} left"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
