"""The verl engine against verl itself. Skipped where verl is not installed: scripts/test_verl.sh brings it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

WHY = "verl is not installed here; scripts/test_verl.sh runs these tests in an environment that has it"
pytest.importorskip("verl", reason=WHY)
import verl_cpu  # noqa: E402, F401  makes a CUDA torchvision importable before anything asks for it
from test_verl_rules import GOOD, settings  # noqa: E402

from replan import config as configs  # noqa: E402
from replan.errors import ConfigError, ServiceError  # noqa: E402
from replan.train import engine_verl, run  # noqa: E402
from replan.train.build import BuildConfig, build, model_folder  # noqa: E402
from replan.train.data import Rows, prompt_content  # noqa: E402
from replan.train.grpo import GrpoConfig  # noqa: E402
from replan.train.patience import Outage  # noqa: E402
from replan.train.verl_score import RolloutLost  # noqa: E402

A, R = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
PUBLISHED = {
    "algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": True, "algorithm.use_kl_in_reward": False,
    "data.train_batch_size": 16, R + "n": 8, A + "ppo_mini_batch_size": 16, A + "ppo_epochs": 1,
    "data.max_prompt_length": 2048, "data.max_response_length": 2048, R + "max_model_len": 8192,
    A + "optim.optimizer": "AdamW", A + "optim.lr": 1e-6, A + "optim.lr_scheduler_type": "constant",
    A + "optim.weight_decay": 0.01, A + "optim.clip_grad": 1.0, A + "grad_clip": 1.0, A + "clip_ratio_c": 3.0,
    A + "clip_ratio_low": 0.2, A + "loss_agg_mode": "token-mean", A + "entropy_coeff": 0,
    A + "freeze_vision_tower": False, A + "strategy": "fsdp2", A + "fsdp_config.param_offload": True,
    A + "fsdp_config.optimizer_offload": True, "actor_rollout_ref.ref.fsdp_config.param_offload": True,
    R + "name": "vllm", R + "temperature": 1.0, R + "top_p": 0.99, R + "tensor_model_parallel_size": 2,
    R + "gpu_memory_utilization": 0.6, R + "val_kwargs.temperature": 0.5, R + "val_kwargs.n": 1,
    "trainer.n_gpus_per_node": 8, "trainer.nnodes": 1, "actor_rollout_ref.model.lora_rank": 0,
}  # fmt: skip
STAGES = {
    "stage1": {
        "actor_rollout_ref.model.path": "Qwen/Qwen2.5-VL-7B-Instruct", "trainer.total_training_steps": 30,
        A + "use_kl_loss": True, A + "kl_loss_coef": 1e-2, A + "kl_loss_type": "low_var_kl", A + "clip_ratio_high": 0.3,
        "trainer.save_freq": 20, "trainer.test_freq": 5,
    },
    "stage2": {
        "actor_rollout_ref.model.path": "runs/stage1/planner", "trainer.total_training_steps": 40,
        A + "use_kl_loss": False, A + "clip_ratio_high": 0.28, "trainer.save_freq": 5, "trainer.test_freq": 20,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has, others that load verl need too."""
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "verl_cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_published_number_is_in_verls_own_configuration(stage: str) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass

    composed = engine_verl.compose(configs.load(GrpoConfig, f"grpo/{stage}", ["engine=verl"]))
    found = {key: OmegaConf.select(composed, key) for key in {**PUBLISHED, **STAGES[stage]}}
    assert found == {**PUBLISHED, **STAGES[stage]}
    assert need_reference_policy(composed) is (stage == "stage1")
    assert not need_critic(composed)
    actor = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
    assert (actor.rollout_n, actor.fsdp_config.strategy) == (8, "fsdp2")


def test_a_typo_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"actor_rollout_ref\.actor\.clip_ration"):
        engine_verl.compose(settings(extra={"actor_rollout_ref.actor.clip_ration": 0.2}))


def test_a_batch_that_does_not_fit_the_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"real_train_batch_size \(120\) must be divisible"):
        engine_verl.compose(settings(rollout={"prompts": 15}, gpus=7))


@pytest.mark.parametrize("name", ["a b", "it's", "back\\slash\\", "\\'", "a=b,c:{d}[e]", "$x #1"])
def test_any_path_reaches_verl_as_it_is(name: str, tmp_path: Path) -> None:
    composed = engine_verl.compose(settings(output=str(tmp_path / name)))
    assert composed.trainer.default_local_dir == str(tmp_path / name / "checkpoints")
    told = json.loads(composed.reward.custom_reward_function.reward_kwargs.settings)
    assert told["output"] == str(tmp_path / name)


