"""Pictures of plans and masks: right size, right places, right cells."""

from __future__ import annotations

import pytest
from PIL import Image

from replan.draw import FAINT, INK, NEUTRAL, colour, draw_mask, draw_matrix, draw_plan, matrix_table
from replan.rules import MAX_REGIONS, MaskConfig, matrix, schedule
from replan.types import Box, Grid, Plan, Region, Size

SIZE = Size(96, 96)
PLAN = Plan(
    "", "keep the rest", (Region(Box(8, 40, 40, 72), "make it red"), Region(Box(56, 40, 88, 72), "keep it")), SIZE
)
HALVES = schedule(2, MaskConfig(expand=0.0, isolate=0.5))


def grey(size: Size = SIZE) -> Image.Image:
    return Image.new("RGB", size, (128, 128, 128))


def test_a_small_picture_is_magnified_and_framed_in_the_region_colours() -> None:
    drawn = draw_plan(grey(), PLAN)
    assert drawn.width == 672
    assert drawn.height > 672
    for number, region in enumerate(PLAN.regions, 1):
        left, middle = region.box.left * 7 + 1, (region.box.top + region.box.bottom) * 7 // 2
        assert drawn.getpixel((left, middle)) == colour(number)
    assert drawn.getpixel((24 * 7, 56 * 7)) == (128, 128, 128), "without a grid the inside is untouched"


def test_a_large_picture_is_bounded() -> None:
    assert max(draw_plan(grey(Size(5000, 1000)), PLAN).size) == 2048


def test_the_grid_tints_the_tokens_of_a_region() -> None:
    drawn = draw_plan(grey(), PLAN, Grid(6, 6))
    red, green, _ = drawn.getpixel((36 * 7 + 8, 68 * 7 + 20))
    assert red > green + 20, "the first region is red"
    assert drawn.getpixel((90 * 7, 90 * 7)) == (128, 128, 128)
    grown = draw_plan(grey(), PLAN, Grid(6, 6), expand=0.5)
    red, green, _ = grown.getpixel((24 * 7 + 8, 84 * 7))
    assert red > green + 20, "growing the box takes in one more row of tokens"


def test_a_plan_in_another_frame_lands_on_the_same_place() -> None:
    assert draw_plan(grey(), PLAN.to(Size(192, 192))).tobytes() == draw_plan(grey(), PLAN).tobytes()


@pytest.mark.parametrize("size", [Size(1, 1), Size(300, 12), Size(12, 300)])
def test_odd_pictures_and_hints(size: Size) -> None:
    hints = ("", "word " * 60, "x" * 500, "a\nb", "\u4f60\u597d")
    plan = Plan("", "", tuple(Region(Box(0, 0, 1, 1), hint) for hint in hints), Size(1, 1))
    assert max(draw_plan(grey(size), plan, Grid(2, 2)).size) >= 640


def test_labels_do_not_cover_each_other() -> None:
    one = draw_plan(grey(), PLAN)
    same = Plan("", "keep the rest", (PLAN.regions[0], Region(PLAN.regions[0].box, "keep it")), SIZE)
    both = draw_plan(grey(), same)
    for number in (1, 2):
        tones = [both.getpixel((x, y)) for x in range(0, 670, 2) for y in range(0, 670, 2)]
        assert tones.count(colour(number)) > 100
    assert one.size == both.size


@pytest.mark.parametrize("regions", [0, 1, 5, MAX_REGIONS])
def test_matrix_shows_every_role(regions: int) -> None:
    drawn = draw_matrix(schedule(regions, MaskConfig(expand=0.0, isolate=0.3)))
    assert 300 < drawn.width < 2200
    assert drawn.height > 150


def test_matrix_colours_are_the_table() -> None:
    """Count the filled cells of a one-region, one-phase matrix by colour."""
    (part,) = schedule(1, MaskConfig(expand=0.0, isolate=0.0))
    drawn = draw_matrix((part,))
    names, table = matrix(part[1])
    area = 29 * 29
    counts = {rgb: count for count, rgb in drawn.getcolors(1 << 20) or []}
    for tone, wanted in ((colour(1), "1"), (NEUTRAL, "")):
        cells = sum(
            seen for row in table for name, seen in zip(names, row, strict=True) if name.endswith("1") == bool(wanted)
        )
        assert cells * area <= counts[tone] < cells * area + 800, "labels add a little"
    assert counts[FAINT] == sum(not seen for row in table for seen in row) * area


def test_changes_between_phases_are_framed() -> None:
    framed = draw_matrix(HALVES).getcolors(1 << 20) or []
    plain = draw_matrix(HALVES[1:]).getcolors(1 << 20) or []
    assert {rgb: n for n, rgb in framed}[INK] > 2 * {rgb: n for n, rgb in plain}[INK]


def test_matrix_as_text() -> None:
    table = matrix_table(schedule(1, MaskConfig(expand=0.0, isolate=0.25)), vision=False)
    assert table == (
        "steps 0% to 25%  reads\n"
        "                   M  H1  N1  NB  R1  RB\n"
        "main               ●   ·   ●   ●   ●   ●\n"
        "hint 1             ·   ●   ●   ●   ●   ●\n"
        "noise region 1     ●   ●   ●   ●   ●   ●\n"
        "noise background   ●   ·   ·   ●   ●   ●\n"
        "ref region 1       ●   ●   ●   ●   ●   ●\n"
        "ref background     ●   ·   ●   ●   ●   ●\n"
        "\n"
        "steps 25% to 100% reads\n"
        "                   M  H1  N1  NB  R1  RB\n"
        "main               ●   ·   ●   ●   ●   ●\n"
        "hint 1             ·   ●   ●   ●   ●   ●\n"
        "noise region 1     ●   ●   ●   ●   ●   ●\n"
        "noise background   ●   ·   ●   ●   ●   ●\n"
        "ref region 1       ●   ●   ●   ●   ●   ●\n"
        "ref background     ●   ·   ●   ●   ●   ●"
    )


def test_mask_picture_holds_both() -> None:
    drawn = draw_mask(grey(), PLAN, HALVES, Grid(12, 12), expand=0.15, vision=False)
    plan, table = draw_plan(grey(), PLAN, Grid(12, 12), 0.15), draw_matrix(HALVES, vision=False)
    assert drawn.size == (max(plan.width, table.width), plan.height + table.height)
