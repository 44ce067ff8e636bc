"""verl's synchronous GRPO trainer with replan's rule for failures, through verl's own points of extension.

GroupBuffer      trainer.v1.sampler.custom_sampler   which rollouts are trained on
PlannerTrainer   register_trainer("replan")          a run that an outage ends leaves a checkpoint
PlannerRun       the task runner given to run_ppo    its process knows the two
"""

# pyright: reportMissingImports=false
# verl is an extra that needs packages of its own: it is not installed where the rest is checked.

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transfer_queue as queue
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from replan.train.patience import Outage
from replan.train.run import RolloutLog
from replan.train.score import Scored
from replan.train.verl_groups import first_prompts, group_keys, mean_parts, select
from replan.types import Failure

log = logging.getLogger(__name__)

NAME = "replan"  # trainer.v1.trainer_mode
_POLL = 0.5  # seconds


class GroupBuffer(ReplayBuffer):
    """Hands out the rollouts that have a reward, group by group.

    A rollout whose generation or reward raised never got here, so mean, std and gradient do not know it. What is left
    to do: a single survivor has nobody to be compared with and is left out too (verl would take its bare reward for an
    advantage), losses are counted, and too many of them end the run.

    Its settings are `sampler_kwargs`: group, the rollouts of a prompt; most_failed, a share; output, the run's folder.
    """

    rewards: RolloutLog | None = None

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, float]]:
        """Wait for `batch_size` finished prompts. Returns their rollouts and figures. Raises Outage."""
        tags = _wait(partition_id, batch_size)
        chosen = first_prompts(tags, batch_size)
        groups = group_keys(tags, chosen)
        queue.kv_clear(keys=chosen, partition_id=partition_id)
        if partition_id == "val":
            keys = [key for uid in chosen for key in groups[uid]]
            if not keys:
                raise Outage("not one held-out rollout has a reward")
            return _batch(partition_id, keys, tags), {}
        kept, figures = select(groups, int(self.sampler_kwargs["group"]), float(self.sampler_kwargs["most_failed"]))
        if figures["rollouts/lost"]:
            log.warning("%d rollouts left their groups without a reward", figures["rollouts/lost"])
        figures |= self._tell(global_steps, groups)
        dropped = [key for keys in groups.values() for key in keys if key not in set(kept)]
        if dropped:
            queue.kv_clear(keys=dropped, partition_id=partition_id)
        return _batch(partition_id, kept, tags), figures

    def _tell(self, step: int, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Write the step to rollouts.jsonl. Returns the means of the rewards' parts."""
        keys = [key for found in groups.values() for key in found]
        fields = queue.kv_batch_get(
            keys=keys, partition_id="train", select_fields=["extra_fields", "rm_scores", "extra_info"]
        )
        told = {key: (float(score.sum()), _bare(about)) for key, score, about in _rows(keys, fields)}
        items, outcomes = list[int](), list[Scored]()
        for found in groups.values():
            item = next((int(told[key][1]["index"]) for key in found), -1)  # -1: not one of the group is left
            outcomes += [Scored(told[key][0]) for key in found]
            missing = int(self.sampler_kwargs["group"]) - len(found)
            outcomes += [Scored(None, failure=Failure("reward", "see the warnings in the log"))] * missing
            items += [item] * (len(found) + missing)
        if self.rewards is None:
            self.rewards = RolloutLog(Path(self.sampler_kwargs["output"]), step)
        self.rewards.add(step, items, outcomes)
        extras = [_bare(value) for value in fields["extra_fields"]]
        return mean_parts(extra.get("reward_extra_info", {}) for extra in extras)


def _rows(keys: Sequence[str], fields: Any) -> Iterator[tuple[str, Any, Any]]:
    return zip(keys, list(fields["rm_scores"]), list(fields["extra_info"]), strict=True)


def _bare(value: Any) -> Any:
    """What is not a tensor may come wrapped."""
    return getattr(value, "data", value)


def _wait(partition: str, count: int) -> dict[str, dict[str, Any]]:
    while True:
        tags = (queue.kv_list(partition) or {}).get(partition, {})
        if len(first_prompts(tags, count)) >= count:
            return tags
        time.sleep(_POLL)


def _batch(partition: str, keys: Sequence[str], tags: Mapping[str, dict[str, Any]]) -> KVBatchMeta:
    return KVBatchMeta(partition_id=partition, keys=list(keys), tags=[tags[key] for key in keys])


@register_trainer(NAME)
class PlannerTrainer(PPOTrainerSync):
    """verl's synchronous trainer; when an outage ends the run, the last finished step is saved first."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trainer_mode = "sync"  # the name chose this class; in all else it is verl's synchronous mode
        self._finished = 0
        self._position: Any = None  # of the data, before the step under way

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> KVBatchMeta:
        """One optimizer step."""
        self._position = self.train_dataloader.state_dict()
        batch = super().step(metrics, timing_raw)
        self._finished, self._position = self.global_steps, None
        return batch

    def fit(self, agent_loop_manager: Any) -> None:
        """Train to the end. Raises Outage, with a checkpoint of what was reached."""
        self._finished = self.global_steps
        try:
            super().fit(agent_loop_manager)
        except Outage:
            self._save_finished()
            raise

    def _save_finished(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self._finished}"
        if self._finished == 0 or folder.exists():
            return
        self.global_steps = self._finished
        self._save_checkpoint()
        if self._position is not None:  # the step that failed had drawn its prompts; a new start draws them again
            torch.save(self._position, folder / "data.pt")
        log.warning("the run stops after step %d; it is saved in %s", self._finished, folder)


class PlannerRun(TaskRunnerV1.__ray_actor_class__):
    """verl's task runner. That Ray loads this class from this module makes PlannerTrainer known where it runs."""
