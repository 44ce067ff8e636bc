"""Encodings of words are made once, kept within bounds, and change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import picture

from replan.backbones import EditConfig, Runtime, load_backbone
from replan.backbones.memo import Memo, fingerprint
from replan.config import load
from replan.edit import Editor
from replan.types import Box, EditRequest, Plan, Region, Size

PLAN = Plan(
    "", "keep it", (Region(Box(4, 4, 20, 20), "make it red"), Region(Box(16, 8, 40, 28), "a cup")), Size(48, 32)
)
FLUX = load(EditConfig, "edit/mini", ["steps=2", "max_area=1536"])
QWEN = load(EditConfig, "edit/qwen_image_edit", ["steps=2", "max_area=2048"])


def test_it_keeps_what_fits_and_forgets_the_longest_unused() -> None:
    memo, made = Memo(limit=3 * 40), []

    def get(key: str, numbers: int = 10) -> Any:
        return memo(key, lambda: made.append(key) or (torch.zeros(numbers), [key]))

    assert get("a") is get("a")
    get("b"), get("c"), get("a"), get("d")
    assert (made, memo.size) == (["a", "b", "c", "d"], 120)
    get("a"), get("b")
    assert made == ["a", "b", "c", "d", "b"]
    get("too large", 31)
    assert (memo.size, get("too large", 31)[1], made[-2:]) == (120, ["too large"], ["too large", "too large"])


def test_a_failure_is_not_kept() -> None:
    memo = Memo()
    with pytest.raises(ZeroDivisionError):
        memo("x", lambda: 1 // 0)
    assert memo("x", lambda: 3) == 3


def test_training_never_meets_an_inference_tensor() -> None:
    memo = Memo()
    with torch.inference_mode():
        assert memo("x", lambda: torch.zeros(2)).is_inference()
    assert not memo("x", lambda: torch.zeros(2)).is_inference()


def test_pictures_differ_by_size_and_pixels() -> None:
    one, other = picture(32, 24), picture(24, 32)
    assert fingerprint(one) == fingerprint([picture(32, 24)])
    assert len({fingerprint(one), fingerprint(other), fingerprint([one, other]), fingerprint(one.rotate(90))}) == 4


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_a_second_edit_encodes_only_what_is_new(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    backbone: Any = load_backbone(str(folder), Runtime(device="cpu"))
    editor = Editor(None, backbone, FLUX if family == "flux" else QWEN)
    encoder, calls = backbone.pipe.text_encoder_2 if family == "flux" else backbone.pipe.text_encoder, []
    inner = type(encoder).forward
    monkeypatch.setattr(type(encoder), "forward", lambda self, *a, **k: calls.append(1) or inner(self, *a, **k))
    asked = EditRequest(picture(48, 32), "x", 3, PLAN)
    first = editor(asked)
    fresh = len(calls)
    assert fresh >= 3
    again = editor(asked)
    assert len(calls) == fresh
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    changed = replace(PLAN, regions=(PLAN.regions[0], replace(PLAN.regions[1], hint="a star")))
    editor(replace(asked, plan=changed))
    assert len(calls) == fresh + 1
    if family == "qwen":  # its text encoder sees the picture
        editor(replace(asked, image=picture(48, 32).rotate(180)))
        assert len(calls) > fresh + 3
