"""verl on a machine without a GPU, for tests: loaded by `import verl` through VERL_USE_EXTERNAL_MODULES=verl_cpu.

A platform "cpu" (VERL_PLATFORM=cpu), FSDP2 on gloo, and "hf": rollouts by transformers' `generate` in a Ray actor, in
the place of vLLM. Written for verl 0.9.1; not a way to train.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed


def make_torchvision_importable() -> None:
    """The registry's torchvision is built for CUDA; beside a CPU torch its Python half needs two operators declared.

    transformers' Qwen processors and qwen-vl-utils use that half alone.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or torch.version.cuda is not None:
        return
    compiled = [path for path in Path(found.origin).parent.glob("_C*.so") if _loads(path)]
    if not compiled:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # it declares for as long as it lives


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


_KEPT: list[Any] = []
make_torchvision_importable()

import ray  # noqa: E402
import verl.workers.engine.fsdp.transformer_impl as fsdp  # noqa: E402
import verl.workers.rollout.base as rollouts  # noqa: E402
from verl.plugin.platform import PlatformBase, PlatformRegistry  # noqa: E402
from verl.workers.engine.base import EngineRegistry  # noqa: E402
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput  # noqa: E402


class CpuDevice(types.ModuleType):
    """What verl asks of torch.cuda, answered by torch.cpu or by nothing at all."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name.startswith(("memory_", "max_memory_")):
            return lambda *_, **__: 0
        return lambda *_, **__: {"get_device_name": "CPU", "mem_get_info": (1, 1)}.get(name)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuDevice("cpu_device")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"  # ray.init(num_gpus=1) pretends that there is one

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield


class Generator:
    """The rollout model, in an actor of its own; the trainer sends its weights after each step."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForImageTextToText
        from verl.utils import hf_processor, hf_tokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor, self.tokenizer = hf_processor(path), hf_tokenizer(path)
        self.step: int | None = None
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
        self, prompt_ids: Any, sampling_params: dict[str, Any], request_id: str, image_data: Any = None, **more: Any
    ) -> TokenOutput:
        async with self.turn:
            return self._generate(list(prompt_ids), sampling_params, image_data, more.get("max_tokens"))

    @torch.no_grad()
    def _generate(self, prompt: list[int], sampling: dict[str, Any], images: Any, most: int | None) -> TokenOutput:
        ids = torch.tensor([prompt])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            seen = self.processor.image_processor(images=list(images), return_tensors="pt")
            inputs |= {"pixel_values": seen["pixel_values"].float(), "image_grid_thw": seen["image_grid_thw"]}
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).long()
        heat = float(sampling.get("temperature", 1.0))
        made = self.model.generate(
            **inputs,
            max_new_tokens=int(sampling.get("max_tokens") or sampling.get("max_new_tokens") or most or 16),
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
        handle = actor.remote(str(self.model_config.path))
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
rollouts._ROLLOUT_REGISTRY[("hf", "async")] = "verl_cpu.Courier"
RolloutReplicaRegistry.register("hf", lambda: Replica)