def test_trl_beside_verl_is_hidden_in_every_process() -> None:
    code = "import verl, verl.models.transformers.monkey_patch as patch; print(patch.is_trl_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner() -> tuple[Any, Any]:
    from verl.utils import hf_processor, hf_tokenizer

    folder = model_folder("mini")
    return hf_tokenizer(folder), hf_processor(folder)


@pytest.fixture(scope="module", params=["image_first", "text_first"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    template = folder / "prompt.txt"
    template.write_text("Plan the edit.\n{instruction}")
    path = folder / "train.parquet"
    source = BuildConfig(
        count=5, model="mini", template=str(template), order=request.param, multiple=16, max_pixels=128**2,
        kind="format",
    )  # fmt: skip
    build(source, path)
    return path


def dataset(path: Path, planner: tuple[Any, Any], **over: Any) -> Any:
    from verl.utils.dataset.rl_dataset import RLHFDataset

    composed = engine_verl.compose(settings(train=str(path), rollout={"max_prompt": 512, **over}))
    tokenizer, processor = planner
    return RLHFDataset(data_files=str(path), tokenizer=tokenizer, processor=processor, config=composed.data)


def test_verl_reads_our_rows(data: Path, planner: tuple[Any, Any]) -> None:
    """The very prompt and the very picture that the other engine gets, in either order."""
    _, processor = planner
    rows, found = Rows(data), dataset(data, planner)
    assert len(found) == len(rows) == 5
    for index in range(5):
        item, row = found[index], rows[index]
        parts = item["raw_prompt"][0]["content"]
        order = ["image", "text"] if data.parent.name.startswith("image") else ["text", "image", "text"]
        assert [part["type"] for part in parts] == order
        ours = [{"role": "user", "content": prompt_content(row.prompt)}]
        texts = [processor.apply_chat_template(turns, tokenize=False) for turns in (item["raw_prompt"], ours)]
        assert texts[0] == texts[1]
        images, _ = asyncio.run(
            type(found).process_vision_info(item["raw_prompt"], found.image_patch_size, found.config)
        )
        assert images[0].convert("RGB").tobytes() == row.image().tobytes()  # nobody resized it
        assert item["data_source"] == "replan/format"
        assert item["extra_info"]["index"] == index


def test_verl_filters_overlong_prompts(data: Path, planner: tuple[Any, Any]) -> None:
    assert len(dataset(data, planner, max_prompt=30)) == 0


# --- reward ----------------------------------------------------------------------------------------------------------


def rollout(path: Path, planner: tuple[Any, Any], index: int, text: str) -> Any:
    """One rollout as verl hands it to its reward loop."""
    import numpy as np
    import torch
    from tensordict import TensorDict
    from verl import DataProto

    tokenizer, _ = planner
    item = dataset(path, planner)[index]
    ids = tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    tokens = torch.full((1, len(ids) + 7), tokenizer.pad_token_id)
    tokens[0, : len(ids)] = torch.tensor(ids)
    mask = torch.ones(1, 4 + tokens.shape[1], dtype=torch.long)
    mask[0, 4 + len(ids) :] = 0
    fields = {"data_source", "reward_model", "extra_info", "raw_prompt"}
    other = {key: np.array([item[key]]) for key in fields} | {"global_steps": np.array([3])}
    batch = TensorDict(
        {"prompts": torch.ones(1, 4, dtype=torch.long), "responses": tokens, "attention_mask": mask}, batch_size=1
    )
    return DataProto(batch=batch, non_tensor_batch=other)


def rewarder(path: Path, planner: tuple[Any, Any], config: GrpoConfig) -> Any:
    from verl.trainer.ppo.reward import load_reward_manager

    composed = engine_verl.compose(config)

    async def load() -> Any:
        return load_reward_manager(composed, planner[0])

    return asyncio.run(load())


def test_the_reward_loop_scores_what_was_said(data: Path, planner: tuple[Any, Any]) -> None:
    loop = rewarder(data, planner, settings(train=str(data), output=str(data.parent / "scores")))
    good, bad = (asyncio.run(loop.run_single(rollout(data, planner, 1, text))) for text in (GOOD, "<think>no"))
    assert good["reward_score"] == pytest.approx(0.905)
    assert good["reward_extra_info"]["format"] == good["reward_extra_info"]["valid"] == 1
    assert bad["reward_score"] < 0.2
    assert bad["reward_extra_info"]["format"] == 0


def test_an_outage_raises_in_the_reward_loop(
    data: Path, planner: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from replan.train import services
    from replan.train.score import Scorer

    def broken(request: Any) -> Any:
        assert request.image.size == (96, 96)  # the picture came along
        raise ServiceError("the editor is gone")

    config = settings(
        train=str(data), reward={"kind": "edit"}, output=str(data.parent / "edit"), services={"backoff": 0.0}
    )
    monkeypatch.setattr(services, "open_scorer", lambda _: Scorer(config.reward, broken, SimpleNamespace(rate=None)))
    loop = rewarder(data, planner, config)
    with pytest.raises(RolloutLost, match="the editor is gone"):
        asyncio.run(loop.run_single(rollout(data, planner, 0, GOOD)))
    told = asyncio.run(loop.run_single(rollout(data, planner, 0, "<think>no plan</think>")))
    assert told["reward_extra_info"]["plan"] == 0  # the policy's own fault scores


# --- failures, groups, gradients -------------------------------------------------------------------------------------


class Queue:
    """The parts of TransferQueue that the sampler uses, in memory."""

    def __init__(self, items: dict[str, dict[str, Any]]) -> None:
        self.items = items

    def kv_list(self, partition_id: str) -> dict[str, Any]:
        return {partition_id: dict(self.items)}

    def kv_clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            del self.items[key]

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        import torch

        extra = {"reward_extra_info": {"format": 1.0}}
        return {
            "extra_fields": [SimpleNamespace(data=extra) for _ in keys],
            "rm_scores": [torch.tensor([0.0, int(key.split("_")[1]) / 10]) for key in keys],
            "extra_info": [{"index": ord(key[0])} for key in keys],
        }


def buffer(items: dict[str, dict[str, Any]], output: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Queue]:
    from verl.utils.import_utils import load_extern_type

    from replan.train import verl_trainer

    found = Queue(items)
    monkeypatch.setattr(verl_trainer, "queue", found)
    kind = load_extern_type("pkg://replan.train.verl_trainer", "GroupBuffer")
    given = {"group": 4, "most_failed": 0.5, "output": str(output)}
    return kind("replan", {}, 8, "drop", given), found


def test_lost_rollouts_leave_their_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_verl_rules import tags

    sampler, queue = buffer(tags(aa=3), tmp_path, monkeypatch)
    batch, told = sampler.sample(global_steps=1, partition_id="train", batch_size=2)
    assert sorted(batch.keys) == [f"bb_{k}_0" for k in range(4)]  # one of aa was left, with nobody to compare
    assert told == {"rollouts/lost": 3, "rollouts/alone": 1, "rollouts/kept": 4, "reward/format": 1}
    assert {key[:2] for key in queue.items} == {"bb", "cc"}
    (line,) = run.read(tmp_path / run.ROLLOUTS)
    assert sorted(map(str, line["rewards"])) == sorted(map(str, [0.0, None, None, None, 0.0, 0.1, 0.2, 0.3]))


def test_too_many_losses_stop_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_verl_rules import tags

    sampler, _ = buffer(tags(aa=4, bb=1), tmp_path, monkeypatch)
    with pytest.raises(Outage, match="5 of 8 rollouts have no reward"):
        sampler.sample(global_steps=1, partition_id="train", batch_size=2)


def test_a_lost_rollout_is_in_neither_mean_nor_deviation_nor_gradient() -> None:
    """verl's own maths on three survivors of a group of four and the row of padding that fills the batch."""
    import numpy as np
    import torch
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
    from verl.utils.config import omega_conf_to_dataclass

    rewards, mask = torch.zeros(4, 2), torch.ones(4, 2)
    rewards[:, 1] = torch.tensor([1.0, 0.5, 0.0, 0.0])
    mask[3] = 0
    batch = DataProto.from_dict(
        tensors={"token_level_rewards": rewards.clone(), "response_mask": mask},
        non_tensors={"uid": np.array(["u", "u", "u", "pad"], dtype=object)},
    )
    found = compute_advantage_for_multi_trajectories(
        batch, ["u_0_0", "u_1_0", "u_3_0", "pad_0_0"], "grpo", norm_adv_by_std_in_grpo=True
    )
    advantages = found.batch["advantages"]
    assert torch.allclose(advantages[:, 0], torch.tensor([1.0, 0.0, -1.0, 0.0]), atol=1e-5)  # (r - 0.5) / (0.5 + 1e-6)
    composed = engine_verl.compose(settings())
    new = torch.zeros(4, 2, requires_grad=True)
    loss, _ = get_policy_loss_fn("vanilla")(
        old_log_prob=torch.zeros(4, 2), log_prob=new, advantages=advantages, response_mask=mask,
        loss_agg_mode="token-mean", config=omega_conf_to_dataclass(composed.actor_rollout_ref.actor),
    )  # fmt: skip
    loss.backward()
    assert new.grad is not None
    assert torch.allclose(new.grad[:, 0], torch.tensor([-1.0, 0.0, 1.0, 0.0]) / 6)  # six tokens have a say


def test_an_outage_leaves_a_checkpoint_of_the_last_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls

    from replan.train import verl_trainer

    saved = []

    def step(self: Any, metrics: Any, timing_raw: Any) -> str:
        if self.global_steps == 3:
            raise Outage("the judge is gone")
        return "batch"

    def fit(self: Any, manager: Any) -> None:
        for number in (1, 2, 3):
            self.global_steps = number
            self.step({}, {})

    def save(self: Any) -> None:
        saved.append(self.global_steps)
        folder = tmp_path / f"global_step_{self.global_steps}"
        folder.mkdir()
        torch.save("after step 3's draw", folder / "data.pt")

    monkeypatch.setattr(PPOTrainerSync, "step", step)
    monkeypatch.setattr(PPOTrainerSync, "fit", fit)
    monkeypatch.setattr(PPOTrainerSync, "_save_checkpoint", save)
    trainer = verl_trainer.PlannerTrainer.__new__(get_trainer_cls(verl_trainer.NAME))
    trainer.config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(tmp_path)))
    trainer.global_steps, trainer._finished, trainer._position = 0, 0, None
    trainer.train_dataloader = SimpleNamespace(state_dict=lambda: f"before step {trainer.global_steps}")
    with pytest.raises(Outage):
        trainer.fit(None)
    assert saved == [2]
    assert torch.load(tmp_path / "global_step_2" / "data.pt") == "before step 3"


# --- merger ----------------------------------------------------------------------------------------------------------


def handmade(folder: Path, model: Any) -> None:
    """A checkpoint of `model`, a form of the mini planner, as verl's FSDP2 engine writes it."""
    import shutil

    import torch
    import torch.distributed as distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    actor = folder / "actor"
    shutil.copytree(
        model_folder("mini"), actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors", "*.txt", "*.md")
    )
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
        shards = {name: DTensor.from_local(value, mesh, [Shard(0)]) for name, value in model.state_dict().items()}
        torch.save(shards, actor / "model_world_size_1_rank_0.pt")
    finally:
        distributed.destroy_process_group()


def load(folder: Path | str) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)


