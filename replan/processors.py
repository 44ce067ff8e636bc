"""Attention processors that hand region masks to `attend`, and that keep and reuse keys and values between steps.

    with region_attention(transformer, "auto", device) as attention:
        transformer(..., joint_attention_kwargs=attention(mask))    # Flux; Qwen: attention_kwargs=attention(mask)

Both families order the joint sequence [text | image]. No mask is global, and the stock processors come back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from replan.attention import CascadeMask, FlexMask, Prepared, attend, check_executor, prepare
from replan.errors import BackboneError
from replan.mask import RegionMask


class Slot:
    """Keys and values [B, S, H, D] of some tokens in one layer, from an earlier step; empty at first."""

    __slots__ = ("key", "value")

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def keep(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key.clone(), value.clone()  # a view would hold all the other tokens in memory too


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one forward does with keys and values of the sequence [queried tokens | background | reference].

    mask         over rows = queried tokens, keys = all tokens; None = full attention
    background   (start, stop) of the queried tokens to be kept as background; None = keep none
    reference    the same for the reference
    reuse        what is taken from the slots: (background, reference)
    shared       the reference's keys are the same for the whole batch: one copy is kept
    rope         rotary frequencies of the queried (image, text) tokens, where the model's own order is not theirs
    """

    mask: Prepared | None
    background: tuple[int, int] | None = None
    reference: tuple[int, int] | None = None
    reuse: tuple[bool, bool] = (False, False)
    shared: bool = False
    rope: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Step:
        """Itself: it was made for its device, and offload hooks that move a call's arguments find it there already."""
        return self


Given = Prepared | Step


