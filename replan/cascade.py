"""Region masks without a mask: attention over a few rectangles of tokens, merged by log-sum-exp.

A mask over sorted tokens is a small table of runs x runs. It is cut into rectangles (a run of queries times a run of
keys) that cover each visible pair exactly once; every rectangle is one plain attention call, and the partial results of
a query are merged by the log of their softmax sums, which is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from replan.mask import RegionMask

TILES = 96  # rectangles, beyond which the bookkeeping outweighs the gain


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries rows[0]..rows[1] see keys keys[0]..keys[1]. `pieces`: (start, stop, merge) parts of the rows; with
    merge = False they have no earlier partial result."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    pieces: tuple[tuple[int, int, bool], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class CascadeMask:
    """The rectangles of a mask over `length` keys, for its first `rows` tokens as queries.

    Tokens that nobody sees may be in no rectangle; their result is zero. `table` holds the rectangles once more, as
    (row, end row, key, end key) in int64 on the CPU, filled up with zeros to a multiple of TILES: what is a tensor is
    data to compiled code, and what is a number is compiled into it.
    """

    rows: int
    length: int
    tiles: tuple[Tile, ...]
    table: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CascadeMask:
        """Itself: plain numbers, as good on any device; offload hooks ask for this."""
        return self

    def dense(self, device: torch.device | str) -> Tensor:
        """The same as a bool matrix [rows, length]; what nobody sees reads all, so that no row is empty."""
        seen = torch.zeros(self.rows, self.length, dtype=torch.bool, device=device)
        for tile in self.tiles:
            seen[slice(*tile.rows), slice(*tile.keys)] = True
        return seen | ~seen.any(dim=1, keepdim=True)


def plan_tiles(mask: RegionMask, rows: int, limit: int = TILES) -> CascadeMask | None:
    """Cut the first `rows` rows of a mask into rectangles; None when that takes more than `limit` of them."""
    starts, table, seen = _runs(mask, rows)
    queries = len([start for start in starts if start < rows])
    if queries > limit:
        return None
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], mask.length], strict=True)]
    todo = [table[query] if seen[query] else None for query in range(queries)]  # None: free, nobody sees this token
    runs = _Runs(lengths)
    found: list[tuple[int, int, int, int]] = []
    while any(todo):
        if len(found) == limit:
            return None
        first, last, left, right = _best(todo, runs)
        found.append((first, last, left, right))
        covered = (1 << right) - (1 << left)
        todo = [row & ~covered if row is not None and first <= query < last else row for query, row in enumerate(todo)]
    edges = [*starts, mask.length]
    tiles = [
        Tile((edges[first], min(edges[last], rows)), (edges[left], edges[right])) for first, last, left, right in found
    ]
    return CascadeMask(rows, mask.length, tuple(_pieces(tiles)), _table(tiles))


def _table(tiles: Sequence[Tile]) -> Tensor:
    table = torch.zeros(max(-(-len(tiles) // TILES), 1) * TILES, 4, dtype=torch.int64)
    table[: len(tiles)] = torch.tensor([(*tile.rows, *tile.keys) for tile in tiles], dtype=torch.int64).view(-1, 4)
    return table


@functools.lru_cache(maxsize=256)
def _tiles(table: bytes) -> tuple[Tile, ...]:
    """The rectangles of a table's bytes."""
    numbers = memoryview(table).cast("q")
    quads = (numbers[place : place + 4].tolist() for place in range(0, len(numbers), 4))
    return tuple(_pieces([Tile((top, end), (left, right)) for top, end, left, right in quads if end]))


def _runs(mask: RegionMask, rows: int) -> tuple[list[int], list[int], list[bool]]:
    """Where runs of equal tokens start, one bit field of seen runs per run, and whether anyone sees the run."""
    member_S, reads_S = mask.member_S.cpu(), mask.reads_S.cpu()
    change = (member_S[1:] != member_S[:-1]) | (reads_S[1:] != reads_S[:-1])
    cuts = {0, *(int(place) + 1 for place in change.nonzero()[:, 0])}
    starts: list[int] = sorted(cuts | {rows} if rows < mask.length else cuts)
    members, reads = member_S[starts].tolist(), reads_S[starts].tolist()
    table = [sum(1 << key for key, member in enumerate(members) if read & member) for read in reads]
    return starts, table, [member != 0 for member in members]


