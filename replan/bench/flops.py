"""How much arithmetic a step takes. One multiply-add counts as two operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from replan.attention import FlexMask, Prepared
from replan.bench.sizes import Shape
from replan.cascade import CascadeMask
from replan.speed import Kind

if TYPE_CHECKING:
    from replan.backbones.base import Conditioning
    from replan.backbones.stepper import Stepper
    from replan.bench.model import Bench


def step_flops(shape: Shape, queries: int, pairs: int) -> float:
    """L * 24 * D^2 * queries + L * 4 * pairs * D.

    12 D^2 weights per token and block hold for Flux's double (4 + 8) and single (3 + 4 + 5) blocks and for Qwen's.
    Embedders and modulation are left out: under 0.5 % at full size. `pairs` are the (query, key) pairs computed.
    """
    return shape.layers * (24.0 * shape.width**2 * queries + 4.0 * pairs * shape.width)


def computed_pairs(prepared: Prepared | None, queries: int, keys: int) -> int:
    """(query, key) pairs that attention really computes: all of them for dense masks and for none."""
    if isinstance(prepared, CascadeMask):
        return sum((t.rows[1] - t.rows[0]) * (t.keys[1] - t.keys[0]) for t in prepared.tiles)
    if isinstance(prepared, FlexMask):
        blocks: Any = prepared.blocks
        visited = int(blocks.kv_num_blocks.sum())
        if blocks.full_kv_num_blocks is not None:
            visited += int(blocks.full_kv_num_blocks.sum())
        return visited * blocks.BLOCK_SIZE[0] * blocks.BLOCK_SIZE[1]
    return queries * keys


def kind_flops(bench: Bench, stepper: Stepper, cond: Conditioning, kind: Kind) -> float:
    """Arithmetic of one step of this kind, by the mask that it had."""
    length, text, noise = cond.layout.length, cond.layout.text_length, bench.shape.tokens**2
    queries = {"full": length, "cached": text + noise, "region": text + (stepper.active or 0)}[kind]
    prepared = next((found for (_, own), found in stepper._positive.prepared.items() if own == kind), None)
    return step_flops(bench.shape, queries, computed_pairs(prepared, queries, length))
