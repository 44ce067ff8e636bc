"""Both stages in small under verl's own trainer on the CPU: minutes each. scripts/test_verl.sh runs them.

Rollouts come from transformers instead of vLLM (verl_cpu_rollout); everything else is what a GPU run does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WHY = "verl is not installed here; scripts/test_verl.sh runs these tests in an environment that has it"
pytest.importorskip("verl", reason=WHY)
import verl_cpu  # noqa: E402, F401  makes a CUDA torchvision importable before anything asks for it

from replan import config as configs  # noqa: E402
from replan.errors import JudgeError  # noqa: E402
from replan.train import run  # noqa: E402
from replan.train.build import BuildConfig, build, model_folder  # noqa: E402
from replan.train.grpo import GrpoConfig  # noqa: E402

pytestmark = pytest.mark.slow

A, R = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
ON_CPU = {
    R + "name": "hf", R + "load_format": "auto", R + "free_cache_engine": False, R + "agent.num_workers": 1,
    A + "use_torch_compile": False, A + "fsdp_config.use_torch_compile": False, A + "fsdp_config.dtype": "float32",
    "actor_rollout_ref.ref.fsdp_config.dtype": "float32", "data.dataloader_num_workers": 0, "trainer.device": "cpu",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1, "ray_kwargs.ray_init.num_cpus": 32,
    "+ray_kwargs.ray_init.num_gpus": 1, "+ray_kwargs.ray_init.include_dashboard": False,
    "+ray_kwargs.ray_init.object_store_memory": 300_000_000,
}  # fmt: skip
SMALL = (
    "engine=verl", "gpus=1", "rollout.prompts=4", "rollout.group=4", "rollout.max_new=160", "rollout.max_model=512",
    "rollout.tensor_parallel=1", "rollout.max_prompt=256", "optim.micro=4", "val_items=4", "val_every=2",
    "save_every=2", "samples=1", "keep=null",
)  # fmt: skip
CODE = """
import logging, sys
from replan import config
from replan.train.engine_verl import train
from replan.train.grpo import GrpoConfig
logging.basicConfig(level=logging.INFO)
print("planner:", train(config.load(GrpoConfig, sys.argv[1], sys.argv[2:])))
"""


def train(name: str, *over: str, log: Path) -> subprocess.CompletedProcess[str]:
    """One run in a process of its own, as the command line starts it; what it says goes to `log`."""
    extra = f"extra={json.dumps(ON_CPU)}"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent), "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1",
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu,verl_cpu_rollout", "HF_HUB_OFFLINE": "1", "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", CODE, name, *SMALL, *over, extra]
    with log.open("w") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment, timeout=1500, check=False
        )
    return subprocess.CompletedProcess(command, done.returncode, log.read_text(), "")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("dev", 8)):
        source = BuildConfig(split=split, count=count, model="mini", multiple=16, max_pixels=128**2)
        build(source, folder / f"{split}.parquet")
    return folder


def files(data: Path, output: Path) -> list[str]:
    return [f"train={data / 'train.parquet'}", f"val={data / 'dev.parquet'}", f"output={output}"]


def figures(text: str, name: str) -> list[float]:
    """What verl's console logger said about `name`, step after step."""
    return [float(found) for found in re.findall(rf"- {re.escape(name)}:(?:np\.float64\()?(-?[\d.]+(?:e-?\d+)?)", text)]


def steps(output: Path) -> list[int]:
    return [line["step"] for line in run.read(output / run.ROLLOUTS)]


