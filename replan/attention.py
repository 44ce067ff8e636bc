"""Region masks at work: executors behind `attend`, and attention processors that hand a mask to it.

Executors: `dense` is SDPA with a bool matrix, the oracle, and runs anywhere. `flex` is FlexAttention with a block mask
whose lists come from the few classes of equal tokens, so nothing of size S x S is ever made; on CUDA one compiled
kernel serves every plan of a sequence bucket. `auto` takes flex on CUDA for long sequences, else dense.

    with region_attention(transformer, "auto", device) as attention:
        transformer(..., joint_attention_kwargs=attention(mask))    # Flux; Qwen: attention_kwargs=attention(mask)

Both families order the joint sequence [text | image]. No mask is global, and the stock processors come back afterwards.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from replan.errors import BackboneError, ConfigError
from replan.mask import RegionMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Executor = Literal["auto", "dense", "flex"]

BLOCK = 128  # FlexAttention's own block
SEQUENCE_BUCKET = 256  # joint sequences grow to a multiple, so that one compiled kernel serves many plans
FLEX_FROM = 2048  # tokens; below, a dense mask is a few MB and not worth compiling a kernel for
KERNELS = 256  # compiled kernels kept, one per bucket; beyond it torch would silently fall back to an S x S matrix


def bucket(length: int, step: int = 64) -> int:
    """`length` rounded up to a multiple of `step`: the tight size that a hint is padded to."""
    return -(-length // step) * step


@dataclass(frozen=True, slots=True, eq=False)
class FlexMask:
    """A block mask over the bucketed sequence; `length` is the true one."""

    length: int
    blocks: BlockMask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FlexMask:
        """Itself: it was built for its device, and offload hooks that move a call's arguments find it there already."""
        return self


Prepared = Tensor | FlexMask


def executor_for(executor: str, device: torch.device | str, length: int) -> Literal["dense", "flex"]:
    """What `executor` means for a sequence of `length` tokens on `device`. Raises ConfigError on an unknown name."""
    if executor in ("dense", "flex"):
        return executor
    if executor != "auto":
        raise ConfigError(f"attention executor {executor!r}: must be auto, dense or flex")
    long = length >= FLEX_FROM and torch.device(device).type == "cuda"
    return "flex" if long and importlib.util.find_spec("triton") is not None else "dense"


def prepare(mask: RegionMask, executor: str, device: torch.device | str) -> Prepared:
    """The mask in its executor's form, on `device`: bool [1, 1, S, S] or a FlexMask. Once per plan and phase."""
    if executor_for(executor, device, mask.length) == "dense":
        return mask.to(device).dense()[None, None]
    return FlexMask(mask.length, block_mask(mask.pad(bucket(mask.length, SEQUENCE_BUCKET)), device))


