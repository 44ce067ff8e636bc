"""Figures of a report against hand-computed ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import pytest
from PIL import Image
from typer.testing import CliRunner

from replan import record
from replan.cli import app
from replan.errors import ConfigError
from replan.eval import markdown, pixels, report
from replan.eval.statistics import estimate, paired
from replan.types import Box

DIMENSIONS = ("target", "effect", "consistency", "quality")
PERFECT, POOR = (5, 5, 5, 5), (1, 1, 1, 1)


def scored(folder: Path, scores: list[tuple[int | None, ...] | None], judge: str = "mini", **data: Any) -> Path:
    """A run whose items have these (target, effect, consistency, quality); None is a missing picture or score."""
    items: list[dict[str, Any]] = []
    for number, values in enumerate(scores):
        item: dict[str, Any] = {"id": number, "referring": "spatial" if number % 2 else "feature", "task": "recolour"}
        if values is None:
            items.append(item | {"missing": "not generated"})
            continue
        ratings = {
            name: {"unscored": "off the scale"} if value is None else {"score": value, "reason": ""}
            for name, value in zip(DIMENSIONS, values, strict=True)
        }
        items.append(item | {"ratings": ratings, "seconds": 2.0})
    about = {"name": judge, "model": judge, "temperature": 0.0, "prompts": {"target": "abc"}}
    run = {
        "settings": {},
        "data": {"source": "mini", "split": "test"} | data,
        "bad_rows": [{"index": 9, "reason": "x"}],
    }
    record.write_json({"format": 1, "judge": about, "run": run, "items": items}, folder / "scores" / f"{judge}.json")
    return folder


def test_weighted_is_the_published_codes_form_and_fits_the_published_table() -> None:
    assert report.weighted(quality=5, target=5, effect=5, consistency=5) == 5
    assert report.weighted(quality=4, target=5, effect=3, consistency=1) == pytest.approx((5 + 3 + 5 * 3 / 5) / 4)
    table = report.published()
    assert len(table) == 9
    for name in ("Flux.1 Kontext dev", "InstructPix2Pix"):  # the columns' means give it up to their covariance
        row = {column: value for column, value in table[name].items() if column in DIMENSIONS}
        assert report.weighted(**row) == pytest.approx(table[name]["weighted"], abs=0.06)


def test_both_conventions_and_coverage(tmp_path: Path) -> None:
    run = report.read_run(scored(tmp_path / "a", [PERFECT, POOR, (5, None, 5, 5), None]))
    (summary,) = report.summarize([run])
    assert report.coverage(run) == {"items": 4, "generated": 3, "scored": 2, "bad_rows": 1}
    drop, zero = summary.table["drop"], summary.table["zero"]
    assert drop["overall"] is not None
    assert (drop["overall"].mean, drop["overall"].count) == (3.0, 2)
    assert zero["overall"] is not None
    assert (zero["overall"].mean, zero["overall"].count) == ((5 + 1 + 15 / 4 + 0) / 4, 4)
    assert zero["weighted"] is not None
    assert zero["weighted"].mean == pytest.approx((5 + (1 + 1 + 2 / 5) / 4 + 5 / 4 + 0) / 4)
    assert drop["success"] is not None
    assert drop["success"].mean == 0.5
    spatial = summary.groups["zero"]["referring"]["spatial"]["target"]
    assert spatial is not None
    assert (spatial.mean, spatial.count) == (0.5, 2)


def test_intervals_and_pairs() -> None:
    assert estimate([]) is None
    found = estimate([1.0, 5.0] * 50)
    assert found is not None
    assert found == estimate([1.0, 5.0] * 50)
    # normal approximation: 1.96 * 2 / sqrt(100)
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((0.39, 0.39), abs=0.06)
    gap = paired([1, 3, 5, 5], [3, 3, 5, 1])
    assert gap is not None
    assert (gap.difference.mean, gap.wins, gap.ties, gap.losses) == (-0.5, 1, 2, 1)


def test_runs_against_the_first_over_items_of_both(tmp_path: Path) -> None:
    base = report.read_run(scored(tmp_path / "base", [POOR, POOR, PERFECT, None]))
    other = report.read_run(scored(tmp_path / "other", [PERFECT, POOR, None, PERFECT]))
    summary = report.summarize([base, other])[1]
    gap = summary.against["drop"]["overall"]
    assert gap is not None
    assert (gap.difference.mean, gap.difference.count, gap.wins, gap.ties, gap.losses) == (2.0, 2, 1, 1, 0)
    gap = summary.against["zero"]["overall"]
    assert gap is not None
    assert (gap.difference.count, gap.wins, gap.ties, gap.losses) == (4, 2, 1, 1)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = report.read_run(scored(tmp_path / "a", [PERFECT]))
    with pytest.raises(ConfigError, match="different data"):
        report.summarize([one, report.read_run(scored(tmp_path / "b", [PERFECT], split="dev"))])
    with pytest.raises(ConfigError, match="different judges"):
        report.summarize([one, report.read_run(scored(tmp_path / "c", [PERFECT], judge="gemini-1"))])
    with pytest.raises(ConfigError, match="two runs are called a"):
        report.summarize([one, report.read_run(scored(tmp_path / "x" / "a", [PERFECT]))])
    scored(tmp_path / "a", [POOR], judge="gemini-1")
    with pytest.raises(ConfigError, match="several scores"):
        report.read_run(tmp_path / "a")
    assert report.read_run(tmp_path / "a", "gemini").judge["name"] == "gemini-1"
    with pytest.raises(ConfigError, match="has no scores"):
        report.read_run(tmp_path / "none")


def test_command_writes_markdown_json_and_picture(tmp_path: Path) -> None:
    base = scored(tmp_path / "base", [POOR] * 7 + [None])
    other = scored(tmp_path / "other", [PERFECT] * 5 + [(5, 3, 5, 4)] * 3)
    files = ["--json", str(tmp_path / "r.json"), "--picture", str(tmp_path / "r.png")]
    answer = CliRunner().invoke(app, ["eval", "report", str(base), str(other), "--published", *files])
    assert answer.exit_code == 0, answer.output
    text = answer.stdout
    for words in (
        "| base | 8 | 7 | 7 | 1 | 87.5 % | 2.00 |", "drop: items without all four scores are left out",
        "zero: a missing score counts as 0, as in the published table", "### Against base, over the items of both",
        "| Qwen-Image-Edit + RePlan | 3.86 |", "7/0/0", "### Referring type", "### Task type",
    ):  # fmt: skip
        assert words in text
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["runs"][1]["against"]["table"]["zero"]["overall"]["wins"] == 8
    assert found["runs"][0]["table"]["zero"]["overall"]["mean"] == 0.875
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    complete = CliRunner().invoke(app, ["eval", "report", str(other)])
    assert complete.stdout.count("## Scores (") == 1  # the same table twice would tell nothing
    assert "no score is missing, so drop and zero are the same" in complete.stdout


def test_lpips_is_skipped_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torchvision" in str(pixels._lpips()[1])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for error, told in (
        (URLError("no route"), "could not be downloaded: <urlopen error no route>"),
        (RuntimeError("operator torchvision::nms does not exist"), "of no use: operator"),
        (ImportError("cut"), "of no use: cut"),
    ):

        class Broken(ModuleType):
            def __getattr__(self, name: str, error: Exception = error) -> None:
                raise error

        monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", Broken("lpip"))
        assert told in str(pixels._lpips()[1])


def test_markdown_cannot_be_broken_by_names(tmp_path: Path) -> None:
    (summary,) = report.summarize([report.read_run(scored(tmp_path / "a|b", [PERFECT]))])
    assert "a\\|b" in markdown.report([summary], ["drop"])


def test_pixels_outside_and_inside_the_boxes() -> None:
    source = Image.new("RGB", (64, 48), (100, 100, 100))
    boxes = [Box(8, 8, 24, 24), Box(16, 16, 32, 32)]
    result = source.copy()
    result.paste((110, 90, 100), (8, 8, 24, 24))
    row = pixels.measure(source, result, boxes)
    assert row["outside_psnr"] == pixels.EQUAL_PSNR
    assert row["outside_shift"] == 0
    # 256 of 448 boxed pixels moved by 20 / 3 on average
    assert row["inside_change"] == pytest.approx(20 / 3 * 256 / 448)
    brighter = Image.new("RGB", (64, 48), (110, 110, 110))
    row = pixels.measure(source, brighter, boxes)
    assert row["outside_psnr"] == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)
    assert row["outside_shift"] == pytest.approx(3**0.5 * 10)
    assert row["outside_colour"] == [10, 10, 10]
    assert isinstance(row["outside_ssim"], float)
    assert row["outside_lpips"] is None
    everything = pixels.measure(source, brighter, [Box(0, 0, 64, 48)])
    assert everything["outside_psnr"] is None
    assert everything["inside_change"] == 10
    with pytest.raises(ConfigError, match="same size"):
        pixels.measure(source, brighter.resize((32, 24)), boxes)


def test_lpips_gets_only_what_changed_outside() -> None:
    source, result = Image.new("RGB", (64, 48), "black"), Image.new("RGB", (64, 48), "white")
    row = pixels.measure(source, result, [Box(0, 0, 32, 48)], lambda after, before: (after - before).mean())
    assert row["outside_lpips"] == 0.5
