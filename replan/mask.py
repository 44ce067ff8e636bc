"""From a token layout, boxes and rules to a region mask. Pure torch; three small steps:

    layout, boxes   -> member_S   which roles each token plays (an overlap plays several), as bits
    rules           -> one row of bits per role
    member_S, rows  -> reads_S    the union of the rows of a token's roles

A token q sees a token k iff reads[q] & member[k] != 0. Box geometry is exact integer arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replan.rules import (
    MAX_REGIONS,
    MaskConfig,
    Role,
    RoleKind,
    RulePhase,
    Rules,
    builtin_rules,
    isolate_reference,
    load_rules,
    roles,
    schedule,
)
from replan.types import Box, Grid, Size

__all__ = [
    "MAX_REGIONS",
    "MaskConfig",
    "RegionMask",
    "Role",
    "RoleKind",
    "RulePhase",
    "TokenLayout",
    "TokenOrder",
    "build_mask",
    "load_rules",
    "mask_at",
    "phases",
    "sort_tokens",
    "without_regions",
]

GRAIN = 16  # regions of long sequences grow to a multiple of so many tokens: few shapes, and an even split
_PLAIN = MaskConfig(expand=0.0, isolate=0.0)


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Lengths of the joint sequence [vision | main | hint 1..n | noise | ref 1..m], in tokens; grids are row-major.

    `hint_pads` says how many trailing tokens of each hint are padding (seen by nobody); () = none. Boxes apply to the
    noise and to the reference `edited_ref`; other references are background.
    """

    vision: int
    main: int
    hints: tuple[int, ...]
    noise: Grid
    refs: tuple[Grid, ...]
    hint_pads: tuple[int, ...] = ()
    edited_ref: int = 0

    def __post_init__(self) -> None:
        grids = (self.noise, *self.refs)
        if min((self.vision, self.main, *self.hints, *(side for grid in grids for side in grid)), default=0) < 0:
            raise ValueError(f"{self}: lengths must be 0 or more")
        if self.hint_pads and (
            len(self.hint_pads) != len(self.hints)
            or any(not 0 <= pad <= hint for pad, hint in zip(self.hint_pads, self.hints, strict=True))
        ):
            raise ValueError(f"{self}: hint_pads must give, for each hint, how many of its tokens are padding")

    @property
    def text_length(self) -> int:
        return self.vision + self.main + sum(self.hints)

    @property
    def length(self) -> int:
        """Tokens in the whole sequence."""
        return self.text_length + sum(grid.columns * grid.rows for grid in (self.noise, *self.refs))

    @property
    def vision_slice(self) -> slice:
        return slice(0, self.vision)

    @property
    def main_slice(self) -> slice:
        return slice(self.vision, self.vision + self.main)

    @property
    def hint_slices(self) -> tuple[slice, ...]:
        return _slices(self.vision + self.main, self.hints)

    @property
    def noise_slice(self) -> slice:
        return slice(self.text_length, self.text_length + self.noise.columns * self.noise.rows)

    @property
    def ref_slices(self) -> tuple[slice, ...]:
        return _slices(self.noise_slice.stop, tuple(grid.columns * grid.rows for grid in self.refs))


