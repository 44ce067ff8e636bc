"""Region masks at work: three executors behind `attend`.

`dense` is SDPA with a bool matrix, the oracle, and runs anywhere. `cascade` needs no matrix: a few plain attention
calls, merged by log-sum-exp; it wants sorted tokens. `flex` is FlexAttention with a block mask whose lists come from
the few classes of equal tokens, so nothing of size S x S is ever made; on CUDA one compiled kernel serves every plan of
a sequence bucket. `auto` takes the cascade for long sequences, flex on CUDA where the mask is too intricate for it, and
dense for what is short.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from replan.cascade import CascadeMask, cascade, differentiable, plan_tiles, runs_on
from replan.errors import BackboneError, ConfigError
from replan.mask import RegionMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Executor = Literal["auto", "dense", "flex", "cascade"]
Engine = Literal["dense", "flex", "cascade"]

BLOCK = 128  # FlexAttention's own block
SEQUENCE_BUCKET = 256  # joint sequences grow to a multiple, so that one compiled kernel serves many plans
CASCADE_FROM = 768  # tokens; below, one call with a small dense mask is the fastest
FLEX_FROM = 2048  # tokens; below, a dense mask is a few MB and not worth compiling a kernel for
KERNELS = 256  # compiled kernels kept, one per bucket; beyond it torch would silently fall back to an S x S matrix


def bucket(length: int, step: int = 64) -> int:
    """`length` rounded up to a multiple of `step`: the tight size that a hint is padded to."""
    return -(-length // step) * step


@dataclass(frozen=True, slots=True, eq=False)
class FlexMask:
    """A block mask over bucketed sequences; `rows` queries and `length` keys are the true numbers."""

    rows: int
    length: int
    blocks: BlockMask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FlexMask:
        """Itself: it was built for its device, and offload hooks that move a call's arguments find it there already."""
        return self


Prepared = Tensor | FlexMask | CascadeMask


def check_executor(executor: str) -> None:
    """Raises ConfigError on an unknown name."""
    if executor not in get_args(Executor):
        raise ConfigError(f"attention executor {executor!r}: must be {', '.join(get_args(Executor))}")


def executor_of(mask: Prepared) -> Engine:
    """Which executor a prepared mask belongs to."""
    return "flex" if isinstance(mask, FlexMask) else "cascade" if isinstance(mask, CascadeMask) else "dense"


def bytes_of(mask: Prepared) -> int:
    """Bytes on the device that a prepared mask takes."""
    if isinstance(mask, CascadeMask):
        return 0
    if isinstance(mask, Tensor):
        return mask.nbytes
    blocks = mask.blocks
    lists = (blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices)
    # two int64 per token: what a token is and what it reads
    return 16 * blocks.seq_lengths[1] + sum(part.nbytes for part in lists if part is not None)


def prepare(mask: RegionMask, executor: str, device: torch.device | str, rows: int | None = None) -> Prepared:
    """The mask in its executor's form, on `device`; once per plan and phase. Dense is bool [1, 1, rows, S].

    With `rows`, only the first so many tokens are queries. Raises ConfigError on an unknown executor, and where
    `cascade` is asked for by name on a device without a kernel for it.
    """
    check_executor(executor)
    rows = mask.length if rows is None else rows
    if executor == "cascade":
        if not runs_on(device):
            raise ConfigError(f"attention = cascade: has no kernel for {device}; use auto, dense or flex")
        tiles = plan_tiles(mask, rows, limit=mask.length * mask.length)
        assert tiles is not None  # there is no mask of more rectangles than pairs
        return tiles
    if executor == "auto" and mask.length >= CASCADE_FROM and runs_on(device):
        tiles = plan_tiles(mask, rows)
        if tiles is not None:
            return tiles
    long = mask.length >= FLEX_FROM and torch.device(device).type == "cuda"
    if executor == "flex" or (executor == "auto" and long and importlib.util.find_spec("triton") is not None):
        grown = mask.pad(bucket(mask.length, SEQUENCE_BUCKET))
        return FlexMask(rows, mask.length, block_mask(grown, device, bucket(rows, SEQUENCE_BUCKET)))
    return mask.to(device).dense(rows)[None, None]


def block_mask(mask: RegionMask, device: torch.device | str, rows: int | None = None) -> BlockMask:
    """A BlockMask of a sequence whose length (like `rows`) is a multiple of BLOCK, in time linear in that length."""
    from torch.nn.attention.flex_attention import BlockMask

    reader_S, key_S, table = mask.classes()
    block_S = torch.arange(mask.length, device=reader_S.device) // BLOCK
    count = mask.length // BLOCK
    readers = torch.zeros(count, table.shape[0], device=reader_S.device)
    keys = torch.zeros(count, table.shape[1], device=reader_S.device)
    readers[block_S, reader_S] = 1.0
    keys[block_S, key_S] = 1.0
    rows = mask.length if rows is None else rows
    readers = readers[: rows // BLOCK]
    seen = readers @ table.float() @ keys.T > 0  # some query of the block row sees some key of the block column
    unseen = readers @ (~table).float() @ keys.T > 0
    member_S, reads_S = mask.member_S.to(device), mask.reads_S.to(device)

    # captured tensors, not Python values: a new plan is new data for the same compiled kernel
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (reads_S[query] & member_S[key]) != 0

    lists = (*_ordered(seen & unseen), *_ordered(seen & ~unseen))
    return BlockMask.from_kv_blocks(
        *(part.to(device) for part in lists), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(rows, mask.length)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [rows, columns] -> true per row [1, 1, rows]; column indices, true ones first [1, 1, rows, columns]."""
    indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], indices.to(torch.int32).contiguous()[None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: RegionMask | Prepared | None, executor: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what the mask shows; all tensors [B, S, H, D], also the result.

    A RegionMask is prepared for `executor` on the fly; a prepared one is used as it is. There may be fewer queries than
    keys: they are the first tokens. Tokens that nobody sees get a result that means nothing.
    Raises BackboneError when the mask is one of another sequence.
    """
    if isinstance(mask, RegionMask):
        mask = prepare(mask, executor, query.device, query.shape[1])
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    if (query.shape[2], key.shape[2]) != (mask.rows, mask.length):
        raise BackboneError(
            f"a mask of {mask.rows} x {mask.length} tokens met {query.shape[2]} x {key.shape[2]}: "
            "the layout does not fit the model"
        )
    if isinstance(mask, FlexMask):
        return _flex(query, key, value, mask).transpose(1, 2)
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if needed and not differentiable(query.device):
        seen = mask.dense(query.device)[None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)
    return cascade(query, key, value, mask).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: FlexMask) -> Tensor:
    """FlexAttention over [B, H, S, D], grown to the mask's buckets with keys that nobody sees, and cut back."""
    from torch.nn.attention.flex_attention import flex_attention

    rows, length = mask.blocks.seq_lengths
    query = F.pad(query, (0, 0, 0, rows - query.shape[2]))
    key, value = (F.pad(tensor, (0, 0, 0, length - tensor.shape[2])) for tensor in (key, value))
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        out = flex_attention(query, key, value, block_mask=mask.blocks)
    else:
        with torch._dynamo.config.patch(recompile_limit=KERNELS):
            out = _compiled()(query, key, value, block_mask=mask.blocks)
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out[:, :, : mask.rows]


@functools.cache
def _compiled() -> Callable[..., Any]:
    """FlexAttention as a compiled kernel; made on first use on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