def block_mask(mask: RegionMask, device: torch.device | str) -> BlockMask:
    """A BlockMask of a sequence whose length is a multiple of BLOCK, in time linear in that length."""
    from torch.nn.attention.flex_attention import BlockMask

    reader_S, key_S, table = mask.classes()
    block_S = torch.arange(mask.length, device=reader_S.device) // BLOCK
    count = mask.length // BLOCK
    readers = torch.zeros(count, table.shape[0], device=reader_S.device)
    keys = torch.zeros(count, table.shape[1], device=reader_S.device)
    readers[block_S, reader_S] = 1.0
    keys[block_S, key_S] = 1.0
    seen = readers @ table.float() @ keys.T > 0  # some query of the block row sees some key of the block column
    unseen = readers @ (~table).float() @ keys.T > 0
    member_S, reads_S = mask.member_S.to(device), mask.reads_S.to(device)

    # captured tensors, not Python values: a new plan is new data for the same compiled kernel
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (reads_S[query] & member_S[key]) != 0

    lists = (*_ordered(seen & unseen), *_ordered(seen & ~unseen))
    return BlockMask.from_kv_blocks(
        *(part.to(device) for part in lists), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(mask.length, mask.length)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [rows, columns] -> true per row [1, 1, rows]; column indices, true ones first [1, 1, rows, columns]."""
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], indices.to(torch.int32).contiguous()[None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: RegionMask | Prepared | None, executor: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what the mask shows; all tensors [B, S, H, D], also the result.

    A RegionMask is prepared for `executor` on the fly; a prepared one is used as it is.
    """
    if isinstance(mask, RegionMask):
        mask = prepare(mask, executor, query.device)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if isinstance(mask, FlexMask):
        return _flex(query, key, value, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: FlexMask) -> Tensor:
    """FlexAttention over [B, H, S, D], grown to the mask's bucket with keys that nobody sees, and cut back."""
    from torch.nn.attention.flex_attention import flex_attention

    length = query.shape[2]
    if length != mask.length:
        raise BackboneError(
            f"a mask of {mask.length} tokens met a sequence of {length}: the layout does not fit the model"
        )
    grow = (0, 0, 0, mask.blocks.seq_lengths[0] - length)
    query, key, value = (F.pad(tensor, grow) for tensor in (query, key, value))
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        out = flex_attention(query, key, value, block_mask=mask.blocks)
    else:
        with torch._dynamo.config.patch(recompile_limit=KERNELS):
            out = _compiled()(query, key, value, block_mask=mask.blocks)
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out[:, :, :length]


@functools.cache
def _compiled() -> Callable[..., Any]:
    """FlexAttention as a compiled kernel; made on first use on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class FluxRegionProcessor:
    """`FluxAttnProcessor` that takes a prepared region mask; without a mask it does exactly what the stock one does."""

    def __init__(self, backend: Any = None, parallel_config: Any = None) -> None:
        self._attention_backend = backend
        self._parallel_config = parallel_config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Prepared | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb
        from diffusers.models.transformers.transformer_flux import _get_qkv_projections

        projected: Any = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (tensor.unflatten(-1, (-1, attn.head_dim)) for tensor in projected[:3])
        query, key = attn.norm_q(query), attn.norm_k(key)
        if attn.added_kv_proj_dim is not None:
            text_query, text_key, text_value = (tensor.unflatten(-1, (-1, attn.head_dim)) for tensor in projected[3:])
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            rotate: Callable[..., Any] = apply_rotary_emb
            query, key = (rotate(tensor, image_rotary_emb, sequence_dim=1) for tensor in (query, key))
        out = _dispatch(self, query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text, image = out.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


class QwenRegionProcessor:
    """`QwenDoubleStreamAttnProcessor2_0` that takes a prepared region mask, which the stock one refuses.

    Without a mask it does exactly what the stock one does. The text's own padding mask joins a dense region mask; with
    a flex mask the padding must be hidden in the region mask itself (`TokenLayout.hint_pads`, `RegionMask.hide`).
    """

    def __init__(self, backend: Any = None, parallel_config: Any = None) -> None:
        self._attention_backend = backend
        self._parallel_config = parallel_config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Prepared | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

        if encoder_hidden_states is None:
            raise BackboneError("Qwen's joint attention needs the text stream: pass encoder_hidden_states")
        mask = _with_padding(attention_mask, encoder_hidden_states_mask, hidden_states)
        head_dim = attn.inner_dim // attn.heads

        rotate: Callable[..., Any] = apply_rotary_emb_qwen

        def normed(projection: Any, norm: Any, states: Tensor, frequencies: Tensor | None) -> Tensor:
            heads = projection(states).unflatten(-1, (-1, head_dim))
            heads = heads if norm is None else norm(heads)
            return heads if frequencies is None else rotate(heads, frequencies, use_real=False)

        image_rope, text_rope = (None, None) if image_rotary_emb is None else image_rotary_emb
        text, image = encoder_hidden_states, hidden_states
        query = torch.cat(
            [
                normed(attn.add_q_proj, attn.norm_added_q, text, text_rope),
                normed(attn.to_q, attn.norm_q, image, image_rope),
            ],
            dim=1,
        )
        key = torch.cat(
            [
                normed(attn.add_k_proj, attn.norm_added_k, text, text_rope),
                normed(attn.to_k, attn.norm_k, image, image_rope),
            ],
            dim=1,
        )
        value = torch.cat([normed(attn.add_v_proj, None, text, None), normed(attn.to_v, None, image, None)], dim=1)
        out = _dispatch(self, query, key, value, mask).flatten(2, 3).to(query.dtype)
        text, image = out[:, : text.shape[1]], out[:, text.shape[1] :]
        image = attn.to_out[0](image.contiguous())
        if len(attn.to_out) > 1:  # dropout
            image = attn.to_out[1](image)
        return image, attn.to_add_out(text.contiguous())


def _with_padding(mask: Prepared | None, text_mask: Tensor | None, image: Tensor) -> Prepared | None:
    """Join a region mask with the text's padding mask [B, text], True = a real token."""
    if text_mask is None:
        return mask
    if isinstance(mask, FlexMask):
        raise BackboneError(
            "encoder_hidden_states_mask cannot join a flex mask: hide the padding in the region mask and pass None"
        )
    keys = torch.cat([text_mask.bool(), text_mask.new_ones(image.shape[:2], dtype=torch.bool)], dim=1)[:, None, None]
    return keys if mask is None else mask & keys


def _dispatch(
    processor: FluxRegionProcessor | QwenRegionProcessor, query: Tensor, key: Tensor, value: Tensor, mask: Any
) -> Tensor:
    """A region mask goes to `attend`; anything else to whatever backend the stock model was set to."""
    if isinstance(mask, FlexMask) or (mask is not None and mask.shape[-2] > 1):
        return attend(query, key, value, mask)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )


