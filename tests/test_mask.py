"""Roles, rules and masks: the published rule engine's vectors, properties, and rules files."""

from __future__ import annotations

import base64
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replan.errors import ConfigError, PlanError
from replan.mask import MAX_REGIONS, MaskConfig, RegionMask, TokenLayout, build_mask, mask_at, phases
from replan.rules import (
    Role,
    RoleKind,
    RulePhase,
    builtin_rules,
    load_rules,
    matrix,
    phase_rules,
    roles,
    schedule,
    spell,
)
from replan.types import Box, Grid, Size

ROOT = Path(__file__).parents[1]
VECTORS = Path(os.environ.get("REPLAN_MASK_VECTORS", ROOT / "tests/data/mask_vectors.json"))
CASES = json.loads(VECTORS.read_text())
PLAIN = MaskConfig(expand=0.0, isolate=0.0)


def test_a_box_grown_beyond_all_measure_is_the_picture() -> None:
    assert Box(4, 4, 8, 8).expand(1e308, Size(32, 16)) == Box(0, 0, 32, 16)


def unpack(case: dict[str, Any]) -> torch.Tensor:
    length = case["length"]
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(case["mask"])), np.uint8))
    return torch.from_numpy(bits[: length * length].reshape(length, length).astype(bool))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_vectors_of_the_published_engine(case: dict[str, Any]) -> None:
    grid = Grid(*case["grid"])
    layout = TokenLayout(case["image_prompt_tokens"], case["main_tokens"], tuple(case["hint_tokens"]), grid, (grid,))
    config = MaskConfig(expand=0.0, isolate=0.0, mutual=case["mutual"], symmetric=case["symmetric"])
    boxes = [Box(*box) for box in case["boxes"]]
    mask = build_mask(layout, boxes, Size(*case["image_size"]), config, isolated=case["isolate_background_noise"])
    ours = torch.ones(layout.length, layout.length, dtype=torch.bool) if mask is None else mask.dense()
    assert layout.length == case["length"]
    assert torch.equal(ours, unpack(case))


def test_the_shipped_vectors_are_sixty() -> None:
    assert len(json.loads((ROOT / "tests/data/mask_vectors.json").read_text())) == 60


