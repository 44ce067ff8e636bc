"""Every file under configs/ loads as what it is, and every backbone's default is written in exactly one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from replan import config
from replan.backbones import BACKBONES, EditConfig, default_config
from replan.rules import load_rules
from replan.speed import SpeedConfig, load_speed

ROOT = Path(__file__).parent.parent / "configs"
EDIT = sorted(path.stem for path in (ROOT / "edit").glob("*.yaml"))
EVAL = sorted(path.stem for path in (ROOT / "eval").glob("*.yaml"))
GRPO = sorted(path.stem for path in (ROOT / "grpo").glob("*.yaml"))
RULES = sorted(path.stem for path in (ROOT / "rules").glob("*.yaml"))
SPEED = sorted(path.stem for path in (ROOT / "speed").glob("*.yaml"))


@pytest.mark.parametrize("name", EDIT)
def test_edit_settings_load_and_round_trip(name: str) -> None:
    loaded = config.load(EditConfig, f"edit/{name}")
    assert config.load(EditConfig, config.dump(loaded)) == loaded


@pytest.mark.parametrize("name", RULES)
def test_rules_load(name: str) -> None:
    phases = load_rules(config.config_path(f"rules/{name}"))
    assert phases[-1].until == 1.0


@pytest.mark.parametrize("name", EVAL)
def test_benchmark_runs_load(name: str) -> None:
    from replan.eval.methods import GenerateConfig

    assert config.load(GenerateConfig, f"eval/{name}")


@pytest.mark.parametrize("name", GRPO)
def test_training_runs_load(name: str) -> None:
    from replan.train.grpo import GrpoConfig

    loaded = config.load(GrpoConfig, f"grpo/{name}")
    assert config.load(GrpoConfig, config.dump(loaded)) == loaded


def test_no_kind_of_config_goes_untested() -> None:
    # a new folder brings a test above that loads its files as what they are
    assert {path.name for path in ROOT.iterdir()} <= {"edit", "rules", "eval", "grpo", "speed"}


def test_yaml_files_only_and_all_found_by_name() -> None:
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml"}
    assert sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in files) == config.config_names()


def test_every_backbone_has_its_own_settings() -> None:
    assert len({row.config for row in BACKBONES}) == len(BACKBONES)
    for row in BACKBONES:
        assert default_config(row.name).steps > 0


def test_the_settings_of_the_decisions() -> None:
    flux, qwen = default_config("flux-kontext").mask, default_config("qwen-image-edit").mask
    assert (flux.expand, flux.isolate, qwen.expand, qwen.isolate) == (0.15, 0.05, 0.0, 0.5)
    for name in ("edit/paper_flux", "edit/paper_qwen"):
        paper = config.load(EditConfig, name).mask
        assert (paper.expand, paper.isolate) == (0.15, 0.0)


def test_plain_yaml_reads_the_same() -> None:
    """Our YAML has fewer implicit types than PyYAML's; the files mean the same in both."""
    for path in ROOT.rglob("*.yaml"):
        assert config.parse_yaml(path.read_text(), str(path)) == yaml.safe_load(path.read_text()), path


@pytest.mark.parametrize("name", SPEED)
def test_speed_presets_load(name: str) -> None:
    assert config.load(SpeedConfig, f"speed/{name}") == load_speed(name)
