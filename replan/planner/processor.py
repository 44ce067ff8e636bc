"""Processors of local planners, also without torchvision, which Qwen's stock ones need for the videos we never send."""

from __future__ import annotations

from functools import cache
from typing import Any


def load_processor(name: str, model_type: str) -> Any:
    """The processor of a hub id or folder: the stock one, or its image half where torchvision is missing."""
    from transformers import AutoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor.from_pretrained(name)
    stock = _stock_class(model_type)
    return AutoProcessor.from_pretrained(name) if stock is None else image_only(stock).from_pretrained(name)


def _stock_class(model_type: str) -> type[Any] | None:
    """The processor class of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and their successors; None for other families."""
    from transformers.models.auto.processing_auto import (
        PROCESSOR_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
        processor_class_from_name,
    )

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name not in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"):
        return None
    return processor_class_from_name(name)


@cache
def image_only(stock: type[Any]) -> type[Any]:
    """A subclass of a Qwen processor that takes no video processor.

    ProcessorMixin reads the parts that it loads off the signature of __init__, so leaving one out there is enough.
    """
    from transformers.processing_utils import ProcessorMixin

    def __init__(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any):
        for part in ("image", "video"):
            setattr(self, f"{part}_token", f"<|{part}_pad|>")
            setattr(self, f"{part}_token_id", tokenizer.convert_tokens_to_ids(f"<|{part}_pad|>"))
        for end in ("start", "end"):
            setattr(self, f"vision_{end}_token", f"<|vision_{end}|>")
            setattr(self, f"vision_{end}_token_id", tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return type(f"ImageOnly{stock.__name__}", (stock,), {"__init__": __init__})
