"""The table and the picture of what speed costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from replan.backbones import EditConfig
from replan.bench import defaults, quality
from replan.bench.defaults import fastest, set_default, settings_of
from replan.bench.quality import measure, pareto, render
from replan.config import load
from replan.errors import ConfigError
from replan.speed import load_speed

MEASURED = sorted((Path(__file__).parents[2] / "assets" / "bench").glob("quality*.json"))


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
    assert "The fastest preset within one point of exact: cached.\nCosts more than a point" in text
    assert text.endswith("for those who ask for it: fast.")
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


def test_the_default_is_the_fastest_within_a_point() -> None:
    assert fastest(REPORT["presets"]) == "cached"
    assert fastest({"exact": row(0.8, 0.9), "fast": row(0.79, 2.0)}) == "fast"
    assert fastest({"exact": row(0.8, 0.9), "cached": row(0.9, 0.5), "fast": row(0.7, 2.0)}) == "exact"


def test_a_default_is_written_where_settings_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of("mini") == ("edit/mini", "edit/flux_kontext")
    monkeypatch.setattr(defaults, "settings_of", lambda backbone: ("own.yaml",))
    monkeypatch.setattr(defaults, "config_path", Path)
    monkeypatch.chdir(tmp_path)
    before = "# mine\nspeed:\n  cache: reference\n  halo: 1\nsteps: 8  # few\n"
    Path("own.yaml").write_text(before)
    monkeypatch.setattr(defaults, "load", lambda kind, name: load(EditConfig, "edit/mini", over=[Path(name)]))
    for preset in ("fast", "exact"):
        assert set_default(REPORT | {"count": 100, "default": preset}) == ("own.yaml",)
        text = Path("own.yaml").read_text()
        assert text.startswith(f"# mine\nsteps: 8  # few\nspeed: {preset}  #")
        assert text.count("speed:") == 1
    with pytest.raises(ConfigError, match="n = 99: a default rests on 100"):
        set_default(REPORT | {"count": 99})


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_editors_run_with_the_measured_default(path: Path) -> None:
    report = json.loads(path.read_text())
    assert report["default"] == fastest(report["presets"])
    for name in report.get("settings", ()):  # what --set-default wrote, nobody may change by hand
        assert load(EditConfig, name).speed == load_speed(report["default"]), name
