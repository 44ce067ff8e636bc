"""What the text encoders said, kept: the same words with the same settings (and pictures) are encoded once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
LIMIT = 256 * 2**20  # bytes; a prompt of Flux takes 4 MiB in bfloat16, one of Qwen with its picture about 20


class Memo:
    """Values by key, up to `limit` bytes of tensors; the longest unused ones go first. Safe for several threads.

    What is handed out is shared: nobody may write into it. Candidates of one plan, a second edit of the same picture
    and the negative prompt find their encodings here, and an offloaded text encoder stays where it is.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.size = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made now if it is not there. What `make` raises is raised and nothing is kept."""
        import torch

        key = (key, torch.is_inference_mode_enabled())  # inference tensors cannot serve a training run
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = make()
        self._keep(key, value, sum(tensor_bytes(value)))
        return value

    def _keep(self, key: Hashable, value: Any, size: int) -> None:
        with self._lock:
            if key in self._kept or size > self.limit:
                return
            self._kept[key] = (value, size)
            self.size += size
            while self.size > self.limit:
                _, (_, freed) = self._kept.popitem(last=False)
                self.size -= freed


def tensor_bytes(value: Any) -> Iterable[int]:
    """Bytes of every tensor in nested tuples, lists, mappings and model outputs."""
    if hasattr(value, "element_size"):
        yield value.numel() * value.element_size()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensor_bytes(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensor_bytes(part)


def fingerprint(pictures: Image | Iterable[Image]) -> str:
    """A hash of pictures' sizes and pixels."""
    found = hashlib.sha256()
    for picture in pictures if isinstance(pictures, Iterable) else (pictures,):
        found.update(f"{picture.mode}{picture.size}".encode())
        found.update(picture.tobytes())
    return found.hexdigest()
