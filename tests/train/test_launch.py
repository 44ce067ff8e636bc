"""Slow: the same run on two processes, replicated and sharded. Run with: pytest tests/train/test_launch.py -m slow"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes(tmp_path: Path, way: str) -> None:
    chosen = settings(tmp_path, way, "steps=2", "optim.micro=4", "save_every=2")
    given = configs.dump(chosen) | {"reward": {"kind": "format"}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(given))
    launch = ["--cpu", "--num_processes", "2"]
    if way == "fsdp2":
        (tmp_path / "fsdp2.yaml").write_text(FSDP2)
        launch = ["--config_file", str(tmp_path / "fsdp2.yaml")]
    call = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "replan", "train", "grpo", str(path)]
    done = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = read(chosen.output / "rollouts.jsonl")
    assert len(steps) == 2
    for step in steps:  # both processes' rollouts, group by group
        assert len(step["items"]) == len(step["rewards"]) == chosen.rollouts
        assert [step["items"].count(item) for item in set(step["items"])] == [4, 4]
    for folder in (chosen.output / PLANNER, chosen.output / "checkpoint-2"):
        assert load_planner(str(folder), PlannerConfig())