def weights(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_stage_1_trains_and_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    from replan.planner import load_planner
    from replan.train.weaken import weaken

    weak = weaken("mini", tmp_path / "weak", 0.4)
    output = tmp_path / "stage1"
    over = (f"planner={weak}", *files(data, output), "optim.lr=1e-4", "policy.kl=0.01")
    done = train("grpo/mini_stage1", *over, "steps=2", log=tmp_path / "first.log")
    assert done.returncode == 0, done.stdout[-4000:]
    assert steps(output) == [1, 2]
    assert figures(done.stdout, "rollouts/kept") == [16, 16]
    assert all(norm > 0 for norm in figures(done.stdout, "actor/grad_norm"))
    assert len(figures(done.stdout, "actor/kl_loss")) == 2
    before, after = weights(weak), weights(output / "planner")
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    assert load_planner(str(output / "planner"), device="cpu")
    assert json.loads((output / run.RUN).read_text())["config"]["engine"] == "verl"
    assert list((output / run.SAMPLES).glob("train-step-*.html"))

    done = train("grpo/mini_stage1", *over, "steps=3", log=tmp_path / "second.log")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "setting global step to 2" in done.stdout
    lines = run.read(output / run.ROLLOUTS)
    assert [line["step"] for line in lines] == [1, 2, 3]
    drawn = [item for line in lines for item in line["items"]]
    assert len(set(drawn)) == 12  # three times four prompts, none twice: the data went on where it was


class Moody:
    """The mini world's judge; it fails on every fourth item, and altogether while it is out of order."""

    def __init__(self) -> None:
        from replan.judge.mini import MiniJudge

        self.judge, self.is_out = MiniJudge(), False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.judge, name)

    def rate(self, case: Any, dimension: Any) -> Any:
        if self.is_out or case.id % 4 == 1:
            raise JudgeError("out of order")
        return self.judge.rate(case, dimension)


@pytest.fixture
def judge() -> Iterator[tuple[Moody, str]]:
    from replan.serve.run import judge_app, running

    moody = Moody()
    with running(judge_app(moody)) as url:
        yield moody, url


def test_stage_2_survives_a_moody_judge_and_stops_cleanly_without_one(
    data: Path, tmp_path: Path, judge: tuple[Moody, str]
) -> None:
    moody, url = judge
    output = tmp_path / "stage2"
    over = (
        "planner=mini", *files(data, output), f"services.judge={url}", "services.editor=mini", "services.timeout=1",
        "services.backoff=0.5", "services.longest=1", "services.patience=3", "services.most_failed=0.75", "steps=3",
        "rollout.temperature=1.3", "save_every=50", "val=null",
    )  # fmt: skip

    def break_down() -> None:
        while not (output / run.ROLLOUTS).exists() or not steps(output):
            time.sleep(0.2)
        moody.is_out = True

    watch = threading.Thread(target=break_down, daemon=True)
    watch.start()
    done = train("grpo/mini_stage2", *over, log=tmp_path / "first.log")
    assert done.returncode != 0
    assert "mend the service and start the same command again" in done.stdout
    reached = steps(output)[-1]
    assert reached < 3
    assert (output / "checkpoints" / f"global_step_{reached}" / "actor").is_dir()

    moody.is_out = False
    done = train("grpo/mini_stage2", *over, log=tmp_path / "second.log")
    assert done.returncode == 0, done.stdout[-4000:]
    lines = run.read(output / run.ROLLOUTS)
    assert [line["step"] for line in lines] == [1, 2, 3]
    rewards = [reward for line in lines for reward in line["rewards"]]
    assert len(rewards) == 3 * 16
    assert not figures(done.stdout, "actor/kl_loss")  # off in stage 2
    items = [item for line in lines for item in line["items"]]
    unjudged = [reward for item, reward in zip(items, rewards, strict=True) if item > 0 and item % 4 == 1]
    assert all(reward is None or reward <= 0.2 for reward in unjudged)  # malformed plans score without a judge
    kept = sum(reward is not None for reward in rewards)
    assert 0 < kept < len(rewards)
    told = figures((tmp_path / "first.log").read_text() + done.stdout, "rollouts/lost")
    assert sum(told) == len(rewards) - kept


def test_the_stages_are_the_shipped_ones() -> None:
    for name in ("grpo/mini_stage1", "grpo/mini_stage2"):
        assert configs.load(GrpoConfig, name, SMALL).engine == "verl"
    assert Path(model_folder("mini")).is_dir()
