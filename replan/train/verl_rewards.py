"""verl's reward loop, replan's part: what was generated, word for word, and its picture, to the reward function."""

# pyright: reportMissingImports=false
# verl is an extra that needs packages of its own: it is not installed where the rest is checked.

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from replan.train.verl_score import PNG, STEP


class PlannerRewards(RewardManagerBase):
    """Scores one rollout at a time.

    Unlike verl's own it keeps special tokens (a plan's tags may be some), hands over the picture of the prompt, and
    lets the reward function's exceptions pass: a rollout without a reward leaves its group.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any) -> None:
        if not inspect.iscoroutinefunction(getattr(compute_score, "func", compute_score)):
            raise TypeError("PlannerRewards needs replan.train.verl_score.compute_score as custom_reward_function")
        super().__init__(config, tokenizer, compute_score)
        ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._ends = frozenset(token for token in ends if token is not None)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """`reward_score` and `reward_extra_info` of the last sequence in `data`."""
        item = data[-1:][0]
        fields = item.non_tensor_batch
        extra = dict(fields.get("extra_info") or {})
        extra[STEP] = int(fields.get("global_steps") or 0)
        png = picture_of(fields.get("raw_prompt"))
        if png is not None:
            extra[PNG] = png
        told = await self.compute_score(
            data_source=fields["data_source"],
            solution_str=self.answer(item.batch["responses"], item.batch["attention_mask"]),
            ground_truth=fields["reward_model"]["ground_truth"],
            extra_info=extra,
        )
        return {"reward_score": told.pop("score"), "reward_extra_info": told}

    def answer(self, tokens: Any, mask: Any) -> str:
        """The text of a response [T] up to its end token; `mask` covers prompt and response."""
        length = int(mask[-tokens.shape[-1] :].sum())
        ids = tokens[:length].tolist()
        end = next((at for at, token in enumerate(ids) if token in self._ends), None)
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def picture_of(turns: Iterable[Mapping[str, Any]] | None) -> bytes | None:
    """The encoded picture in a prompt's turns, as the data file holds it."""
    for turn in turns if turns is not None else ():
        parts = turn["content"]
        for part in parts if not isinstance(parts, str) else ():
            if part.get("type") == "image" and part.get("bytes"):
                return part["bytes"]
    return None
