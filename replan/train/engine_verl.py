"""The engine for clusters: verl 0.9.1 on Ray, FSDP2 for the policy, vLLM for its rollouts.

A GrpoConfig becomes verl's own Hydra configuration (`overrides`, `compose`), is checked by verl's own functions, and
runs in verl's own trainer with replan's data, reward and rule for failures (verl_score, verl_rewards, verl_trainer).
Ray is started here, or joined where RAY_ADDRESS says so, as inside `ray job submit`.
"""

# pyright: reportMissingImports=false
# verl is an extra that needs packages of its own: it is not installed where the rest is checked.

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from replan import config as configs
from replan.errors import ConfigError
from replan.train import run
from replan.train.build import model_folder
from replan.train.data import Rows
from replan.train.folder import complete
from replan.train.grpo import GrpoConfig
from replan.train.patience import Outage
from replan.train.services import open_scorer

log = logging.getLogger(__name__)

VERSION = "0.9.1"
HELD_OUT_TEMPERATURE = 0.5  # of the published runs' validation
NO_DUAL_CLIP = 1e9  # verl knows no "off": a bound that no ratio reaches
CHECKPOINTS, ADAPTER = "checkpoints", "lora_adapter"


def train(config: GrpoConfig) -> Path:
    """Run to the end, from the newest checkpoint if there is one. Returns the folder of the trained planner.

    Raises ConfigError for settings that verl refuses, Outage when editor or judge stayed away too long.
    """
    if config.policy.freeze_vision:
        raise ConfigError(f"policy.freeze_vision: verl {VERSION} has the key but nothing that heeds it; use engine trl")
    composed = compose(config)
    rows, val = Rows(config.train), None if config.val is None else Rows(config.val)
    run.check_rows(config, rows)
    open_scorer(config).close()  # a wrong name is told now, and not by a lost batch
    run.start(config, rows, val, _plain(composed))
    log.info("verl: %d steps on %d x %d GPUs", config.steps, config.nodes, config.gpus)
    _launch(composed)
    newest = checkpoint_of(config.output)
    if shards_of(newest):
        merge(newest, config.output / run.PLANNER)
        run.finish(config.output)
        return config.output / run.PLANNER
    log.warning("%s: the other nodes hold its shards; gather them here, then: replan train export", newest)
    return newest


def _launch(composed: Any) -> None:
    import ray
    from ray.exceptions import RayTaskError
    from verl.trainer.main_ppo import run_ppo

    from replan.train.verl_trainer import PlannerRun

    was_on = ray.is_initialized()
    try:
        run_ppo(composed, ray.remote(num_cpus=1)(PlannerRun))
    except RayTaskError as error:
        if isinstance(error.cause, Outage):
            raise Outage(str(error.cause)) from None  # Ray's own text is a page of foreign frames
        raise
    finally:
        if not was_on:
            ray.shutdown()


# --- settings --------------------------------------------------------------------------------------------------------


def overrides(config: GrpoConfig) -> dict[str, Any]:
    """A run in verl's words: Hydra keys of verl's `ppo_trainer` and their values; `+` adds a key that it lacks."""
    keys = {**_objective(config), **_data(config), **_policy(config), **_rollout(config), **_reward(config)}
    return {**keys, **_trainer(config), **config.extra}


def _objective(config: GrpoConfig) -> dict[str, Any]:
    policy, actor = config.policy, "actor_rollout_ref.actor"
    return {
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False,
        f"{actor}.loss_agg_mode": "token-mean",
        f"{actor}.clip_ratio": policy.clip_low,
        f"{actor}.clip_ratio_low": policy.clip_low,
        f"{actor}.clip_ratio_high": policy.clip_high,
        f"{actor}.clip_ratio_c": NO_DUAL_CLIP if policy.clip_dual is None else policy.clip_dual,
        f"{actor}.use_kl_loss": policy.kl > 0,
        f"{actor}.kl_loss_coef": policy.kl,
        f"{actor}.kl_loss_type": "low_var_kl",
        f"{actor}.entropy_coeff": 0,
        f"{actor}.ppo_epochs": 1,
        f"{actor}.ppo_mini_batch_size": config.rollout.prompts,  # in prompts: one update a step
        f"{actor}.freeze_vision_tower": policy.freeze_vision,
        f"{actor}.data_loader_seed": config.seed,
    }


def _data(config: GrpoConfig) -> dict[str, Any]:
    return {
        "data.train_files": str(config.train.absolute()),
        "data.val_files": str((config.val or config.train).absolute()),
        "data.val_max_samples": config.val_items if config.val else 1,
        "data.prompt_key": "prompt",
        "data.image_key": "images",
        "data.reward_fn_key": "data_source",
        "data.image_patch_size": None,  # the processor's own
        "data.return_raw_chat": True,
        "data.train_batch_size": config.rollout.prompts,
        "data.max_prompt_length": config.rollout.max_prompt,
        "data.max_response_length": config.rollout.max_new,
        "data.filter_overlong_prompts": True,
        "data.truncation": "error",
        "data.shuffle": True,
        "data.seed": config.seed,
    }