# Stock processor -> ours. Adding a family is one line; our own are here so that contexts nest.
_PROCESSORS: Mapping[str, type[FluxRegionProcessor] | type[QwenRegionProcessor]] = {
    "FluxAttnProcessor": FluxRegionProcessor,
    "FluxRegionProcessor": FluxRegionProcessor,
    "QwenDoubleStreamAttnProcessor2_0": QwenRegionProcessor,
    "QwenRegionProcessor": QwenRegionProcessor,
}


@contextmanager
def region_attention(
    transformer: Any, executor: str = "auto", device: torch.device | str | None = None
) -> Iterator[Callable[[RegionMask | None], dict[str, Prepared]]]:
    """Let a diffusers transformer take region masks; its own processors come back afterwards, also on an error.

    Yields a function from a mask to the attention kwargs of a forward call ({} for None); each mask is prepared once.
    `device` is where the transformer computes, when that is not where its weights lie now (offload).

    Raises BackboneError for an attention processor that is not known, ConfigError for an unknown executor.
    """
    executor_for(executor, "cpu", 0)
    previous = dict(transformer.attn_processors)
    replacements = {name: _replacement(name, processor) for name, processor in previous.items()}
    where = transformer.device if device is None else device
    prepared: dict[RegionMask, Prepared] = {}  # keyed by identity: masks do not compare equal

    def attention(mask: RegionMask | None) -> dict[str, Prepared]:
        if mask is None:
            return {}
        if mask not in prepared:
            prepared[mask] = prepare(mask, executor, where)
        return {"attention_mask": prepared[mask]}

    try:
        transformer.set_attn_processor(replacements)
        yield attention
    finally:
        transformer.set_attn_processor(previous)


def _replacement(name: str, processor: Any) -> FluxRegionProcessor | QwenRegionProcessor:
    ours = _PROCESSORS.get(type(processor).__name__)
    if ours is None:
        raise BackboneError(
            f"{name}: {type(processor).__name__} cannot take a region mask; unload the IP adapter or attention plug-in "
            "that set it, or edit without regions"
        )
    return ours(getattr(processor, "_attention_backend", None), getattr(processor, "_parallel_config", None))
