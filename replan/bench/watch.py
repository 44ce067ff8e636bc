"""What a run really did: which attention kernels, how often, with or without a mask, and how much memory at most."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMES = re.compile(r"flash|cudnn|efficient|flex|math|fmha|sdpa|overrideable", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Seen:
    """One observed run. `kernels` counts attention calls by name; `peak` is in bytes above what was there before."""

    output: Tensor
    kernels: Counter[str]
    peak: int | None


def observe(run: Callable[[], Tensor], device: torch.device, *, operators: bool = True) -> Seen:
    """Run once and look: by the operators on a CPU (if they can be watched), by profiler and allocator on CUDA."""
    if device.type != "cuda":
        if not operators:
            return _allocated(run)
        watch = _Watch()
        with watch:
            output = run()
        return Seen(output, watch.kernels, watch.peak)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        output = run()
        torch.cuda.synchronize(device)
    return Seen(output, _profiled(profile), peak)


def _allocated(run: Callable[[], Tensor]) -> Seen:
    """The peak alone, by the allocator's own record: what is compiled or of higher order hides from operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = run()
    kineto: Any = profile.profiler
    moves = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    live = accumulate(event.nbytes() for event in sorted(moves, key=lambda event: event.start_ns()))
    return Seen(output, Counter(), max(live, default=0))


def _profiled(profile: Any) -> Counter[str]:
    """Attention calls out of a profile: torch's own operators, and compiled FlexAttention by its kernels."""
    found: Counter[str] = Counter()
    for event in profile.events():
        name = str(event.name)
        if name.startswith("aten::_") and "attention" in name and _NAMES.search(name):
            found[name.removeprefix("aten::_scaled_dot_product_")] += 1
        elif "flex_attention" in name and "triton" in name:
            found["flex_attention"] += 1
    return found


class _Watch(TorchDispatchMode):
    """Counts attention operators, and the bytes of storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if "scaled_dot_product" in name or "flex_attention" in name:
            short = name.removeprefix("aten._scaled_dot_product_").removeprefix("aten.").removesuffix(".default")
            masked = any(isinstance(kwargs.get(key), Tensor) for key in ("attn_mask", "attn_bias"))
            masked = masked or ("math" in short and len(args) > 3 and isinstance(args[3], Tensor))
            self.kernels[f"{short} + mask" if masked else short] += 1
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, given)
        return out

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        """Count a storage that this operator made; views and in-place results are their arguments' storages."""
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)

        def free() -> None:
            self._live -= size
            self._known.discard(key)

        weakref.finalize(storage, free)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