def test_a_checkpoint_becomes_a_planner(tmp_path: Path) -> None:
    import torch

    from replan.planner import load_planner
    from replan.train.folder import export

    model = load(model_folder("mini"))
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    handmade(tmp_path / "run" / "checkpoints" / "global_step_7", model)
    (tmp_path / "run" / run.RUN).write_text(json.dumps({"config": {"planner": "mini"}}))
    export(tmp_path / "run", tmp_path / "planner")
    weights, found = model.state_dict(), load(tmp_path / "planner").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert (tmp_path / "planner" / "replan_prompt.txt").read_text() == "{instruction}"
    assert load_planner(str(tmp_path / "planner"), device="cpu")


def test_an_adapter_is_folded_in(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        load(model_folder("mini")), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    checkpoint = tmp_path / "run" / "checkpoints" / "global_step_7"
    handmade(checkpoint, model)
    with pytest.raises(ConfigError, match=r"only run\.json of its run knows the scale"):
        engine_verl.merge(checkpoint, tmp_path / "nowhere")
    told = {"config": {"planner": "mini"}, "engine": {"actor_rollout_ref": {"model": {"lora_alpha": 4}}}}
    (tmp_path / "run" / run.RUN).write_text(json.dumps(told))
    engine_verl.merge(checkpoint, tmp_path / "planner")
    expected, found = model.merge_and_unload().state_dict(), load(tmp_path / "planner").state_dict()
    base = load(model_folder("mini")).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=0.02, atol=0.002) for name in expected)  # bfloat16
    assert sum(not torch.equal(found[name], base[name]) for name in base) == 8  # two in each of four layers
    assert not (tmp_path / "planner" / "lora_adapter").exists()


def test_a_broken_shard_is_an_error_and_no_planner(tmp_path: Path) -> None:
    handmade(tmp_path / "global_step_7", load(model_folder("mini")))
    (tmp_path / "global_step_7" / "actor" / "model_world_size_1_rank_0.pt").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="verl could not merge it"):
        engine_verl.merge(tmp_path / "global_step_7", tmp_path / "planner")
    assert not list((tmp_path / "planner").glob("*.safetensors"))
