"""TRL's GRPOTrainer with what it lacks: failures leave the loss, outages stop, greedy checks, later epochs go on."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from replan.train import samples
from replan.train.data import Row, Rows
from replan.train.folder import complete
from replan.train.grpo import GrpoConfig
from replan.train.patience import Outage, Patience
from replan.train.run import RolloutLog
from replan.train.score import Scored

log = logging.getLogger(__name__)


class Rewarder:
    """The reward function as TRL calls it. A None leaves a rollout out of its group's mean and deviation."""

    __name__ = "replan"  # TRL logs rewards/<name>

    def __init__(self, config: GrpoConfig, train: Rows, val: Rows | None, patience: Patience, decode: Any) -> None:
        self.config, self.train, self.val, self.patience = config, train, val, patience
        self._decode = decode
        self.outage: str | None = None
        self.told: list[tuple[int, Scored]] = []  # the last batch's rows and what became of them, without pictures
        self.log: RolloutLog | None = None  # the first process's
        self.is_training = True

    async def __call__(self, completion_ids: Sequence[Sequence[int]], **given: Any) -> list[float | None]:
        """Rewards of the answers; `index` is the dataset's column."""
        rows = self._rows(given["index"])
        answers = [self._decode(ids) for ids in completion_ids]
        try:
            outcomes = await self.patience.score(rows, answers)
        except Outage as error:  # every process must hear of it before any of them stops
            self.outage = str(error)
            return [None] * len(rows)
        self._tell(outcomes, given["log_metric"])
        step = given["trainer_state"].global_step
        bare = (Scored(one.value, failure=one.failure) for one in outcomes)
        self.told = [(row.index, one) for row, one in zip(rows, bare, strict=True)]
        if self.log is not None and self.config.samples and step % self.config.samples == 0:
            name = f"{'train' if self.is_training else 'val'}-step-{step:06d}"
            samples.write(self.config.output, name, rows, answers, outcomes)
        return [one.value for one in outcomes]

    def _rows(self, indices: Sequence[int]) -> list[Row]:
        source = self.train if self.is_training or self.val is None else self.val
        return [source[int(index)] for index in indices]

    def _tell(self, outcomes: Sequence[Scored], log_metric: Any) -> None:
        """Means over the scored rollouts; a part that an outcome lacks (nothing rendered) counts as 0."""
        scored = [one for one in outcomes if one.value is not None]
        log_metric("plan/failed", 1 - len(scored) / len(outcomes))
        log_metric("plan/pauses", float(self.patience.tally.pauses))
        names = sorted({name for one in scored for name in one.parts} | ({"success"} if self._renders else set()))
        for name in names if scored else ():
            log_metric(f"plan/{name}", sum(one.parts.get(name, 0.0) for one in scored) / len(scored))

    @property
    def _renders(self) -> bool:
        return self.config.reward.kind == "edit"


class PlannerTrainer(GRPOTrainer):
    """GRPO on plans. `rewarder` is the only reward function, `done` the steps that are behind it already."""

    def __init__(self, rewarder: Rewarder, done: int = 0, **given: Any) -> None:
        super().__init__(reward_funcs=[rewarder], **given)  # type: ignore[arg-type]
        self._rewarder, self._done = rewarder, done
        self._failed: Tensor | None = None  # [rollouts of all processes]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's, moved to the epoch that it goes on in: one generator draws the order of every epoch in turn."""
        sampler: Any = super()._get_train_sampler(dataset)
        a_step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        for _ in range(self._done * a_step // len(sampler)):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """As TRL does it; an outage met by any process is raised in all of them."""
        self._rewarder.is_training = self.model is not None and bool(self.model.training)
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        outages = self._gather(torch.tensor([self._rewarder.outage is not None], device=rewards.device))
        if outages.any():
            raise Outage(self._rewarder.outage or "another process could not score its rollouts")
        self._failed = rewards.isnan().all(dim=1)
        if self._rewarder.is_training:
            told: list[tuple[int, Scored]] = gather_object(self._rewarder.told)  # of all processes
            if self._rewarder.log is not None:
                self._rewarder.log.add(self.state.global_step, *zip(*told, strict=True))
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL gives failed rollouts no advantage; here they also leave the KL term and the mean over tokens."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        failed = self._failed
        if failed is not None and failed.any():
            first = self.accelerator.process_index * len(inputs)
            mask = output["completion_mask"]
            kept = (~failed[first : first + len(inputs)]).to(mask.dtype).unsqueeze(1).expand_as(mask)
            output["tool_mask"] = kept.contiguous()  # TRL's own mask of tokens that are not trained on
            lost = self._gather((mask * (1 - kept)).sum().reshape(1)).sum()
            output["num_items_in_batch"] = output["num_items_in_batch"] - lost
        return output

    def _gather(self, value: Tensor) -> Tensor:
        """[n] of each process to [processes * n]."""
        found: Any = self.accelerator.gather(value)
        return found

    def evaluate(self, *args: Any, **given: Any) -> dict[str, float]:
        """One answer to each held-out item: the greedy one, or with vLLM a sampled one, as in training."""
        kept = self.generation_config
        if not self.use_vllm:
            self.generation_config = copy.deepcopy(kept)
            self.generation_config.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50)
        try:
            return super().evaluate(*args, **given)
        finally:
            self.generation_config = kept


class Beside(TrainerCallback):
    """Completes each checkpoint to a folder that loads like the start."""

    def __init__(self, start: str) -> None:
        self.start = start

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        from pathlib import Path

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            complete(folder, self.start)


class Console(TrainerCallback):
    """One line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        told = line(state.global_step, state.max_steps, logs)
        if told:
            log.info("%s", told)


def line(step: int, steps: int, logs: dict[str, Any]) -> str:
    """What the console says of a step's or a check's figures."""
    head = "eval_" if "eval_reward" in logs else ""
    shown = {
        "reward": "reward", "reward_std": "±", "plan/valid": "valid", "plan/success": "success",
        "plan/failed": "failed", "kl": "kl", "completions/mean_length": "tokens", "step_time": "seconds",
    }  # fmt: skip
    found = [f"{name} {logs[head + key]:.3f}" for key, name in shown.items() if _is_number(logs.get(head + key))]
    return f"{'held out, ' if head else ''}step {step} of {steps}: " + ", ".join(found) if found else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
