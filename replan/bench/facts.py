"""What the figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from typing import Any

import torch

from replan import __version__

_PACKAGES = ("torch", "diffusers", "transformers", "triton")


def facts(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and time, all JSON."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "device": device.type,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "replan": __version__,
        **{name: version for name in _PACKAGES if (version := _version(name))},
    }
    if device.type == "cuda":
        capability = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": capability.name,
            "gpu_memory_gb": round(capability.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
