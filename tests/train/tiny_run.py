"""A GRPO run that takes seconds: a tiny random planner, rewards of its text alone. python tiny_run.py FOLDER PAUSE."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from replan import config as configs
from replan.train.build import BuildConfig, build, model_folder
from replan.train.data import Row
from replan.train.folder import complete
from replan.train.grpo import GrpoConfig
from replan.train.score import Scored
from replan.types import Failure

STEPS = 6


class TextScorer:
    """Scores an answer by its letters; `fails(calls, at)` says which rollouts of which call fail."""

    def __init__(self, pause: float = 0.0, fails: Callable[[int, int], bool] = lambda call, at: False) -> None:
        self.pause, self.fails, self.calls = pause, fails, 0

    async def score(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Scored]:
        self.calls += 1
        await asyncio.sleep(self.pause)
        return [
            Scored(None, failure=Failure("editor", "down")) if self.fails(self.calls, at) else Scored(worth(text))
            for at, text in enumerate(answers)
        ]

    def close(self) -> None:
        """Nothing is open."""


def worth(text: str) -> float:
    """A number that hangs on every letter."""
    return hashlib.sha256(text.encode()).digest()[0] / 255


def tiny_planner(folder: Path) -> Path:
    """A Qwen3-VL with the mini planner's tokenizer and next to no weights."""
    import torch
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    config: Any = AutoConfig.from_pretrained(model_folder("mini"))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 32, 32, 1
    text.num_attention_heads = text.num_key_value_heads = 1
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = 16, 16, 1, 1
    vision.out_hidden_size, vision.deepstack_visual_indexes = 32, [0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    complete(folder, "mini")
    return folder


def settings(folder: Path, output: str = "run", *overrides: str) -> GrpoConfig:
    """A run in `folder`, whose planner and data are made when they are missing."""
    if not (folder / "tiny" / "config.json").exists():
        tiny_planner(folder / "tiny")
    for split, count in (("train", 12), ("dev", 2)):
        path = folder / f"{split}.parquet"
        if not path.exists():
            build(BuildConfig(split=split, model="mini", multiple=16, count=count, kind="format"), path)
    base: dict[str, Any] = {
        "planner": str(folder / "tiny"), "train": str(folder / "train.parquet"), "output": str(folder / output),
        "steps": STEPS, "rollout": {"prompts": 2, "group": 4, "max_new": 6, "top_p": 1.0},
        "optim": {"lr": 1e-3, "micro": 8, "checkpointing": False},
        "services": {"editor": "mini", "judge": "mini", "backoff": 0.01, "patience": 0.05},
        "save_every": 2, "loggers": [],
    }  # fmt: skip
    return configs.load(GrpoConfig, base, overrides)


if __name__ == "__main__":
    from replan.train.engine_trl import train

    print("ready", flush=True)
    train(settings(Path(sys.argv[1]), "killed"), TextScorer(float(sys.argv[2])))  # type: ignore[arg-type]
    print("done", flush=True)