@pytest.mark.parametrize(
    ("size", "box", "model", "cells"),
    [
        ((640, 480), (70, 70, 330, 330), (1184, 880), (8, 8, 39, 38)),
        ((719, 389), (431, 59, 556, 389), (1392, 752), (52, 7, 68, 47)),
        ((1540, 600), (560, 460, 732, 507), (1568, 672), (35, 32, 47, 36)),
        ((640, 480), (100, 100, 300, 300), (1184, 896), (11, 11, 35, 35)),
        ((719, 389), (446, 98, 542, 356), (1408, 768), (54, 12, 67, 44)),
        ((1540, 600), (580, 466, 713, 502), (1632, 640), (38, 31, 48, 34)),
    ],
)
def test_boxes_land_on_the_published_cells(size: Any, box: Any, model: Any, cells: Any) -> None:
    grid = Grid(model[0] // 16, model[1] // 16)
    assert Box(*box).cells(Size(*size), grid).as_tuple() == cells


@st.composite
def scenes(draw: st.DrawFn, most: int = 5) -> tuple[TokenLayout, list[Box], Size, MaskConfig]:
    """Any layout with 1..most boxes: overlapping, over the rim, outside, empty; padded hints; several references."""
    count = draw(st.integers(1, most))
    size = Size(draw(st.integers(1, 300)), draw(st.integers(1, 300)))
    grids = st.builds(Grid, st.integers(1, 6), st.integers(1, 6))
    hints = tuple(draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    pads = tuple(draw(st.integers(0, hint)) for hint in hints)
    refs = tuple(draw(st.lists(grids, min_size=1, max_size=3)))
    vision, main, edited = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(0, len(refs) - 1))
    layout = TokenLayout(vision, main, hints, draw(grids), refs, pads, edited)
    edge = st.integers(-200, 500)
    boxes = [Box(*draw(st.tuples(edge, edge, edge, edge))) for _ in range(count)]
    flags = {name: draw(st.booleans()) for name in ("mutual", "symmetric", "hide_main", "region_reads_main")}
    share = st.sampled_from((0.0, 0.15, 0.5, 1.0))
    return layout, boxes, size, MaskConfig(expand=draw(share), isolate=draw(share), **flags)


def tokens(layout: TokenLayout, number: int) -> slice:
    """Tokens of hint `number` (from 0) without its padding."""
    span = layout.hint_slices[number]
    return slice(span.start, span.stop - layout.hint_pads[number])


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_properties(scene: tuple[TokenLayout, list[Box], Size, MaskConfig]) -> None:
    layout, boxes, size, config = scene
    for _, mask in phases(layout, boxes, size, config):
        visible = mask.dense()
        assert visible.shape == (layout.length, layout.length)
        assert visible.any(dim=1).all()
        for number, (span, pad) in enumerate(zip(layout.hint_slices, layout.hint_pads, strict=True)):
            assert not visible[:, span.stop - pad : span.stop].any(), "padding is seen"
            for other in range(len(boxes)):
                assert number == other or not visible[tokens(layout, number), layout.hint_slices[other]].any()
        if config.hide_main:
            readers = visible[layout.main_slice.stop :, : layout.main_slice.stop]
            assert not readers[mask.member_S[layout.main_slice.stop :] != 0].any()


@settings(max_examples=60, deadline=None)
@given(scenes(most=MAX_REGIONS))
def test_phases_differ_only_where_they_should(scene: tuple[TokenLayout, list[Box], Size, MaskConfig]) -> None:
    layout, boxes, size, config = scene
    local = build_mask(layout, boxes, size, config, isolated=True)
    open_ = build_mask(layout, boxes, size, config, isolated=False)
    assert local is not None
    assert open_ is not None
    assert torch.equal(local.member_S, open_.member_S)
    noise = torch.zeros(layout.length, dtype=torch.bool)
    noise[layout.noise_slice] = True
    background = open_.member_S == 1 << roles(len(boxes)).index(Role(RoleKind.NOISE_BACKGROUND))
    expected = (noise & background)[:, None] & (noise & ~background)[None, :]
    assert torch.equal(local.dense() != open_.dense(), expected)


def scene_of(count: int, **switches: Any) -> tuple[TokenLayout, list[Box], Size, MaskConfig]:
    """`count` disjoint boxes in a row of a 160 x 32 picture, one hint of two tokens each, 20 x 4 cells."""
    layout = TokenLayout(2, 3, (2,) * count, Grid(20, 4), (Grid(20, 4),))
    boxes = [Box(8 * number, 8, 8 * number + 8, 24) for number in range(count)]
    return layout, boxes, Size(160, 32), MaskConfig(**{"expand": 0.0, "isolate": 0.5, **switches})


@pytest.mark.parametrize("count", range(1, MAX_REGIONS + 1))
def test_every_number_of_regions_works(count: int) -> None:
    layout, boxes, size, config = scene_of(count)
    for _, mask in phases(layout, boxes, size, config):
        visible = mask.dense()
        assert visible.any(dim=1).all()
        for number, span in enumerate(layout.hint_slices):
            readers = visible[layout.noise_slice, span].all(dim=1).nonzero().flatten().tolist()
            assert readers == [20 + number, 40 + number], "a hint is read by its own box's cells only"


def test_too_many_regions() -> None:
    layout, boxes, size, config = scene_of(20)
    with pytest.raises(PlanError, match="20 regions: at most 19"):
        phases(layout, boxes, size, config)
    with pytest.raises(PlanError, match="at most 19"):
        build_mask(layout, boxes, size, config, isolated=False)


def test_no_regions_is_full_attention() -> None:
    layout, boxes, size, config = scene_of(0)
    assert build_mask(layout, boxes, size, config, isolated=True) is None
    assert phases(layout, boxes, size, config) == ()
    assert mask_at((), 3, 4) is None


def test_hints_and_boxes_must_pair() -> None:
    layout, boxes, size, config = scene_of(2)
    with pytest.raises(ValueError, match="1 boxes for 2 hints"):
        phases(layout, boxes[:1], size, config)


@pytest.mark.parametrize(
    ("isolate", "steps", "expected"),
    [(0.0, 28, 0), (0.05, 28, 1), (0.05, 10, 0), (0.5, 50, 25), (0.7, 7, 4), (1.0, 9, 9)],
)
def test_schedule_switches_at_the_truncated_step(isolate: float, steps: int, expected: int) -> None:
    layout, boxes, size, config = scene_of(1, isolate=isolate)
    masks = phases(layout, boxes, size, config)
    local = build_mask(layout, boxes, size, config, isolated=True)
    assert local is not None
    chosen = [mask_at(masks, step, steps) for step in range(steps)]
    assert all(mask is not None for mask in chosen)
    assert masks[-1][0] == 1.0
    assert sum(torch.equal(mask.reads_S, local.reads_S) for mask in chosen if mask is not None) == expected


def test_expansion_happens_inside() -> None:
    layout, _, size, config = scene_of(1, expand=0.25)
    grown = build_mask(layout, [Box(40, 8, 80, 24)], size, config, isolated=False)
    plain = build_mask(layout, [Box(30, 4, 90, 28)], size, PLAIN, isolated=False)
    assert grown is not None
    assert plain is not None
    assert torch.equal(grown.member_S, plain.member_S)


def test_other_references_are_background() -> None:
    layout = TokenLayout(0, 1, (1,), Grid(4, 4), (Grid(2, 2), Grid(4, 4)), edited_ref=1)
    mask = build_mask(layout, [Box(0, 0, 8, 8)], Size(16, 16), PLAIN, isolated=False)
    assert mask is not None
    sees_hint = mask.dense()[:, layout.hint_slices[0]].flatten()
    assert not sees_hint[layout.ref_slices[0]].any()
    assert sees_hint[layout.ref_slices[1]].sum() == sees_hint[layout.noise_slice].sum() == 4


def attention_gradient(mask: RegionMask, rows: slice, keys: slice) -> float:
    """Largest gradient from the attention output of `rows` into the values and keys of `keys`."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 1, mask.length, 8, generator=generator) for _ in range(3))
    key.requires_grad_()
    value.requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense())
    into_key, into_value = torch.autograd.grad(out[..., rows, :].square().sum(), (key, value))
    return max(grad[..., keys, :].abs().max().item() for grad in (into_key, into_value))


def test_a_hidden_hint_has_no_gradient_into_tokens_that_may_not_read_it() -> None:
    layout = TokenLayout(0, 2, (2, 3), Grid(4, 4), (Grid(4, 4),))
    boxes, size = [Box(0, 0, 8, 8), Box(8, 8, 16, 16)], Size(16, 16)
    mask = build_mask(layout, boxes, size, PLAIN, isolated=False)
    assert mask is not None
    first = layout.noise_slice.start
    inside, outside = slice(first, first + 1), slice(first + 2, first + 4)
    assert attention_gradient(mask, outside, layout.hint_slices[0]) == 0.0
    assert attention_gradient(mask, inside, layout.hint_slices[0]) > 0.0
    assert attention_gradient(mask, inside, layout.hint_slices[1]) == 0.0
    assert attention_gradient(mask, layout.main_slice, layout.hint_slices[0]) == 0.0


def names_read(config: MaskConfig, reader: str, isolated: bool = False) -> set[str]:
    rules = builtin_rules(2, config, isolated=isolated)
    return next({key.name for key in keys} for query, keys in rules.items() if query.name == reader)


def test_switches() -> None:
    def config(**switches: bool) -> MaskConfig:
        return MaskConfig(expand=0.0, isolate=0.0, **switches)

    everything = {role.name for role in roles(2)}
    assert names_read(PLAIN, "vision") == everything
    assert names_read(PLAIN, "main") == everything - {"hint 1", "hint 2"}
    assert names_read(PLAIN, "hint 1") == everything - {"main", "hint 2"}
    assert names_read(PLAIN, "noise region 1") == everything - {"hint 2"}
    assert names_read(config(symmetric=True), "hint 2") == {"vision", "hint 2", "noise region 2", "ref region 2"}
    assert names_read(config(mutual=False), "ref region 1") == everything - {"hint 2", "noise region 2", "ref region 2"}
    assert names_read(config(hide_main=True), "noise background") == everything - {"main", "vision", "hint 1", "hint 2"}
    assert "main" not in names_read(config(region_reads_main=False), "ref region 2")
    assert "main" in names_read(config(region_reads_main=False), "ref background")
    assert names_read(PLAIN, "noise background", isolated=True) == everything - {
        "hint 1",
        "hint 2",
        "noise region 1",
        "noise region 2",
    }
    assert names_read(PLAIN, "ref background", isolated=True) == everything - {"hint 1", "hint 2"}


@pytest.mark.parametrize("regions", [1, 2, 19])
def test_example_rule_files_spell_out_the_builtin_rules(regions: int) -> None:
    (paper,) = load_rules(ROOT / "configs/rules/paper.yaml", regions)
    assert paper.base == "nothing"
    assert phase_rules(paper, regions, PLAIN) == builtin_rules(regions, PLAIN, isolated=False)
    local, rest = load_rules(ROOT / "configs/rules/local.yaml", regions)
    assert local.base == "nothing"
    assert phase_rules(local, regions, PLAIN) == builtin_rules(regions, PLAIN, isolated=True)
    halves = MaskConfig(expand=0.0, isolate=0.5)
    assert schedule(regions, MaskConfig(expand=0.0, isolate=0.0, rules=(local, rest))) == schedule(regions, halves)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/rules").glob("*")), ids=lambda path: path.name)
def test_every_rules_file_loads(path: Path) -> None:
    rules = load_rules(path, 3)
    for _, table in schedule(3, MaskConfig(0.0, 0.0, rules=rules)):
        assert all(query in keys for query, keys in table.items())


def rules_from(tmp_path: Path, text: str, regions: int = 2) -> dict[str, set[str]]:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    (phase,) = load_rules(path)
    return {query.name: {key.name for key in keys} for query, keys in phase_rules(phase, regions, PLAIN).items()}


def test_rule_lines(tmp_path: Path) -> None:
    table = rules_from(tmp_path, "region i: hint i, ref region i\nnoise region 2: [hint 2, noise background]\nmain:\n")
    assert table["noise region 1"] == {"noise region 1", "hint 1", "ref region 1"}
    assert table["ref region 2"] == {"hint 2", "ref region 2"}
    assert table["noise region 2"] == {"noise region 2", "hint 2", "noise background"}
    assert table["main"] == {"main"}
    assert table["hint 1"] == {"hint 1"}


def test_rule_edits(tmp_path: Path) -> None:
    paper = {query.name: {key.name for key in keys} for query, keys in builtin_rules(2, PLAIN, isolated=False).items()}
    lines = {"from": "paper", "hint *": "-background", "region 1": "-region j, -main", "main": "+hint 2"}
    table = rules_from(tmp_path, json.dumps(lines))
    assert table["hint 2"] == paper["hint 2"] - {"noise background", "ref background"}
    assert table["noise region 1"] == paper["noise region 1"] - {"noise region 2", "ref region 2", "main"}
    assert table["noise region 2"] == paper["noise region 2"]
    assert table["main"] == paper["main"] | {"hint 2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hnt i: main", "`hnt i` is unknown .did you mean hint i"),
        ("main: visoin", "`visoin` is unknown .did you mean vision"),
        ("noise bakground: main", "did you mean noise background"),
        ("noise regoin 2: main", "did you mean noise region 2"),
        ("zzz: main", r"`zzz` is unknown \(known: main, vision"),
        ("hint: main", "needs a number"),
        ("hint 0: main", "needs a number"),
        ("main 1: main", "takes no number"),
        ("main: hint i", "main has no number"),
        ("region j: main", "on the left write `region i`"),
        ("region 7: main", "there is no region 7, the plan has 2"),
        ("main: hint 3", "there is no hint 3"),
        ("region i: -region *", "noise region 1 must read itself.*write `-region j`"),
        ("hint i: -hint i", "hint 1 must read itself"),
        ("main: main, -vision", "either all names carry"),
        ("main: 3", "must be names"),
        ("main: yes", "must be names"),
        ("from: papr\nmain: main", "did you mean paper"),
        ("until: 0.5\nmain: main", "the last must be 1.0"),
        ("until: much\nmain: main", "must be a finite number"),
        ("- main: main\n- main: main", "every phase but the last needs `until`"),
        ("- {until: 0.6, main: main}\n- {until: 0.4, main: main}\n- from: paper", "shares must grow"),
        ("- main\n- vision", "must hold lines"),
        ("", "must hold lines"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_rules_say_what_to_mend(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_rules(path, 2)


def test_missing_rules_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_rules(tmp_path / "none.yaml")


def test_rules_reach_the_mask_with_their_step_ranges() -> None:
    rules = (RulePhase(0.25, ("region i: hint i, region i",)), RulePhase(1.0, base="paper"))
    layout, boxes, size, _ = scene_of(2)
    masks = phases(layout, boxes, size, MaskConfig(expand=0.0, isolate=0.9, rules=rules))
    assert [until for until, _ in masks] == [0.25, 1.0]
    paper = build_mask(layout, boxes, size, PLAIN, isolated=False)
    assert paper is not None
    assert torch.equal(masks[1][1].dense(), paper.dense())
    early = masks[0][1].dense()
    assert early.any(dim=1).all()
    assert not early[layout.noise_slice, layout.main_slice].any()
    assert early[layout.noise_slice.start + 20, layout.hint_slices[0]].all()


def test_a_role_whose_regions_are_outside_still_reads_itself() -> None:
    layout = TokenLayout(0, 1, (2,), Grid(2, 2), (Grid(2, 2),))
    rules = (RulePhase(1.0, ("hint i: region i", "image: region *")),)
    ((_, mask),) = phases(layout, [Box(90, 90, 99, 99)], Size(16, 16), MaskConfig(0.0, 0.0, rules=rules))
    assert mask.dense().any(dim=1).all()


def test_spelled_rules_come_back() -> None:
    table = builtin_rules(3, MaskConfig(expand=0.0, isolate=0.0, mutual=False, symmetric=True), isolated=True)
    assert phase_rules(spell(table), 3, PLAIN) == table


def test_matrix_leaves_vision_out_on_request() -> None:
    names, table = matrix(builtin_rules(1, PLAIN, isolated=False), vision=False)
    assert names == ("main", "hint 1", "noise region 1", "noise background", "ref region 1", "ref background")
    assert table[1] == (False, True, True, True, True, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expand": -0.1}, "expand = -0.1"),
        ({"expand": float("nan")}, "finite"),
        ({"expand": "wide"}, "finite"),
        ({"isolate": 1.5}, r"isolate = 1.5.*\[0, 1\]"),
        ({"mutual": 1}, "mutual = 1"),
        ({"pooled": "all"}, "pooled"),
        ({"rules": (RulePhase(0.5),)}, "last must be 1.0"),
    ],
)
def test_bad_configs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskConfig(**{"expand": 0.0, "isolate": 0.0, **values})


def test_bad_layouts() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        TokenLayout(0, -1, (), Grid(1, 1), ())
    with pytest.raises(ValueError, match="hint_pads"):
        TokenLayout(0, 1, (2,), Grid(1, 1), (), hint_pads=(3,))


def test_padding_grows_the_mask_unseen() -> None:
    layout, boxes, size, config = scene_of(1)
    mask = build_mask(layout, boxes, size, config, isolated=False)
    assert mask is not None
    grown = mask.pad(mask.length + 5).dense()
    assert torch.equal(grown[: mask.length, : mask.length], mask.dense())
    assert not grown[:, mask.length :].any()
    assert grown.any(dim=1).all()
