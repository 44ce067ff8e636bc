"""The token grid that a picture would be edited in, without loading the model."""

from __future__ import annotations

import pytest

from replan import backbones
from replan.types import Size


@pytest.mark.parametrize("name", ["flux-kontext", "mini", "qwen-image-edit", "qwen-image-edit-plus"])
@pytest.mark.parametrize("source", [Size(640, 480), Size(719, 389), Size(1540, 600)])
def test_token_grid_needs_no_weights(name: str, source: Size) -> None:
    grids = {
        "flux-kontext": {(640, 480): (74, 55), (719, 389): (87, 47), (1540, 600): (98, 42)},
        "qwen-image-edit": {(640, 480): (74, 56), (719, 389): (88, 48), (1540, 600): (102, 40)},
    }
    config = backbones.default_config(name)
    found = backbones.token_grid(name, source, config)
    if name == "mini":
        assert found.columns / found.rows == pytest.approx(source.width / source.height, rel=0.2)
    else:
        assert found == grids[name.removesuffix("-plus")][tuple(source)]