def _slices(start: int, lengths: Sequence[int]) -> tuple[slice, ...]:
    """Adjacent slices of the given lengths."""
    found = []
    for length in lengths:
        found.append(slice(start, start + length))
        start += length
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class RegionMask:
    """Who sees whom, as two int64 bit fields per token, [S] each: q sees k iff reads_S[q] & member_S[k] != 0."""

    member_S: Tensor
    reads_S: Tensor

    @property
    def length(self) -> int:
        return self.member_S.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RegionMask:
        return RegionMask(
            self.member_S.to(device, non_blocking=non_blocking), self.reads_S.to(device, non_blocking=non_blocking)
        )

    def classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens grouped by equal bits: (reader class [S], key class [S], bool table [reader classes, key classes])."""
        readers, reader_S = torch.unique(self.reads_S, return_inverse=True)
        members, member_S = torch.unique(self.member_S, return_inverse=True)
        return reader_S, member_S, (readers[:, None] & members[None, :]) != 0

    def dense(self, rows: int | None = None) -> Tensor:
        """The mask as a bool matrix [S, S], row = query; with `rows` only the first so many rows."""
        # through the few classes: an S x S int64 intermediate would be 8 times larger than the result
        reader_S, member_S, table = self.classes()
        return table[:, member_S][reader_S[:rows]]

    def hide(self, tokens: slice | Tensor) -> RegionMask:
        """The same mask with some tokens (padding) seen by nobody. They still read, so that no row is empty."""
        member_S, reads_S = self.member_S.clone(), self.reads_S.clone()
        member_S[tokens] = 0
        reads_S[tokens] = torch.iinfo(torch.int64).max
        return RegionMask(member_S, reads_S)

    def take(self, tokens: Tensor) -> RegionMask:
        """The mask of the sequence that has these tokens, in this order."""
        return RegionMask(self.member_S.index_select(0, tokens), self.reads_S.index_select(0, tokens))

    def pad(self, length: int) -> RegionMask:
        """Grown to `length` tokens at the end; the new ones are seen by nobody."""
        zeros = self.member_S.new_zeros(length - self.length)
        grown = RegionMask(torch.cat([self.member_S, zeros]), torch.cat([self.reads_S, zeros]))
        return grown.hide(slice(self.length, length))


@dataclass(frozen=True, slots=True, eq=False)
class TokenOrder:
    """The joint sequence sorted so that what belongs together lies together; still [text | noise | refs].

    text_T, noise_P, ref_R (int32) hold the old place of each token within text, noise and all references; the first
    `active` noise tokens are those of the regions and their halo.
    """

    text_T: Tensor
    noise_P: Tensor
    ref_R: Tensor
    active: int

    @property
    def joint_S(self) -> Tensor:
        """The old place of each token in the joint sequence."""
        noise = len(self.text_T) + self.noise_P
        return torch.cat([self.text_T, noise, len(self.text_T) + len(self.noise_P) + self.ref_R])

    def to(self, device: torch.device | str) -> TokenOrder:
        return TokenOrder(self.text_T.to(device), self.noise_P.to(device), self.ref_R.to(device), self.active)


def sort_tokens(layout: TokenLayout, mask: RegionMask, halo: int = 0) -> TokenOrder:
    """Text: hints, the rest; noise: regions, their halo, the background; references: regions, the background.

    `mask` is any mask of the layout: it says which tokens lie in which regions. `halo` counts tokens.
    """
    bit = _bits(len(layout.hints))
    regions = sum(value for role, value in bit.items() if role.kind is RoleKind.NOISE_REGION)
    noise_P = mask.member_S[layout.noise_slice]
    distance_P = _distance(noise_P & regions != 0, layout.noise, halo)
    near_P = distance_P <= halo
    count = _grown(int(near_P.sum()), len(near_P))
    nearest = torch.argsort(distance_P, stable=True)[:count]
    inner_P = torch.zeros_like(near_P)
    inner_P[nearest] = True
    rank_P = _along(noise_P & regions) - inner_P.long()
    member_R = mask.member_S[layout.noise_slice.stop :]
    refs = sum(value for role, value in bit.items() if role.kind is RoleKind.REF_REGION)
    rank_R = _along(member_R & refs)
    text_T = torch.arange(layout.text_length)
    start = layout.vision + layout.main
    # padding is read by nobody: in front of all it splits nothing
    hints = text_T[start:][torch.argsort((mask.member_S[start : layout.text_length] != 0).long(), stable=True)]
    places = (torch.cat([hints, text_T[:start]]), *(torch.argsort(key, stable=True) for key in (rank_P, rank_R)))
    return TokenOrder(*(place.int() for place in places), active=len(nearest))


def _grown(count: int, tokens: int) -> int:
    """How many of `tokens` noise tokens become active where `count` must."""
    return -(-count // GRAIN) * GRAIN if tokens >= GRAIN * GRAIN else count


def _distance(inside_P: Tensor, grid: Grid, halo: int) -> Tensor:
    """Steps from each cell to the nearest inside cell, diagonals allowed [P]; 0 inside, large where there is none.

    Also large beyond the last cell that may become active: a plan must cost little beside a step.
    """
    near = inside_P.view(1, 1, grid.rows, grid.columns).float()
    distance = torch.where(near > 0, 0, grid.columns + grid.rows + 1)
    reached, step = int(near.sum()), 0
    wanted = _grown(reached, near.numel())
    while step < halo or reached < wanted:
        step += 1
        near = torch.nn.functional.max_pool2d(near, 3, stride=1, padding=1)
        distance = torch.where((near > 0) & (distance > step), step, distance)
        before, reached = reached, int(near.sum())
        if reached == before:  # everything, or nothing
            break
        if step <= halo:
            wanted = _grown(reached, near.numel())
    return distance.view(-1)


def _along(bits: Tensor) -> Tensor:
    """A sort key for sets of regions: in the order of a Gray code, so that a region and its overlaps touch; 0 last."""
    key = bits.clone()
    for shift in (1, 2, 4, 8, 16, 32):
        key ^= key >> shift
    return torch.where(bits == 0, torch.iinfo(torch.int64).max, key)


def build_mask(
    layout: TokenLayout, boxes: Sequence[Box], size: Size, config: MaskConfig, *, isolated: bool
) -> RegionMask | None:
    """The mask of the built-in rules; None = everyone sees everyone, when there are no boxes.

    `boxes` are in pixels of a source picture of `size`, one per hint, and grow by `config.expand` here. A box outside
    the picture has no image tokens. `isolated` picks the locality rules. `config.rules` count in `phases` only.

    Raises PlanError above MAX_REGIONS, ValueError when hints and boxes differ in number.
    """
    if not _check(layout, boxes):
        return None
    return _visibility(_members(layout, boxes, size, config), builtin_rules(len(boxes), config, isolated=isolated))


def phases(
    layout: TokenLayout, boxes: Sequence[Box], size: Size, config: MaskConfig, *, isolated_reference: bool = False
) -> tuple[tuple[float, RegionMask], ...]:
    """(until this share of the steps, mask), ascending, the last 1.0; () = full attention throughout, without boxes.

    With `isolated_reference`, reference tokens read only reference tokens, whatever the rules say.
    Raises as `build_mask`, and ConfigError where `config.rules` name a region that the plan has not.
    """
    if not _check(layout, boxes):
        return ()
    member_S = _members(layout, boxes, size, config)
    planned = schedule(len(boxes), config)
    if isolated_reference:
        planned = tuple((until, isolate_reference(rules)) for until, rules in planned)
    return tuple((until, _visibility(member_S, rules)) for until, rules in planned)


def without_regions(layout: TokenLayout) -> RegionMask:
    """Everyone reads everyone, but reference tokens read only reference tokens. For a prompt without hints."""
    member_S = _members(layout, (), Size(1, 1), _PLAIN)
    return _visibility(member_S, isolate_reference(builtin_rules(0, _PLAIN, isolated=False)))


def mask_at(masks: Sequence[tuple[float, RegionMask]], step: int, steps: int) -> RegionMask | None:
    """The mask of step 0..steps-1: the first phase with step < int(until * steps). None without phases."""
    for until, mask in masks:
        if step < int(until * steps):
            return mask
    return masks[-1][1] if masks else None


def _check(layout: TokenLayout, boxes: Sequence[Box]) -> bool:
    """Whether there is anything to mask."""
    roles(len(boxes))  # raises above MAX_REGIONS
    if len(boxes) != len(layout.hints):
        raise ValueError(f"{len(boxes)} boxes for {len(layout.hints)} hints: every region needs both")
    return len(boxes) > 0


def _bits(regions: int) -> dict[Role, int]:
    return {role: 1 << position for position, role in enumerate(roles(regions))}


def _members(layout: TokenLayout, boxes: Sequence[Box], size: Size, config: MaskConfig) -> Tensor:
    """Role bits of each token, [S] int64; 0 for padding."""
    bit = _bits(len(boxes))
    grown = [box.expand(config.expand, size) for box in boxes] if config.expand else list(boxes)
    member_S = torch.zeros(layout.length, dtype=torch.int64)
    member_S[layout.vision_slice] = bit[Role(RoleKind.VISION)]
    member_S[layout.main_slice] = bit[Role(RoleKind.MAIN)]
    pads = layout.hint_pads or (0,) * len(layout.hints)
    for number, (span, pad) in enumerate(zip(layout.hint_slices, pads, strict=True), 1):
        member_S[span.start : span.stop - pad] = bit[Role(RoleKind.HINT, number)]
    regions = [bit[Role(RoleKind.NOISE_REGION, number)] for number in range(1, len(boxes) + 1)]
    member_S[layout.noise_slice] = _cells(layout.noise, grown, size, regions, bit[Role(RoleKind.NOISE_BACKGROUND)])
    regions = [bit[Role(RoleKind.REF_REGION, number)] for number in range(1, len(boxes) + 1)]
    for number, (span, grid) in enumerate(zip(layout.ref_slices, layout.refs, strict=True)):
        inside = grown if number == layout.edited_ref else []
        member_S[span] = _cells(grid, inside, size, regions, bit[Role(RoleKind.REF_BACKGROUND)])
    return member_S


def _cells(grid: Grid, boxes: Sequence[Box], size: Size, regions: Sequence[int], background: int) -> Tensor:
    """Role bits of one image's tokens, row-major [rows * columns]: every box that a cell touches, else background."""
    cells = torch.zeros(grid.rows, grid.columns, dtype=torch.int64)
    for box, bit in zip(boxes, regions, strict=False):
        part = box.cells(size, grid)
        cells[part.top : part.bottom, part.left : part.right] |= bit
    return torch.where(cells == 0, background, cells).flatten()


def _visibility(member_S: Tensor, rules: Rules) -> RegionMask:
    """Join token membership and rules: a token reads whatever any of its roles reads."""
    bit = _bits(sum(role.kind is RoleKind.HINT for role in rules))
    rows = [(bit[query], sum(bit[key] for key in keys)) for query, keys in rules.items()]
    members, class_S = torch.unique(member_S, return_inverse=True)  # few, beside thousands of tokens
    reads = [functools.reduce(int.__or__, (row for own, row in rows if member & own), 0) for member in members.tolist()]
    return RegionMask(member_S, torch.tensor(reads, dtype=torch.int64)[class_S]).hide(member_S == 0)
