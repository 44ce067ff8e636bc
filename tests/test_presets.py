"""Named attention rules: they load, mean what they say, and run on every kind of editor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from replan import config
from replan.backbones import BACKBONES, EditConfig, Runtime, default_config
from replan.cli.options import Flags
from replan.denoise import sample
from replan.errors import ConfigError
from replan.presets import apply_preset, load_preset, preset_names, spelled
from replan.rules import MaskConfig, Role, RoleKind, builtin_rules, schedule
from replan.types import Box, EditRequest, Plan, Region, Size

MASK = MaskConfig(expand=0.1, isolate=0.3, pooled="hints")
PLAN = Plan(
    "", "keep it", (Region(Box(4, 4, 20, 20), "make it red"), Region(Box(16, 10, 40, 28), "make it blue")), Size(48, 32)
)
SETTINGS = {
    "flux": ("edit/flux_kontext", ["steps=2", "max_area=1536", "auto_resize=false", "max_sequence_length=24"]),
    "qwen": ("edit/qwen_image_edit", ["steps=2", "max_area=4096"]),
}


@pytest.fixture(scope="module", params=["flux", "qwen"])
def tiny_editor(request: pytest.FixtureRequest) -> tuple[Any, EditConfig]:
    """A random small model of a real class, and its settings."""
    from replan.backbones.flux_kontext import FluxKontext
    from replan.backbones.qwen_image_edit import QwenImageEdit

    kind: Any = {"flux": FluxKontext, "qwen": QwenImageEdit}[request.param]
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    source, overrides = SETTINGS[request.param]
    return kind.load(str(folder), Runtime(device="cpu")), config.load(EditConfig, source, overrides)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_edits_with_both_kinds_of_editor(name: str, tiny_editor: tuple[Any, EditConfig]) -> None:
    backbone, plain = tiny_editor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    found = {}
    for rules, mask in {"own": replace(plain.mask, isolate=1.0), name: apply_preset(plain.mask, name)}.items():
        cond = backbone.condition(EditRequest(picture, "x", 1), PLAN, replace(plain, mask=mask))
        assert cond.masks
        found[rules] = sample(backbone.velocity(cond), backbone.noise(cond), cond.sigmas)
        assert torch.isfinite(found[rules]).all()
    assert backbone.decode(found[name], cond).size == (48, 32)
    assert not torch.equal(found["own"], found[name])


def test_the_paper_preset_is_the_published_setting() -> None:
    mask = apply_preset(replace(MASK, region_reads_main=False), "paper")
    assert (mask.pooled, mask.expand) == ("main", 0.1)
    assert schedule(2, mask) == ((1.0, builtin_rules(2, MASK, isolated=False)),)


def test_the_direct_preset_cuts_regions_off_from_the_main_prompt() -> None:
    mask = apply_preset(MASK, "direct")
    want = replace(MASK, region_reads_main=False, pooled="none", isolate=0.0)
    ((until, rules),) = schedule(2, mask)
    assert (until, mask.pooled) == (1.0, "none")
    assert schedule(2, want)[0][1] == rules
    assert Role(RoleKind.MAIN) not in rules[Role(RoleKind.NOISE_REGION, 1)]


def test_rules_alone_leave_the_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("region i: hint i\n")
    assert set(load_preset(file)) == {"rules"}
    assert apply_preset(MASK, file).pooled == "hints"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_means_the_same_over_every_backbone(name: str) -> None:
    """`from: paper` starts with a backbone's own switches, so a preset has to say those that differ somewhere."""
    masks = [apply_preset(default_config(row.name).mask, name) for row in BACKBONES]
    assert len({repr(schedule(2, mask)) for mask in masks}) == 1
    assert len({mask.pooled for mask in masks}) == 1


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("expand: 0.2\nrules:\n  - until: 0.5\n    from: local\n  - from: paper\n")
    mask = apply_preset(MASK, file)
    assert (mask.expand, [phase.until for phase in mask.rules]) == (0.2, [0.5, 1.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poold: none\nrules: {main: all}\n", "poold: unknown (did you mean pooled?)"),
        ("pooled: some\nrules: {main: all}\n", "must be main, hints or none"),
        ("pooled: none\nrules: []\n", "must hold lines"),
        ("rules: {mian: all}\n", "did you mean main"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml") as caught:
        apply_preset(MASK, file)
    assert message in str(caught.value)


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown \(did you mean paper\?\); use .*local"):
        load_preset("papper")


def test_the_option_and_the_setting_say_the_same() -> None:
    by_option = Flags(rules="direct", backbone="flux-kontext").setup().config
    by_setting = Flags(settings=["rules=direct"], backbone="flux-kontext").setup().config
    own = default_config("flux-kontext")
    assert by_option == by_setting == replace(own, mask=apply_preset(own.mask, "direct"))
    wider = Flags(settings=["mask.expand=0.4"], rules="direct", backbone="flux-kontext").setup().config
    assert wider.mask == replace(by_option.mask, expand=0.4)


def test_rules_by_name_in_settings_of_the_benchmark() -> None:
    values = spelled({"steps": 3, "rules": "paper", "mask": {"expand": 0.5}})
    loaded = config.load(EditConfig, "edit/flux_kontext", over=(values,))
    assert (loaded.steps, loaded.mask.expand, loaded.mask.pooled) == (3, 0.5, "main")
    assert loaded.mask.rules == apply_preset(MASK, "paper").rules
    with pytest.raises(ConfigError, match="rules = 3"):
        spelled({"rules": 3})


def test_spelled_over_an_empty_mask() -> None:
    assert spelled({"rules": "paper", "mask": None}) == spelled({"rules": "paper"})