def _policy(config: GrpoConfig) -> dict[str, Any]:
    optim, model, actor = config.optim, "actor_rollout_ref.model", "actor_rollout_ref.actor"
    keys = {
        f"{model}.path": model_folder(config.planner),
        f"{model}.enable_gradient_checkpointing": optim.checkpointing,
        f"{model}.lora_rank": optim.lora,
        f"{actor}.strategy": "fsdp2",
        f"{actor}.optim.optimizer": "AdamW",
        f"{actor}.optim.lr": optim.lr,
        f"{actor}.optim.lr_scheduler_type": "constant",
        f"{actor}.optim.lr_warmup_steps": optim.warmup,
        f"{actor}.optim.weight_decay": optim.weight_decay,
        f"{actor}.optim.clip_grad": optim.clip_norm,
        f"{actor}.grad_clip": optim.clip_norm,
        f"{actor}.ppo_micro_batch_size_per_gpu": optim.micro,
        f"{actor}.fsdp_config.param_offload": optim.offload,
        f"{actor}.fsdp_config.optimizer_offload": optim.offload,
        f"{actor}.checkpoint.save_contents": ["model", "optimizer", "extra"],
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": optim.micro,
        "actor_rollout_ref.ref.fsdp_config.param_offload": optim.offload,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": optim.micro,
    }
    if importlib.util.find_spec("flash_attn") is None:  # verl's default needs it; packed sequences do too
        keys |= {f"{model}.use_remove_padding": False, f"+{model}.override_config.attn_implementation": "sdpa"}
    if optim.lora:
        keys |= {f"{model}.lora_alpha": 2 * optim.lora, "actor_rollout_ref.rollout.load_format": "safetensors"}
    return keys


def _rollout(config: GrpoConfig) -> dict[str, Any]:
    rollout, key = config.rollout, "actor_rollout_ref.rollout"
    return {
        f"{key}.name": "vllm",
        f"{key}.n": rollout.group,
        f"{key}.temperature": rollout.temperature,
        f"{key}.top_p": rollout.top_p,
        f"{key}.top_k": -1,
        f"{key}.seed": config.seed,
        f"{key}.tensor_model_parallel_size": rollout.tensor_parallel,
        f"{key}.gpu_memory_utilization": rollout.memory,
        f"{key}.max_model_len": rollout.max_model,
        f"{key}.max_num_batched_tokens": max(8192, rollout.max_model),
        f"{key}.val_kwargs.do_sample": True,
        f"{key}.val_kwargs.temperature": HELD_OUT_TEMPERATURE,
        f"{key}.val_kwargs.top_p": rollout.top_p,
        f"{key}.val_kwargs.n": 1,
    }


def _reward(config: GrpoConfig) -> dict[str, Any]:
    function, loop = "reward.custom_reward_function", "reward.reward_manager"
    val = None if config.val is None else config.val.absolute()  # workers may stand in another folder
    settings = replace(config, train=config.train.absolute(), val=val, output=config.output.absolute())
    return {
        # one process: it only waits for services, and failures are counted in one place
        "reward.num_workers": 1,
        f"{function}.path": "pkg://replan.train.verl_score",
        f"{function}.name": "compute_score",
        f"+{function}.reward_kwargs.settings": json.dumps(configs.dump(settings)),
        f"{loop}.source": "importlib",
        f"{loop}.module.path": "pkg://replan.train.verl_rewards",
        f"{loop}.name": "PlannerRewards",
        "trainer.v1.trainer_mode": "replan",
        "trainer.v1.sampler.custom_sampler.path": "pkg://replan.train.verl_trainer",
        "trainer.v1.sampler.custom_sampler.name": "GroupBuffer",
        "+trainer.v1.sampler.sampler_kwargs.group": config.rollout.group,
        "+trainer.v1.sampler.sampler_kwargs.most_failed": config.services.most_failed,
        "+trainer.v1.sampler.sampler_kwargs.output": str(settings.output),
    }


