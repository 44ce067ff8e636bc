"""Engine trl: TRL's GRPOTrainer on one process, several (DDP) or sharded (FSDP2), as accelerate launches it."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan import config as configs
from replan.errors import ConfigError, PlannerError
from replan.train import run
from replan.train.build import model_folder
from replan.train.data import Row, Rows, prompt_content
from replan.train.folder import complete, merge_adapter
from replan.train.grpo import GrpoConfig
from replan.train.patience import Outage, Patience
from replan.train.services import open_scorer

if TYPE_CHECKING:
    from replan.train.score import Scorer

log = logging.getLogger(__name__)


def train(config: GrpoConfig, scorer: Scorer | None = None) -> Path:
    """Train, or go on where an earlier start of the same run was stopped. Returns the finished planner's folder.

    Raises ConfigError for settings that do not fit, Outage (after a checkpoint) when services stayed out of order.
    """
    try:
        from trl.trainer.grpo_config import GRPOConfig
    except ImportError as error:
        raise ConfigError(f"engine trl: {error}; pip install 'replan[train]'") from error
    rows, val = Rows(config.train), None if config.val is None else Rows(config.val)
    run.check_rows(config, rows)
    arguments = GRPOConfig(**_arguments(config, len(val) if val else 0))
    scorer = open_scorer(config) if scorer is None else scorer
    last = last_checkpoint(config.output)
    trainer = _trainer(config, arguments, rows, val, Patience(scorer, config.services, seed=config.seed), _step(last))
    is_first = trainer.is_world_process_zero()
    if is_first:
        engine = {name: value for name, value in arguments.to_dict().items() if not name.startswith("push_to_hub")}
        run.start(config, rows, val, json.loads(json.dumps(engine, default=str)))
        trainer._rewarder.log = run.RolloutLog(config.output, _step(last))
        os.environ.setdefault("WANDB_PROJECT", "replan")
        os.environ.setdefault("WANDB_DIR", str(config.output.absolute()))
    if last is not None:
        log.info("going on from %s", last)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except Outage as outage:
        trainer._save_checkpoint(trainer.model, trial=None)  # what TRL itself extends: nothing public saves all of it
        if is_first:
            complete(config.output / f"checkpoint-{trainer.state.global_step}", config.planner)
        raise Outage(f"stopped after step {trainer.state.global_step}, with a checkpoint: {outage}") from outage
    finally:
        scorer.close()
    return _finish(trainer, config)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end; the trainer's state is the last file of one."""
    whole = [path for path in output.glob("checkpoint-*") if _step(path) >= 0 and _is_whole(path)]
    return max(whole, key=_step, default=None)


def _step(path: Path | None) -> int:
    number = "0" if path is None else path.name.partition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_whole(path: Path) -> bool:
    try:
        return bool(json.loads((path / "trainer_state.json").read_bytes()))
    except (OSError, ValueError):
        return False


