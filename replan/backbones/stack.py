"""Several requests in one forward: their conditionings become one, where sequences and masks are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from replan.backbones.base import Conditioning

if TYPE_CHECKING:
    from torch import Tensor

    from replan.mask import RegionMask


def stack(conds: Sequence[Conditioning]) -> Conditioning | None:
    """One conditioning whose rows are those of `conds`; None when they do not fit one forward.

    They fit when their sequences, masks, noise levels and guidance agree: seeds of one plan, and, without regions,
    any pictures of one size. Each must be for one picture (one seed). What is equal in all of them stays as it is:
    backbones expand it over the batch.
    """
    first = conds[0]
    if len(conds) == 1:
        return first
    others = conds[1:]
    if any(len(cond.seeds) != 1 for cond in conds) or any(_shape(cond) != _shape(first) for cond in others):
        return None
    if not all(torch.equal(cond.sigmas, first.sigmas) and _same_masks(cond, first) for cond in others):
        return None
    tensors = {name: _rows([cond.tensors[name] for cond in conds]) for name in first.tensors}
    negatives = [cond.negative for cond in conds if cond.negative is not None]
    negative = stack(negatives) if negatives else None
    if any(tensor is None for tensor in tensors.values()) or (negatives and negative is None):
        return None
    return replace(
        first,
        tensors={name: tensor for name, tensor in tensors.items() if tensor is not None},
        negative=negative,
        seeds=tuple(cond.seeds[0] for cond in conds),
    )


def _shape(cond: Conditioning) -> tuple[object, ...]:
    """What must agree before anything is compared in full."""
    layout = cond.layout
    tensors = {name: tuple(tensor.shape) for name, tensor in cond.tensors.items()}
    spans = (layout.vision, layout.main, layout.hints, layout.noise, layout.refs)
    return spans, tensors, cond.scale, cond.negative is None


def _rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """One tensor for all rows: itself where they are equal, else [B, ...]; None for unequal ones without rows."""
    first = tensors[0]
    if all(tensor is first or torch.equal(tensor, first) for tensor in tensors[1:]):
        return first
    return torch.cat(list(tensors)) if first.ndim > 1 and first.shape[0] == 1 else None


def _same_masks(one: Conditioning, other: Conditioning) -> bool:
    """Whether the same masks rule at the same noise levels."""
    return len(one.masks) == len(other.masks) and all(
        above == until and _same(mask, against)
        for (above, mask), (until, against) in zip(one.masks, other.masks, strict=True)
    )


def _same(mask: RegionMask | None, other: RegionMask | None) -> bool:
    if mask is None or other is None:
        return mask is other
    return torch.equal(mask.member_S, other.member_S) and torch.equal(mask.reads_S, other.reads_S)
