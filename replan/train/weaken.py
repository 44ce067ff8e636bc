"""A planner made worse on purpose, reproducibly: where a proof of training begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from replan import record
from replan.errors import ConfigError, PlannerError
from replan.train.build import model_folder
from replan.train.folder import complete

WEAKENED = "weakened.json"


def weaken(planner: str, folder: Path, noise: float, seed: int = 0) -> Path:
    """Write `planner` with seeded noise on every matrix to `folder`; `noise` is relative to each one's deviation.

    Raises ConfigError for a noise that is not positive, PlannerError when the planner cannot be loaded.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    if not 0 < noise < 10:
        raise ConfigError(f"noise = {noise}: must lie between 0 and 10; 0.4 costs the mini planner most of its skill")
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(model_folder(planner), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise PlannerError(f"planner {planner!r} cannot be loaded: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    complete(folder, planner)
    record.write_json({"planner": planner, "noise": noise, "seed": seed}, folder / WEAKENED)
    return folder


def weakened_by(folder: Path) -> Mapping[str, Any]:
    """How a folder's planner was made. Raises ConfigError where that is not said."""
    try:
        return json.loads((folder / WEAKENED).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: does not say how it was weakened ({error}); delete it") from error