def _trainer(
    config: GrpoConfig, arguments: Any, rows: Rows, val: Rows | None, patience: Patience, done: int = 0
) -> Any:
    from transformers import PrinterCallback, ProgressCallback

    from replan.train.trl_trainer import Beside, Console, PlannerTrainer, Rewarder

    model, processor = _load(config)
    ends = {processor.tokenizer.pad_token, *_end_tokens(model, processor.tokenizer)}

    def decode(ids: Any) -> str:
        """As the planner reads its answers: tags may be special tokens, so none may be skipped but the end."""
        text = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for end in ends:
            text = text.replace(end, "")
        return text

    trainer = PlannerTrainer(
        Rewarder(config, rows, val, patience, decode),
        done,
        model=model,
        args=arguments,
        processing_class=processor,
        train_dataset=dataset(rows),
        eval_dataset=None if val is None else dataset(val, config.val_items),
        peft_config=_lora(config),
        callbacks=[Beside(config.planner), *([Console()] if "console" in config.loggers else [])],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def dataset(rows: Rows, count: int | None = None) -> Any:
    """The rows as TRL takes them; pictures are decoded when a row is looked at."""
    from datasets import Dataset

    def decode(batch: Any) -> dict[str, list[Any]]:
        found = [rows[int(index)] for index in batch["index"]]
        return {
            "index": batch["index"],
            "prompt": [[{"role": "user", "content": _content(row)}] for row in found],
            "images": [[row.image()] for row in found],
        }

    return Dataset.from_dict({"index": list(range(min(len(rows), count or len(rows))))}).with_transform(decode)


def _content(row: Row) -> list[dict[str, str]]:
    return [part if part["type"] == "text" else {"type": "image"} for part in prompt_content(row.prompt)]


def _load(config: GrpoConfig) -> tuple[Any, Any]:
    """Model and processor. Full training keeps float32 weights under bfloat16 autocast, LoRA takes bfloat16 weights."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText

    from replan.planner.processor import load_processor

    name = model_folder(config.planner)
    dtype = torch.bfloat16 if torch.cuda.is_available() and config.optim.lora else torch.float32
    try:
        processor = load_processor(name, AutoConfig.from_pretrained(name).model_type)
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise PlannerError(f"planner {config.planner!r} cannot be loaded: {error}") from error
    if config.policy.freeze_vision:
        model.model.visual.requires_grad_(False)
    return model, processor


def _end_tokens(model: Any, tokenizer: Any) -> list[str]:
    ends = model.generation_config.eos_token_id
    ids = [ends] if isinstance(ends, int) else list(ends or ())
    return [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(ids)]


def _lora(config: GrpoConfig) -> Any:
    if not config.optim.lora:
        return None
    from peft import LoraConfig

    rank = config.optim.lora
    kept_out = r".*\bvisual\b.*" if config.policy.freeze_vision else None
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=kept_out, task_type="CAUSAL_LM"
    )


def _arguments(config: GrpoConfig, held_out: int) -> dict[str, Any]:
    """GRPOConfig's arguments: ours in TRL's names, then what `extra` says."""
    import torch
    from accelerate import PartialState

    wait = timedelta(seconds=config.services.patience + 1800)  # the other processes wait while one pauses
    rollout, policy, optim = config.rollout, config.policy, config.optim
    on_gpu = torch.cuda.is_available()
    world = PartialState(cpu=not on_gpu, timeout=wait).num_processes  # connects them; without `cpu` it may see only one
    if config.rollouts % (optim.micro * world):
        raise ConfigError(
            f"optim.micro = {optim.micro} on {world} processes: must divide the {config.rollouts} rollouts of a step"
        )
    for name in config.loggers:
        if name != "console" and not _is_installed(name):
            raise ConfigError(f"loggers: {name} is not installed: pip install {name}, or leave it out")
    if rollout.vllm != "off" and not _is_installed("vllm"):
        raise ConfigError(f"rollout.vllm = {rollout.vllm}: vLLM is not installed: pip install 'trl[vllm]', or use off")
    ours: dict[str, Any] = {
        "output_dir": str(config.output), "max_steps": config.steps, "seed": config.seed, "data_seed": config.seed,
        "use_cpu": not on_gpu, "bf16": on_gpu, "disable_tqdm": True, "logging_steps": 1,
        "run_name": config.output.name,
        "report_to": [name for name in config.loggers if name != "console"] or "none",
        "per_device_train_batch_size": optim.micro,
        "gradient_accumulation_steps": config.rollouts // (optim.micro * world),
        "learning_rate": optim.lr, "warmup_steps": optim.warmup, "weight_decay": optim.weight_decay,
        "lr_scheduler_type": "constant_with_warmup" if optim.warmup else "constant",
        "max_grad_norm": optim.clip_norm, "gradient_checkpointing": optim.checkpointing,
        "num_generations": rollout.group, "max_completion_length": rollout.max_new,
        "temperature": rollout.temperature, "top_p": rollout.top_p,
        "epsilon": policy.clip_low, "epsilon_high": policy.clip_high, "delta": policy.clip_dual, "beta": policy.kl,
        # token mean over the whole batch; TRL divides by the deviation + 1e-4, the published runs by that + 1e-6
        "loss_type": "dapo", "scale_rewards": "group", "num_iterations": 1,
        "save_strategy": "steps", "save_steps": config.save_every, "save_total_limit": config.keep,
        "ddp_timeout": int(wait.total_seconds()),
    }  # fmt: skip
    if held_out:
        count = min(held_out, config.val_items)
        ours |= {
            "eval_strategy": "steps", "eval_steps": config.val_every, "eval_on_start": True,
            "num_generations_eval": 1, "per_device_eval_batch_size": _divisor(count, config.rollouts),
        }  # fmt: skip
    if rollout.vllm != "off":
        ours |= {
            "use_vllm": True, "vllm_mode": rollout.vllm, "vllm_max_model_length": rollout.max_model,
            "vllm_tensor_parallel_size": rollout.tensor_parallel, "vllm_gpu_memory_utilization": rollout.memory,
        }  # fmt: skip
    return ours | _known(config)


def _is_installed(package: str) -> bool:
    """A folder of that name is no package: W&B leaves one wherever it ran."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def _divisor(count: int, most: int) -> int:
    """The largest batch that divides `count`: all batches weigh the same in the mean."""
    return max(size for size in range(1, min(count, most) + 1) if count % size == 0)


def _known(config: GrpoConfig) -> dict[str, Any]:
    """`extra`, each key checked against TRL's own. Raises ConfigError."""
    import dataclasses

    from trl.trainer.grpo_config import GRPOConfig

    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    for key in config.extra:
        if key not in names:
            raise ConfigError(f"extra.{key}: TRL's GRPOConfig has no such setting{configs.nearest(key, names)}")
    return dict(config.extra)


def _finish(trainer: Any, config: GrpoConfig) -> Path:
    """Write `<output>/planner`; an adapter is merged into its base. All processes save: each may hold a part only."""
    folder = config.output / run.PLANNER
    saved = config.output / run.ADAPTER if config.optim.lora else folder
    trainer.save_model(str(saved))
    if trainer.is_world_process_zero():
        if config.optim.lora:
            merge_adapter(saved, folder)
        complete(folder, config.planner)
        run.finish(config.output)
    trainer.accelerator.wait_for_everyone()
    return folder
