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


_REASONS = {
    "target": {5: "everything that was meant has changed", 1: "what was meant has not changed, or not all of it"},
    "effect": {5: "it looks as asked", 3: "it looks partly as asked", 1: "it does not look as asked"},
    "consistency": {5: "the rest is as it was", 3: "the rest changed visibly", 1: "the rest changed much"},
    "quality": {
        5: "every place looks like something of this world", 4: "slight blur or noise", 3: "visible blur or noise",
        2: "strong blur or noise", 1: "some place looks like nothing of this world",
    },
}  # fmt: skip


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
        score = getattr(verdict, dimension.name)
        reason = _REASONS[dimension.name][score]
        if dimension.name == "consistency":
            reason += f" ({min(verdict.outside_psnr, 99.0):.1f} dB outside the boxes)"
        return Rating(score, reason, "mini-exact")

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
