"""What is reused when: presets, names in settings, and the kinds of step that follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from replan import config
from replan.backbones import EditConfig, default_config
from replan.cli.options import Flags
from replan.errors import ConfigError
from replan.speed import EXACT, SpeedConfig, load_speed, plan_steps


def letters(speed: SpeedConfig, total: int, *, exact_reference: bool = False) -> str:
    return "".join(kind[0] for kind in plan_steps(speed, total, exact_reference=exact_reference))


@pytest.mark.parametrize(
    ("speed", "plain", "exact_reference"),
    [
        (EXACT, "ffffffff", "ffffffff"),
        (SpeedConfig("reference"), "fccccccc", "fccccccc"),
        (SpeedConfig("reference", warmup_steps=2, refresh_interval=3), "ffccfccf", "fccccccc"),
        (SpeedConfig("reference", final_steps=2), "fcccccff", "fccccccc"),
        (SpeedConfig("background"), "frrrrrrr", "frrrrrrr"),
        (SpeedConfig("background", warmup_steps=2, refresh_interval=3, final_steps=1), "ffrrfrrf", "fcrrcrrc"),
        (SpeedConfig("background", warmup_steps=99), "ffffffff", "fccccccc"),
        (SpeedConfig("background", final_steps=99), "ffffffff", "fccccccc"),
        (SpeedConfig("background", refresh_interval=1), "ffffffff", "fccccccc"),
    ],
)
def test_kinds_of_steps(speed: SpeedConfig, plain: str, exact_reference: str) -> None:
    assert letters(speed, 8) == plain
    assert letters(speed, 8, exact_reference=True) == exact_reference


def test_presets() -> None:
    assert load_speed("exact") == EXACT
    assert load_speed("cached").cache == "reference"
    assert load_speed("fast").cache == "background"
    full = letters(load_speed("fast"), 28).count("f")
    assert full <= 4
    with pytest.raises(ConfigError, match=r"speed = 'fats': unknown \(did you mean fast\?\)"):
        load_speed("fats")


def test_names_and_files_in_settings(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("cache: reference\nwarmup_steps: 3\n")
    assert load_speed(str(own)) == SpeedConfig("reference", warmup_steps=3)
    fast = config.load(EditConfig, "edit/mini", ["speed=fast"])
    assert fast.speed == load_speed("fast")
    assert config.load(EditConfig, "edit/mini", ["speed=fast", "speed.halo=5"]).speed.halo == 5
    assert config.load(EditConfig, "edit/mini", over=[{"speed": "cached"}]).speed == load_speed("cached")
    assert config.load(EditConfig, config.dump(fast)) == fast
    assert Flags(speed="fast").setup().config.speed == load_speed("fast")
    assert Flags(speed=str(own), settings=["speed=fast"]).setup().config.speed.warmup_steps == 3
    assert Flags().setup().config.speed == default_config("mini").speed
    for setting in ("speed=fats", "speed.cache=all", "speed.halo=-1", "speed.warmup_steps=0", "speed.hallo=1"):
        with pytest.raises(ConfigError, match="speed"):
            Flags(settings=[setting]).setup()
