"""The mini world's exact judge behind the protocol of all judges."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from replan.judge.base import Case, Dimension, Rating, Unscored
from replan.mini.judge import MiniVerdict, judge
from replan.mini.rows import item_of
from replan.mini.scenes import draw

_KEPT = 64  # verdicts; the four dimensions of a case are asked one after the other


class MiniJudge:
    """Exact: compares pixels with the target picture that the row's seed stands for. Free, so nothing is cached."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[tuple[int, str], MiniVerdict] = OrderedDict()
        self._lock = threading.Lock()

    def describe(self) -> Mapping[str, Any]:
        return {"name": "mini", "model": "mini-exact", "temperature": None, "prompts": {}}

    def key(self, case: Case, dimension: Dimension) -> str | None:
        return None

    def estimate(self, case: Case, dimension: Dimension) -> tuple[int, int]:
        return 0, 0

    def rate(self, case: Case, dimension: Dimension) -> Rating:
        """Raises Unscored for a row of another world, or one that this version would draw differently."""
        with self._lock:  # numpy in several threads gains nothing on such small pictures
            verdict = self._verdict(case)
        reason = (
            f"outside the boxes {min(verdict.outside_psnr, 99.0):.1f} dB" if dimension.name == "consistency" else ""
        )
        return Rating(getattr(verdict, dimension.name), reason, "mini-exact")

    def stop(self) -> None:
        """Nothing is under way."""

    def _verdict(self, case: Case) -> MiniVerdict:
        key = (case.id, case.result_sha256)
        if key not in self._verdicts:
            item = item_of(case.extra)
            if item is None:
                raise Unscored(
                    f"item {case.id}: has no mini.seed in extra_info; the exact judge knows only the mini world"
                )
            if draw(item.scene).tobytes() != case.source().tobytes() or item.instruction != case.instruction:
                raise Unscored(f"item {case.id}: was made by another version of the mini world than this one")
            self._verdicts[key] = judge(item, case.result())
            if len(self._verdicts) > _KEPT:
                self._verdicts.popitem(last=False)
        return self._verdicts[key]
