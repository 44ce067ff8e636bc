"""The settings of a GRPO run, the same for every engine; values live in configs/grpo/*.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from replan.errors import ConfigError
from replan.train.reward import RewardConfig

Engine = Literal["trl", "verl"]
Logger = Literal["console", "tensorboard", "wandb"]


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How answers are sampled: `prompts` items a step, `group` answers to each."""

    prompts: int = 16
    group: int = 8
    temperature: float = 1.0
    top_p: float = 0.99
    max_prompt: int = 2048  # tokens that engine verl makes room for; `replan train data` leaves longer ones out
    max_new: int = 2048
    max_model: int = 8192  # of a vLLM engine
    vllm: Literal["off", "colocate", "server"] = "off"  # engine trl only; verl always uses vLLM
    tensor_parallel: int = 2
    memory: float = 0.6  # share of each GPU that vLLM takes


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The objective: clipped ratio, token mean, and a KL term against the start (0: none, no reference model)."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    clip_dual: float | None = 3.0
    kl: float = 0.0  # coefficient of the low-variance estimate (k3), a term of the loss
    freeze_vision: bool = False  # engine trl only


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """AdamW with a constant rate. `micro` rollouts are trained on at a time on each device."""

    lr: float = 1e-6
    warmup: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    micro: int = 4
    lora: int = 0  # rank; 0 trains all weights
    offload: bool = False  # parameters and optimizer wait on the CPU (engine verl; with trl by accelerate's file)
    checkpointing: bool = True  # recompute activations


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Who edits and who judges in stage 2, and what happens when they fail.

    editor      mini, another backbone's name or folder for one in this process, or http(s)://host:port of a service
    judge       as for the benchmark: mini, http(s)://host/v1#model, openai:model, gemini:model
                http(s)://host:port without a # is a judge of `replan serve judge`
    edit        settings on top of the backbone's or the service's own
    workers     edits and judgements under way at once
    timeout     seconds to wait for one answer of a service; it is asked again a few times
    most_failed a larger share of failed rollouts pauses the training
    backoff     seconds of the first pause, doubled up to `longest`
    patience    seconds of pausing after which the run stops, with a checkpoint
    """

    editor: str = "http://127.0.0.1:8001"
    judge: str = "http://127.0.0.1:8000/v1#judge"
    edit: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 8
    timeout: float = 120.0
    most_failed: float = 0.25
    backoff: float = 5.0
    longest: float = 60.0
    patience: float = 1800.0


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    """One run.

    planner   the model that is trained: a folder, a hub id, or mini
    train     parquet of `replan train data`; val: the held-out one, or null
    output    folder of the run; run it again to go on
    steps     optimizer steps, one for each batch of rollouts
    keep      checkpoints that stay on disk; null: all
    samples   steps between pages of sample rollouts; 0: none
    extra     further settings of the engine's own, by its own names (GRPOConfig of TRL, Hydra keys of verl)
    """

    planner: str
    train: Path
    output: Path
    steps: int
    engine: Engine = "trl"
    val: Path | None = None
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    services: ServiceConfig = field(default_factory=ServiceConfig)
    seed: int = 1
    save_every: int = 20
    keep: int | None = None
    val_every: int = 5
    val_items: int = 128
    loggers: tuple[Logger, ...] = ("console",)
    samples: int = 0
    nodes: int = 1
    gpus: int = 8  # on each node; engine verl. With trl the launcher decides
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise ConfigError(f"engine = {self.engine!r}: must be trl or verl")
        at_least_one = {
            "steps": self.steps, "rollout.prompts": self.rollout.prompts, "rollout.max_new": self.rollout.max_new,
            "optim.micro": self.optim.micro, "services.workers": self.services.workers, "save_every": self.save_every,
            "val_every": self.val_every, "nodes": self.nodes, "gpus": self.gpus,
        }  # fmt: skip
        for name, value in at_least_one.items():
            if value < 1:
                raise ConfigError(f"{name} = {value}: must be 1 or more")
        if self.rollout.group < 2:
            raise ConfigError(f"rollout.group = {self.rollout.group}: an advantage needs 2 or more answers to compare")
        positive = {"rollout.temperature": self.rollout.temperature, "optim.lr": self.optim.lr}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value}: must be finite and exceed 0")
        if not 0 < self.rollout.top_p <= 1 or not 0 <= self.services.most_failed <= 1:
            raise ConfigError("rollout.top_p must lie in (0, 1], services.most_failed in [0, 1]")
        unknown = set(self.loggers) - set(get_args(Logger))
        if unknown:
            raise ConfigError(f"loggers: {', '.join(sorted(unknown))}: must be of {', '.join(get_args(Logger))}")

    @property
    def rollouts(self) -> int:
        """Rollouts of one step."""
        return self.rollout.prompts * self.rollout.group
