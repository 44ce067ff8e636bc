"""verl on a machine without a GPU, for tests, second half: FSDP2 on gloo, and rollouts without vLLM.

The rollout "hf" is transformers' `generate` in a Ray actor. It stands in for vLLM in tests; it is no way to train.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import ray
import torch
import torch.distributed as distributed
import verl.workers.engine.fsdp.transformer_impl as fsdp
import verl.workers.rollout.base as rollouts
from verl.workers.engine.base import EngineRegistry
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput


class Generator:
    """The rollout model, in an actor of its own; the trainer sends its weights after each step."""

    def __init__(self, path: str, longest: int) -> None:
        from transformers import AutoModelForImageTextToText
        from verl.utils import hf_processor, hf_tokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor, self.tokenizer = hf_processor(path), hf_tokenizer(path)
        self.step: int | None = None
        self.longest = longest
        self.turn = asyncio.Lock()

    async def load(self, weights: dict[str, torch.Tensor], step: int | None) -> None:
        own = self.model.state_dict()
        assert set(weights) <= set(own), sorted(set(weights) - set(own))[:3]
        self.model.load_state_dict(weights, strict=False)
        self.step = step

    async def nothing(self, *_: Any, **__: Any) -> None: ...

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = nothing

    async def generate(
        self, prompt_ids: Any, sampling_params: dict[str, Any], request_id: str, image_data: Any = None, **_: Any
    ) -> TokenOutput:
        async with self.turn:
            return self._generate(list(prompt_ids), sampling_params, image_data)

    @torch.no_grad()
    def _generate(self, prompt: list[int], sampling: dict[str, Any], images: Any) -> TokenOutput:
        ids = torch.tensor([prompt])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            seen = self.processor.image_processor(images=list(images), return_tensors="pt")
            inputs |= {"pixel_values": seen["pixel_values"].float(), "image_grid_thw": seen["image_grid_thw"]}
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).long()
        heat = float(sampling.get("temperature", 1.0))
        made = self.model.generate(
            **inputs,
            max_new_tokens=int(sampling.get("max_tokens") or self.longest),
            do_sample=heat > 0,
            temperature=heat or None,
            top_k=0,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        new = made.sequences[0, len(prompt) :]
        chances = [
            torch.log_softmax(logits[0].float() / (heat or 1.0), -1)[token].item()
            for logits, token in zip(made.logits, new, strict=True)
        ]
        told = {"global_steps": self.step}
        return TokenOutput(token_ids=new.tolist(), log_probs=chances, stop_reason="completed", extra_fields=told)


class Courier(rollouts.BaseRollout):
    """In the trainer's process: carries its weights to the generator."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, *_: Any, **__: Any) -> None:
        super().__init__(config, model_config, device_mesh)

    async def resume(self, tags: Any) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: AsyncIterator[Any], global_steps: int | None = None, **_: Any) -> None:
        state = {}
        for name, tensor in weights:  # type: ignore[attr-defined]
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            state[name] = whole.detach().float().cpu().clone()
        await ray.get_actor("generator_0").load.remote(state, global_steps)


class Replica(RolloutReplica):
    async def launch_servers(self) -> None:
        name = f"generator_{self.replica_rank}"
        actor = ray.remote(num_cpus=0)(Generator).options(name=name, max_concurrency=64)
        handle = actor.remote(str(self.model_config.path), int(self.config.response_length))
        await handle.nothing.remote()
        self.servers, self._server_handle, self._server_address = [handle], handle, f"hf://{self.replica_rank}"


def _gloo(backend: str | None = None, **settings: Any) -> Any:
    """verl asks for `cpu:gloo,<device>:<its backend>`, here the same device twice, which torch refuses."""
    return _init_process_group(backend="gloo" if backend in (None, "cpu:gloo,cpu:gloo") else backend, **settings)


def _offload(pin_memory: bool = True) -> Any:
    """Pinned memory needs an accelerator."""
    return _CPUOffloadPolicy(pin_memory=False)


_init_process_group = distributed.init_process_group
distributed.init_process_group = _gloo
_CPUOffloadPolicy = fsdp.CPUOffloadPolicy
fsdp.CPUOffloadPolicy = _offload
EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(fsdp.FSDPEngineWithLMHead)
rollouts._ROLLOUT_REGISTRY[("hf", "async")] = "verl_cpu_rollout.Courier"
RolloutReplicaRegistry.register("hf", lambda: Replica)
