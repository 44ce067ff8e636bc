"""The table and the picture of what speed costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from replan.bench import quality
from replan.bench.quality import measure, pareto, render


def score(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "count": 9}


def row(success: float, speedup: float) -> dict[str, Any]:
    times = {"seconds": 1 / speedup, "speedup": speedup, "speedup_over_exact": speedup}
    return {name: score(success) for name in quality.COLUMNS} | times


REPORT = {
    "backbone": "mini", "split": "test", "count": 9, "default": "cached",
    "facts": {"cpu": "a CPU", "date": "2026-01-01T00:00"},
    "presets": {"exact": row(0.8, 0.9), "cached": row(0.795, 1.5), "fast": row(0.7, 2.0)},
}  # fmt: skip


def test_table_and_picture(tmp_path: Path) -> None:
    text = render(REPORT)
    assert "| fast | 500 ms | 2.00 |" in text
    assert text.endswith("The fastest preset within one point of exact: cached.")
    pytest.importorskip("matplotlib")
    pareto(REPORT, tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.width > 400


def test_it_measures_the_mini_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "ROUNDS", 1)
    report = measure("mini", 2, lambda line: None)
    assert list(report["presets"]) == ["exact", "cached", "fast"]
    for found in report["presets"].values():
        assert 0 <= found["success"]["mean"] <= 1
        assert found["seconds"] > 0
    assert report["default"] in report["presets"]
