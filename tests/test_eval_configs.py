"""Every run of the benchmark under configs/eval/ loads as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from replan import config
from replan.eval import methods

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs" / "eval").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads(name: str) -> None:
    loaded = config.load(methods.GenerateConfig, f"eval/{name}")
    assert config.load(methods.GenerateConfig, config.dump(loaded)) == loaded
    assert loaded.data.source == ("mini" if name.startswith("mini") else "TainU/IV-Edit")
    assert loaded.seed == 42
    assert methods.todo(loaded).seed == 42  # names its models without loading them
