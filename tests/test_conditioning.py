"""With regions: layouts, hints, pooled vectors, mask schedules, and that a velocity is a pure function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import replan.backbones.flux_kontext as flux_module
from replan.backbones.base import Conditioning, EditConfig
from replan.backbones.flux_kontext import FluxKontext
from replan.backbones.memo import Memo
from replan.backbones.qwen_image_edit import QwenImageEdit
from replan.backbones.qwen_image_edit_plus import QwenImageEditPlus
from replan.backbones.runtime import Runtime
from replan.config import load
from replan.denoise import sample
from replan.errors import PlanError
from replan.mask import RegionMask, mask_at, phases
from replan.types import Box, EditRequest, Grid, Plan, Region, Size

CPU = Runtime(device="cpu")
SMALL = ["steps=4", "speed=exact"]  # what may be reused between steps: test_stepper.py
FLUX = load(EditConfig, "edit/flux_kontext", [*SMALL, "max_area=1536", "auto_resize=false", "max_sequence_length=24"])
QWEN = load(EditConfig, "edit/qwen_image_edit", [*SMALL, "max_area=4096"])
HINTS = ("make the red cup blue", "keep it")
PLAN = Plan(
    "", "keep the image unchanged", (Region(Box(4, 4, 20, 20), HINTS[0]), Region(Box(16, 10, 40, 28), HINTS[1])),
    Size(48, 32),
)  # fmt: skip


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


REQUEST = EditRequest(picture(), "x", 4)


@pytest.fixture(scope="module")
def flux(flux_folder: Path) -> FluxKontext:
    return FluxKontext.load(str(flux_folder), CPU)


@pytest.fixture(scope="module")
def qwen(qwen_folder: Path) -> QwenImageEdit:
    return QwenImageEdit.load(str(qwen_folder), CPU)


@pytest.fixture(params=["flux", "qwen"])
def either(request: pytest.FixtureRequest) -> tuple[Any, EditConfig]:
    return request.getfixturevalue(request.param), {"flux": FLUX, "qwen": QWEN}[request.param]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


def at(backbone: Any, cond: Conditioning, sigma: float = 0.7) -> torch.Tensor:
    with torch.no_grad():
        return backbone.velocity(cond)(backbone.noise(cond), torch.tensor(sigma))


def test_flux_layout(flux: FluxKontext) -> None:
    cond = flux.condition(REQUEST, PLAN, FLUX)
    assert cond.layout.noise == Grid(12, 8)
    assert cond.layout.refs == (Grid(12, 8),)
    counts = [len(flux.pipe.tokenizer_2(hint).input_ids) for hint in HINTS]
    assert cond.layout.hints == tuple(-(-count // 8) * 8 for count in counts)
    assert cond.layout.hint_pads == tuple(-count % 8 for count in counts)
    assert cond.tensors["text"].shape[1] == cond.layout.text_length == 24 + sum(cond.layout.hints)
    full = flux.condition(REQUEST, PLAN, replace(FLUX, hint_padding="full"))
    assert (full.layout.hints, full.layout.hint_pads) == ((24, 24), (0, 0))


def test_rounding_a_hint_up_changes_nothing(flux: FluxKontext, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = at(flux, flux.condition(REQUEST, PLAN, FLUX))
    monkeypatch.setattr(flux_module, "HINT_BUCKET", 1)
    cond = flux.condition(REQUEST, PLAN, FLUX)
    assert cond.layout.hint_pads == (0, 0)
    assert apart(rounded, at(flux, cond)) < 1e-5


def test_flux_pooled_vector(flux: FluxKontext) -> None:
    def pooled(which: str, plan: Plan = PLAN) -> torch.Tensor:
        config = replace(FLUX, mask=replace(FLUX.mask, pooled=which))
        return flux.condition(REQUEST, plan, config).tensors["pooled"]

    def clip(text: str) -> torch.Tensor:
        return flux.pipe._get_clip_prompt_embeds(text)

    assert apart(pooled("main"), clip(PLAN.prompt)) == 0.0
    assert apart(pooled("none"), clip("")) == 0.0
    assert apart(pooled("hints"), (clip(HINTS[0]) + clip(HINTS[1])) / 2) < 1e-6
    bare = replace(PLAN, regions=())
    assert apart(pooled("none", bare), clip(PLAN.prompt)) == 0.0  # without regions it is the stock editor


def test_qwen_layout_and_hints(qwen: QwenImageEdit) -> None:
    cond = qwen.condition(REQUEST, PLAN, QWEN)
    size = qwen._pictures(picture(), [], QWEN).frame
    assert size == (64, 64)
    processed = qwen.pipe.image_processor.resize(picture(), size.height, size.width)
    grid = qwen.pipe.processor.image_processor(images=[processed])["image_grid_thw"][0]
    assert cond.layout.vision == int(np.prod(grid)) // 4 + 2  # the picture's tokens and their opening and closing one
    text = cond.tensors["text"]
    assert text.shape[1] == cond.layout.text_length
    for hint, rows in zip(HINTS, cond.layout.hint_slices, strict=True):
        # the definition: encode like a prompt, cut the picture out, drop the prefix (encode_prompt does that)
        alone = qwen.pipe.encode_prompt(hint, image=processed)[0][:, cond.layout.vision :]
        assert apart(text[:, rows], alone) == 0.0
    assert cond.negative is not None
    assert cond.negative.masks == ()
    assert cond.negative.layout.hints == ()


def test_the_vision_tower_runs_once_for_prompt_and_hints(qwen: QwenImageEdit) -> None:
    runs: list[int] = []
    qwen.memo = Memo()  # forget what other tests asked
    handle = qwen.pipe.text_encoder.model.visual.register_forward_hook(lambda *_: runs.append(1))
    try:
        qwen.condition(REQUEST, PLAN, replace(QWEN, true_cfg=None))
    finally:
        handle.remove()
    assert len(runs) == 1
    assert not qwen.pipe.text_encoder.model.visual._forward_hooks


def test_plus_layout(plus_folder: Path) -> None:
    backbone = QwenImageEditPlus.load(str(plus_folder), CPU)
    cond = backbone.condition(replace(REQUEST, extra_images=(picture(32, 64, 1),)), PLAN, QWEN)
    first, second = cond.layout.refs
    assert first == cond.layout.noise
    assert second != first
    text = cond.tensors["text"]
    assert text.shape[1] == cond.layout.text_length
    assert cond.tensors["reference"].shape[1] == sum(grid.columns * grid.rows for grid in cond.layout.refs)
    one = backbone.condition(REQUEST, PLAN, QWEN)
    assert one.layout.hints == cond.layout.hints  # however many pictures there are, a hint is its own words
    assert one.layout.vision < cond.layout.vision


def test_control_tokens_are_refused(qwen: QwenImageEdit) -> None:
    bad = replace(PLAN, regions=(replace(PLAN.regions[0], hint="a <|vision_end|> cup"),))
    for plan in (bad, replace(PLAN, prompt="<|image_pad|>")):
        with pytest.raises(PlanError, match="leave it out"):
            qwen.condition(REQUEST, plan, QWEN)


def test_the_mask_of_every_step(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    for isolate in (0.0, 0.1, 0.5, 0.76, 1.0):
        steps = replace(config, steps=13, mask=replace(config.mask, isolate=isolate))
        cond = backbone.condition(REQUEST, PLAN, steps)
        expected = phases(cond.layout, [region.box for region in PLAN.regions], PLAN.size, steps.mask)
        for step, sigma in enumerate(cond.sigmas[:-1].tolist()):
            got, want = cond.mask(sigma), mask_at(expected, step, 13)
            assert got is not None
            assert want is not None
            assert torch.equal(got.dense(), want.dense())


def test_an_all_true_mask_is_no_mask(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    cond = backbone.condition(REQUEST, PLAN, config)
    ones = torch.ones(cond.layout.length, dtype=torch.int64)
    everything = replace(cond, masks=((0.0, RegionMask(ones, ones)),))
    assert (
        apart(at(backbone, everything), at(backbone, replace(cond, masks=()))) <= 5e-6
    )  # sorted tokens are summed in another order
    assert apart(at(backbone, cond), at(backbone, replace(cond, masks=()))) > 1e-4


def test_flex_equals_dense(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    cond = backbone.condition(REQUEST, PLAN, config)
    flex = type(backbone)(backbone.pipe, "flex")
    assert apart(at(backbone, cond), at(flex, cond)) <= 1e-5


def test_a_velocity_is_pure_and_leaves_the_stock_processors(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    stock = {name: type(processor) for name, processor in backbone.pipe.transformer.attn_processors.items()}
    cond = backbone.condition(REQUEST, PLAN, replace(config, mask=replace(config.mask, isolate=0.5)))
    velocity, x = backbone.velocity(cond), backbone.noise(cond)
    with torch.no_grad():
        forth = [velocity(x, sigma) for sigma in cond.sigmas[:-1]]
        back = [velocity(x, sigma) for sigma in cond.sigmas[:-1].flip(0)][::-1]
    assert all(torch.equal(one, other) for one, other in zip(forth, back, strict=True))
    assert {name: type(p) for name, p in backbone.pipe.transformer.attn_processors.items()} == stock


def test_every_hint_counts_and_gradients_flow(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    for number in range(2):
        regions = list(PLAN.regions)
        regions[number] = replace(regions[number], hint="the circle")
        other = replace(PLAN, regions=tuple(regions))
        one, two = (backbone.condition(REQUEST, plan, config) for plan in (PLAN, other))
        assert apart(at(backbone, one), at(backbone, two)) > 1e-4
    cond = backbone.condition(REQUEST, PLAN, config)
    x = backbone.noise(cond).requires_grad_()
    backbone.velocity(cond)(x, torch.tensor(0.7)).square().mean().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0


def test_noise_belongs_to_the_seed(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    before = torch.random.get_rng_state()
    cond = backbone.condition(REQUEST, PLAN, config)
    many = backbone.noise(replace(cond, seeds=(9, 4, 8)))
    assert torch.equal(many[1:2], backbone.noise(cond))
    assert torch.equal(many, backbone.noise(replace(cond, seeds=(9, 4, 8))))
    assert apart(many[0], many[1]) > 0.1
    sample(backbone.velocity(cond), backbone.noise(cond), cond.sigmas)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_batch_equals_single_runs(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    cond = backbone.condition(REQUEST, PLAN, config)
    batch = replace(cond, seeds=(4, 5, 6))
    together = sample(backbone.velocity(batch), backbone.noise(batch), batch.sigmas)
    for latent, seed in zip(together, batch.seeds, strict=True):
        single = replace(cond, seeds=(seed,))
        alone = sample(backbone.velocity(single), backbone.noise(single), single.sigmas)
        one, two = (np.asarray(backbone.decode(x, cond)).astype(int) for x in (latent[None], alone))
        assert np.abs(one - two).max() <= 1


def test_too_many_regions(flux: FluxKontext) -> None:
    regions = tuple(Region(Box(1, 1, 9, 9), "red") for _ in range(20))
    with pytest.raises(PlanError, match="at most 19"):
        flux.condition(REQUEST, replace(PLAN, regions=regions), FLUX)
    assert len(flux.condition(REQUEST, replace(PLAN, regions=regions[:19]), FLUX).layout.hints) == 19