class _Runs:
    """Runs of tokens by their lengths; bit fields stand for sets of them. The same few sets come again and again."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.total = functools.cache(self._total)
        self.widest = functools.cache(self._widest)

    def _total(self, row: int) -> int:
        """Tokens in a set."""
        return sum(self.lengths[key] for key in range(row.bit_length()) if row >> key & 1)

    def _widest(self, row: int) -> tuple[int, int, int]:
        """(first run, end run, tokens) of the longest unbroken stretch of a set."""
        return max(self._stretches(row), key=lambda stretch: stretch[2])

    def _stretches(self, row: int) -> Iterator[tuple[int, int, int]]:
        key = 0
        while row >> key:
            if row >> key & 1:
                start, width = key, 0
                while row >> key & 1:
                    width += self.lengths[key]
                    key += 1
                yield start, key, width
            else:
                key += 1


def _best(todo: Sequence[int | None], runs: _Runs) -> tuple[int, int, int, int]:
    """The rectangle (first row, end row, first key, end key) of unfinished pairs that finishes most rows.

    A row counts with the square of the share of its own unfinished keys, so that rows get done in one piece.
    """
    weights = [length / runs.total(row) ** 2 if row else 0.0 for row, length in zip(todo, runs.lengths, strict=False)]
    best, found = 0.0, (0, 0, 0, 0)
    for first, start in enumerate(todo):
        if not start:
            continue
        common, weight = start, 0.0
        left, right, width = runs.widest(common)
        for last in range(first, len(todo)):
            row = todo[last]
            if row is None:
                continue
            if common & row != common:
                common &= row
                if not common:
                    break
                left, right, width = runs.widest(common)
            weight += weights[last]
            if weight * width * width > best:
                best, found = weight * width * width, (first, last + 1, left, right)
    return found


def _pieces(tiles: Sequence[Tile]) -> Iterator[Tile]:
    """Tiles with their rows split by whether an earlier tile has touched them."""
    for number, tile in enumerate(tiles):
        before = sorted(other.rows for other in tiles[:number])
        cuts = sorted({*tile.rows, *(edge for rows in before for edge in rows if tile.rows[0] < edge < tile.rows[1])})
        parts: list[tuple[int, int, bool]] = []
        for start, stop in pairwise(cuts):
            merge = any(low <= start and stop <= high for low, high in before)
            if parts and parts[-1][2] == merge:
                parts[-1] = (parts[-1][0], stop, merge)
            else:
                parts.append((start, stop, merge))
        yield replace(tile, pieces=tuple(parts))


def cascade(query: Tensor, key: Tensor, value: Tensor, plan: CascadeMask) -> Tensor:
    """Attention over [B, H, S, D]; the result [B, H, rows, D]. Differentiable where `differentiable` says so."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Cascade.apply(query, key, value, plan)  # type: ignore[return-value]
    if torch.compiler.is_compiling():
        return _opaque(query, key, value, plan.table).transpose(1, 2)
    return _forward(query, key, value, plan.tiles)[0]


@torch.library.custom_op("replan::cascade", mutates_args=())
def _opaque(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """Attention over [B, H, S, D] as [B, rows, H, D], for compiled code: one graph serves all plans."""
    out = _forward(query, key, value, _tiles(table.numpy().tobytes()))[0]
    return out.transpose(1, 2).contiguous()


@_opaque.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    batch, heads, rows, width = query.shape
    return query.new_empty(batch, rows, heads, width)


def differentiable(device: torch.device) -> bool:
    """Whether the kernel for this device has a backward pass that takes the merged sums."""
    return device.type == "cpu"


def runs_on(device: torch.device | str) -> bool:
    """Whether there is a kernel for this device that also returns its log-sum-exp."""
    return torch.device(device).type in ("cpu", "cuda")


def _forward(query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor]:
    """Result [B, H, rows, D] and its log-sum-exp [B, H, rows], float32."""
    batch, heads, rows, width = query.shape
    only = tiles[0]
    if len(tiles) == 1 and only.rows == (0, rows):
        return _call(query, key[:, :, slice(*only.keys)], value[:, :, slice(*only.keys)])
    # [B, S, H, D] in memory: the layout of the kernels' own results, and of the model's next layer
    out = query.new_zeros(batch, rows, heads, width).transpose(1, 2)
    lse = query.new_zeros(batch, rows, heads, dtype=torch.float32).transpose(1, 2)
    for tile in tiles:
        (top, end), keys = tile.rows, slice(*tile.keys)
        part, part_lse = _call(query[:, :, top:end], key[:, :, keys], value[:, :, keys])
        for start, stop, merge in tile.pieces:
            new, new_lse = part[:, :, start - top : stop - top], part_lse[:, :, start - top : stop - top]
            old, old_lse = out[:, :, start:stop], lse[:, :, start:stop]
            if merge:
                old.lerp_(new, torch.sigmoid(new_lse - old_lse)[..., None].to(new.dtype))
                old_lse.copy_(torch.logaddexp(old_lse, new_lse))
            else:
                old.copy_(new)
                old_lse.copy_(new_lse)
    return out, lse


def _call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Plain attention and its log-sum-exp [B, H, S] in float32, by the fastest kernel that returns it."""
    aten: Any = torch.ops.aten
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    if query.dtype not in (torch.float16, torch.bfloat16):
        out, lse = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    elif _cudnn(query.device):
        out, lse = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    return out, lse.reshape(*lse.shape[:3])[:, :, : query.shape[2]]


def _cudnn(device: torch.device) -> bool:
    """cuDNN's attention is the fastest from Hopper on and slower than flash before."""
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(device)[0] >= 9


class _Cascade(torch.autograd.Function):
    """The backward pass of a rectangle needs only the merged result and the merged log-sum-exp, not its own."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: CascadeMask) -> Tensor:
        out, lse = _forward(query, key, value, plan.tiles)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        query, key, value, out, lse = ctx.saved_tensors
        grads = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        step: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for tile in ctx.plan.tiles:
            rows, keys = slice(*tile.rows), slice(*tile.keys)
            parts = step(
                grad[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys], out[:, :, rows],
                lse[:, :, rows], 0.0, False,
            )  # fmt: skip
            for total, part, place in zip(grads, parts, (rows, keys, keys), strict=True):
                total[:, :, place] += part
        return (*grads, None)
