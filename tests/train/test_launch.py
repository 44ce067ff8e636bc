"""Slow: the same run on two processes, replicated and sharded. Run with: pytest tests/train/test_launch.py -m slow"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import settings

from replan import config as configs
from replan.planner import PlannerConfig, load_planner
from replan.train.run import PLANNER, read

pytestmark = pytest.mark.slow
FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
mixed_precision: "no"
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Qwen3VLTextDecoderLayer
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
"""


def launch(*call: str, fsdp: Path | None = None) -> str:
    """What two processes print that accelerate starts: replicated, or sharded as a file says."""
    how = ["--cpu", "--num_processes", "2"] if fsdp is None else ["--config_file", str(fsdp)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *how, *call],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes(tmp_path: Path) -> None:
    chosen = settings(tmp_path, "ddp", "steps=2", "optim.micro=4", "save_every=2")
    given = configs.dump(chosen) | {"reward": {"kind": "format"}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(given))
    launch("-m", "replan", "train", "grpo", str(path))
    steps = read(chosen.output / "rollouts.jsonl")
    assert len(steps) == 2
    for step in steps:  # both processes' rollouts, group by group
        assert len(step["items"]) == len(step["rewards"]) == chosen.rollouts
        assert [step["items"].count(item) for item in set(step["items"])] == [4, 4]
    for folder in (chosen.output / PLANNER, chosen.output / "checkpoint-2"):
        assert load_planner(str(folder), PlannerConfig())


@pytest.mark.parametrize("lora", [0, 4])
def test_sharded(tmp_path: Path, lora: int) -> None:
    """FSDP2: every parameter is shared out, the items are those of replicas, and a whole, trained planner comes out."""
    own = ["steps=3", "optim.micro=4", "save_every=2", f"optim.lora={lora}"]
    chosen = settings(tmp_path, "fsdp2", *own)
    script = str(Path(__file__).with_name("two_processes.py"))
    fsdp = tmp_path / "fsdp2.yaml"
    fsdp.write_text(FSDP2)
    assert "sharded: 0 of" in launch(script, str(tmp_path), "ddp", *own)
    told = re.search(r"sharded: (\d+) of (\d+)", launch(script, str(tmp_path), "fsdp2", *own, fsdp=fsdp))
    assert told is not None
    assert 0 < int(told[1]) == int(told[2])
    replicated, sharded = (read(tmp_path / name / "rollouts.jsonl") for name in ("ddp", "fsdp2"))
    assert [step["items"] for step in sharded] == [step["items"] for step in replicated]
    assert all(len(set(step["rewards"])) > 1 for step in sharded)
    start, end = (load_file(Path(place) / "model.safetensors") for place in (chosen.planner, chosen.output / PLANNER))
    head = end.pop("lm_head.weight", None)  # sharded, a tied head is written as well
    assert head is None or torch.equal(head, end["model.language_model.embed_tokens.weight"])
    assert {name: value.shape for name, value in end.items()} == {name: value.shape for name, value in start.items()}
    moved = [name for name, value in end.items() if not torch.equal(value, start[name])]
    assert any("q_proj" in name for name in moved)
    assert all(bool(value.isfinite().all()) for value in end.values())
    folders = [chosen.output / PLANNER, *([] if lora else [chosen.output / "checkpoint-2"])]
    assert all(load_planner(str(folder), PlannerConfig()) for folder in folders)
