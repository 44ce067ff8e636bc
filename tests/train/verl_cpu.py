"""verl on a machine without a GPU, for tests, first half: torchvision, and a platform "cpu" (VERL_PLATFORM=cpu).

`import verl` loads it through VERL_USE_EXTERNAL_MODULES=verl_cpu,verl_cpu_rollout. Written for verl 0.9.1.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


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

from verl.plugin.platform import PlatformBase, PlatformRegistry  # noqa: E402


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
