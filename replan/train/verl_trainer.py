"""verl's synchronous GRPO trainer with replan's rule for failures, through verl's own points of extension.

GroupBuffer      trainer.v1.sampler.custom_sampler   which rollouts are trained on
PlannerTrainer   register_trainer("replan")          a run that an outage ends leaves a checkpoint
PlannerRun       the task runner given to run_ppo    its process knows the two
"""

# pyright: reportMissingImports=false
# verl is an extra that needs packages of its own: it is not installed where the rest is checked.

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transfer_queue as queue
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from replan.train.patience import Outage

log = logging.getLogger(__name__)

NAME = "replan"  # trainer.v1.trainer_mode
_TERMINAL = ("finished", "failure")
_POLL = 0.5  # seconds


class GroupBuffer(ReplayBuffer):
    """Hands out the rollouts that have a reward, group by group.

    A rollout whose generation or reward raised never got here, so mean, std and gradient do not know it. What is left
    to do: a single survivor has nobody to be compared with and is left out too (verl would take its bare reward for an
    advantage), losses are counted, and too many of them end the run.

    Its settings are `sampler_kwargs`: group, the rollouts of a prompt, and most_failed, a share.
    """

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
        dropped = [key for keys in groups.values() for key in keys if key not in set(kept)]
        if dropped:
            queue.kv_clear(keys=dropped, partition_id=partition_id)
        if figures["rollouts/lost"]:
            log.warning("%d rollouts left their groups without a reward", figures["rollouts/lost"])
        return _batch(partition_id, kept, tags), figures | _means(partition_id, kept)


def first_prompts(tags: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """The oldest `count` prompts whose rollouts have all ended, well or not."""
    ended = [key for key, tag in tags.items() if tag.get("is_prompt") and tag["status"] in _TERMINAL]
    return sorted(ended, key=lambda key: tags[key]["global_steps"])[:count]


def group_keys(tags: Mapping[str, Mapping[str, Any]], prompts: Sequence[str]) -> dict[str, list[str]]:
    """The rollouts of each prompt; a rollout's key is `<prompt>_<number>_<part>`."""
    groups: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    for key, tag in tags.items():
        prompt = key.partition("_")[0]
        if not tag.get("is_prompt") and prompt in groups:
            groups[prompt].append(key)
    return groups


def select(groups: Mapping[str, Sequence[str]], group: int, most_failed: float) -> tuple[list[str], dict[str, float]]:
    """The rollouts to train on, and what was lost of `group` for each prompt. Raises Outage when it was too much."""
    expected = group * len(groups)
    lost = expected - sum(map(len, groups.values()))
    alone = sum(len(keys) == 1 for keys in groups.values())
    kept = [key for keys in groups.values() if len(keys) > 1 for key in keys]
    allowed = int(most_failed * expected)
    if lost > allowed or not kept:
        raise Outage(
            f"{lost} of {expected} rollouts have no reward (services.most_failed allows {allowed}); "
            "see the warnings of the reward workers, mend the service and start the same command again"
        )
    return kept, {"rollouts/lost": float(lost), "rollouts/alone": float(alone), "rollouts/kept": float(len(kept))}


def mean_parts(parts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the rewards' parts, for the log."""
    values: dict[str, list[float]] = defaultdict(list)
    for told in parts:
        for name, value in told.items():
            if isinstance(value, int | float) and math.isfinite(value):
                values[f"reward/{name}"].append(float(value))
    return {name: sum(found) / len(found) for name, found in values.items()}


def _wait(partition: str, count: int) -> dict[str, dict[str, Any]]:
    while True:
        tags = (queue.kv_list(partition) or {}).get(partition, {})
        if len(first_prompts(tags, count)) >= count:
            return tags
        time.sleep(_POLL)


def _batch(partition: str, keys: Sequence[str], tags: Mapping[str, dict[str, Any]]) -> KVBatchMeta:
    return KVBatchMeta(partition_id=partition, keys=list(keys), tags=[tags[key] for key in keys])


def _means(partition: str, keys: Sequence[str]) -> dict[str, float]:
    fields = queue.kv_batch_get(keys=list(keys), partition_id=partition, select_fields=["extra_fields"])
    found = [getattr(value, "data", value) for value in fields["extra_fields"]]
    return mean_parts(extra.get("reward_extra_info", {}) for extra in found)


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