@dataclass(slots=True, eq=False)
class RegionProcessor:
    """What both families share: the stock model's own backend, and this layer's slots."""

    _attention_backend: Any = None
    _parallel_config: Any = None
    background: Slot = field(default_factory=Slot)
    reference: Slot = field(default_factory=Slot)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, given: Any) -> Tensor:
        """Attention [B, S, H, D], by a region mask or step; without one, by what the stock model was set to."""
        if isinstance(given, Step):
            key, value = self._join(key, value, given)
            given = given.mask
        if isinstance(given, FlexMask | CascadeMask) or (given is not None and given.shape[-2] > 1):
            return attend(query, key, value, given)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            query, key, value, attn_mask=given, backend=self._attention_backend, parallel_config=self._parallel_config
        )

    def _join(self, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Keep what later steps want, and append what earlier ones left."""
        keys, values = [key], [value]
        for reuse, slot in zip(step.reuse, (self.background, self.reference), strict=True):
            if not reuse:
                continue
            if slot.key is None or slot.value is None:
                raise BackboneError("a step reuses keys and values that no step has computed: take a full step first")
            keys.append(slot.key.expand(len(key), -1, -1, -1))
            values.append(slot.value.expand(len(key), -1, -1, -1))
        if step.background is not None:
            part = slice(*step.background)
            self.background.keep(key[:, part], value[:, part])
        if step.reference is not None:
            part, batch = slice(*step.reference), 1 if step.shared else len(key)
            self.reference.keep(key[:batch, part], value[:batch, part])
        return (torch.cat(keys, dim=1), torch.cat(values, dim=1)) if len(keys) > 1 else (key, value)


class FluxRegionProcessor(RegionProcessor):
    """`FluxAttnProcessor` that takes a prepared region mask; without a mask it does exactly what the stock one does."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Given | None = None,
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
        out = self.attend(query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text, image = out.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


class QwenRegionProcessor(RegionProcessor):
    """`QwenDoubleStreamAttnProcessor2_0` that takes a prepared region mask, which the stock one refuses.

    Without a mask it does exactly what the stock one does. The text's own padding mask joins a dense region mask; with
    another the padding must be hidden in the region mask itself (`TokenLayout.hint_pads`, `RegionMask.hide`).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Given | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

        if encoder_hidden_states is None:
            raise BackboneError("Qwen's joint attention needs the text stream: pass encoder_hidden_states")
        if isinstance(attention_mask, Step) and attention_mask.rope is not None:
            image_rotary_emb = attention_mask.rope
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
        out = self.attend(query, key, value, mask).flatten(2, 3).to(query.dtype)
        text, image = out[:, : text.shape[1]], out[:, text.shape[1] :]
        image = attn.to_out[0](image.contiguous())
        if len(attn.to_out) > 1:  # dropout
            image = attn.to_out[1](image)
        return image, attn.to_add_out(text.contiguous())


def _with_padding(given: Given | None, text_mask: Tensor | None, image: Tensor) -> Given | None:
    """Join a region mask with the text's padding mask [B, text], True = a real token."""
    if text_mask is None:
        return given
    if given is not None and not isinstance(given, Tensor):
        raise BackboneError(
            "encoder_hidden_states_mask joins a dense mask only: hide the padding in the region mask and pass None"
        )
    keys = torch.cat([text_mask.bool(), text_mask.new_ones(image.shape[:2], dtype=torch.bool)], dim=1)[:, None, None]
    return keys if given is None else given & keys


# Stock processor -> ours. Adding a family is one line; our own are here so that contexts nest.
_PROCESSORS: Mapping[str, type[FluxRegionProcessor] | type[QwenRegionProcessor]] = {
    "FluxAttnProcessor": FluxRegionProcessor,
    "FluxRegionProcessor": FluxRegionProcessor,
    "QwenDoubleStreamAttnProcessor2_0": QwenRegionProcessor,
    "QwenRegionProcessor": QwenRegionProcessor,
}


class Processors:
    """Our processors for every attention layer of a diffusers transformer, with their slots.

    `reference` lends the reference slots of another prompt's processors. Raises BackboneError for an attention
    processor that is not known.
    """

    def __init__(self, transformer: Any, reference: Processors | None = None) -> None:
        self._layers = [module for module in transformer.modules() if hasattr(module, "set_processor")]
        names = {id(value): name for name, value in transformer.attn_processors.items()}
        self._ours = [_replacement(names.get(id(m.processor), "attention"), m.processor) for m in self._layers]
        if reference is not None:
            for mine, lender in zip(self._ours, reference._ours, strict=True):
                mine.reference = lender.reference

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Ours in place of whatever is there, which comes back afterwards, also on an error."""
        previous = [layer.processor for layer in self._layers]
        try:
            self._set(self._ours)
            yield
        finally:
            self._set(previous)

    def _set(self, processors: Sequence[Any]) -> None:
        for layer, processor in zip(self._layers, processors, strict=True):
            layer.set_processor(processor)


@contextmanager
def region_attention(
    transformer: Any, executor: str = "auto", device: torch.device | str | None = None
) -> Iterator[Callable[[RegionMask | None], dict[str, Prepared]]]:
    """Let a diffusers transformer take region masks; its own processors come back afterwards, also on an error.

    Yields a function from a mask to the attention kwargs of a forward call ({} for None); each mask is prepared once.
    `device` is where the transformer computes, when that is not where its weights lie now (offload).

    Raises BackboneError for an attention processor that is not known, ConfigError for an unknown executor.
    """
    check_executor(executor)
    where = transformer.device if device is None else device
    prepared: dict[RegionMask, Prepared] = {}  # keyed by identity: masks do not compare equal

    def attention(mask: RegionMask | None) -> dict[str, Prepared]:
        if mask is None:
            return {}
        if mask not in prepared:
            prepared[mask] = prepare(mask, executor, where)
        return {"attention_mask": prepared[mask]}

    with Processors(transformer).installed():
        yield attention


def _replacement(name: str, processor: Any) -> FluxRegionProcessor | QwenRegionProcessor:
    ours = _PROCESSORS.get(type(processor).__name__)
    if ours is None:
        raise BackboneError(
            f"{name}: {type(processor).__name__} cannot take a region mask; unload the IP adapter or attention plug-in "
            "that set it, or edit without regions"
        )
    return ours(getattr(processor, "_attention_backend", None), getattr(processor, "_parallel_config", None))