def _trainer(config: GrpoConfig) -> dict[str, Any]:
    output = config.output.absolute()
    return {
        "trainer.use_v1": True,
        "trainer.nnodes": config.nodes,
        "trainer.n_gpus_per_node": config.gpus,
        "trainer.total_training_steps": config.steps,
        "trainer.total_epochs": 1_000_000,  # the steps decide
        "trainer.save_freq": config.save_every,
        "trainer.max_actor_ckpt_to_keep": config.keep,
        "trainer.test_freq": config.val_every if config.val else -1,
        "trainer.val_before_train": config.val is not None,
        "trainer.logger": list(config.loggers),
        "trainer.project_name": "replan",
        "trainer.experiment_name": output.name,
        "trainer.default_local_dir": str(output / CHECKPOINTS),
        "trainer.resume_mode": "auto",
        "+ray_kwargs.ray_init.runtime_env.env_vars.TENSORBOARD_DIR": str(output / "tensorboard"),
        "+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_DIR": os.environ.get("WANDB_DIR", str(output)),
    }


def arguments(keys: Mapping[str, Any]) -> list[str]:
    """The keys as command-line arguments of Hydra, strings quoted."""
    return [f"{name}={_literal(value)}" for name, value in keys.items()]


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_literal(inner)}" for name, inner in value.items()) + "}"
    # within quotes a backslash counts only where it stands before a quote
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value)) + "'"


def compose(config: GrpoConfig) -> Any:
    """verl's configuration of a run, checked by verl. Raises ConfigError."""
    _require_verl()
    from hydra import compose as compose_keys
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(config_module="verl.trainer.config", version_base=None):
            composed = compose_keys(config_name="ppo_trainer", overrides=arguments(overrides(config)))
        auto_set_device(composed)
        validate_config(composed, need_reference_policy(composed), need_critic(composed))
        OmegaConf.resolve(composed.copy())
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"verl does not know or accept a key: {error}; check the settings under extra") from error
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"verl refuses the settings: {error}") from error
    return composed


def _plain(composed: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(composed.copy(), resolve=True, throw_on_missing=False)
    return json.loads(json.dumps(found, default=str))


def _require_verl() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("verl")
    except PackageNotFoundError as error:
        raise ConfigError(f"engine = verl: is not installed: pip install 'replan[verl]' (verl {VERSION})") from error
    if found != VERSION:
        raise ConfigError(f"engine = verl: needs verl {VERSION}, found {found}: pip install 'replan[verl]'")


# --- results ---------------------------------------------------------------------------------------------------------


def checkpoint_of(folder: Path) -> Path:
    """The actor's folder of a checkpoint: of a run its newest, of a step its own. Raises ConfigError."""
    if (folder / "fsdp_config.json").is_file():
        return folder
    if (folder / "actor").is_dir():
        return folder / "actor"
    root = folder if folder.name == CHECKPOINTS else folder / CHECKPOINTS
    steps = {int(path.name.rpartition("_")[2]): path for path in root.glob("global_step_*") if path.is_dir()}
    if not steps:
        raise ConfigError(f"{folder}: holds no checkpoint of verl (global_step_N/actor)")
    return steps[max(steps)] / "actor"


def shards_of(actor: Path) -> list[Path]:
    """The weight files of a checkpoint, one per GPU of the run; empty unless all are here."""
    found = sorted(actor.glob("model_world_size_*_rank_*.pt"))
    world = int(found[0].name.split("_")[3]) if found else 0
    return found if world and len(found) == world else []


def merge(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint as an ordinary Hugging Face folder, by verl's own merger. Raises ConfigError.

    `checkpoint` is a run's folder, a global_step_N or its actor folder. Any error of the merger is an error here: a
    folder is never half merged or filled from a shard that could not be read. The files beside the weights are those
    of the run's start, where the run's folder says what that was.
    """
    _require_verl()
    actor = checkpoint_of(checkpoint)
    if not shards_of(actor):
        raise ConfigError(f"{actor}: not every shard is here (model_world_size_W_rank_0 to W-1); copy them together")
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", str(actor), "--target_dir", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"RAY_DEDUP_LOGS": "0"}
    )
    if done.returncode:
        raise ConfigError(f"{actor}: verl could not merge it:\n{done.stderr[-2000:]}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{actor}: verl merged it, but {folder} holds no weights")
    told = actor.parent.parent.parent / run.RUN  # <run>/checkpoints/global_step_N/actor
    about = json.loads(told.read_bytes()) if told.is_file() else {}
    if (folder / ADAPTER).is_dir():
        _fold(folder, about.get("engine", {}).get("actor_rollout_ref", {}).get("model", {}).get("lora_alpha"))
    if about:
        complete(folder, about["config"]["planner"])


def _fold(folder: Path, alpha: int | None) -> None:
    """Merge the adapter, which verl's merger leaves beside the base, into it; verl's checkpoints lack its `alpha`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    if alpha is None:
        raise ConfigError(
            f"{folder}: was trained with LoRA, and only {run.RUN} of its run knows the scale; keep it there"
        )
    path = folder / ADAPTER / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"lora_alpha": alpha}))
    base: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(base, str(folder / ADAPTER)).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(folder)
    shutil.rmtree(folder / ADAPTER)
