"""Steps that reuse earlier ones equal full steps where they must, and nothing is reused where it must not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from replan.backbones.base import EditConfig, usable
from replan.backbones.flux_kontext import FluxKontext
from replan.backbones.qwen_image_edit import QwenImageEdit
from replan.backbones.qwen_image_edit_plus import QwenImageEditPlus
from replan.backbones.runtime import Runtime
from replan.config import load
from replan.denoise import sample
from replan.errors import BackboneError, ConfigError
from replan.speed import EXACT, SpeedConfig, load_speed
from replan.types import Box, EditRequest, Grid, Plan, Region, Size

CPU = Runtime(device="cpu")
FLUX = load(
    EditConfig, "edit/flux_kontext",
    ["steps=6", "max_area=1536", "auto_resize=false", "max_sequence_length=24", "speed=exact"],
)  # fmt: skip
QWEN = load(EditConfig, "edit/qwen_image_edit", ["steps=6", "max_area=4096", "speed=exact"])
REGIONS = (Region(Box(4, 4, 20, 20), "make the red cup blue"), Region(Box(14, 10, 26, 24), "keep it"))
PLAN = Plan("", "keep the image unchanged", REGIONS, Size(48, 32))
REFERENCE = SpeedConfig("reference", isolate_reference=True)
BACKGROUND = SpeedConfig("background", isolate_reference=True, halo=1)
HIGH, LOW = torch.tensor(0.9), torch.tensor(0.3)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8))


REQUEST = EditRequest(picture(), "x", 4)


@pytest.fixture(scope="module")
def flux(flux_folder: Path) -> FluxKontext:
    return FluxKontext.load(str(flux_folder), CPU)


@pytest.fixture(scope="module")
def qwen(qwen_folder: Path) -> QwenImageEdit:
    return QwenImageEdit.load(str(qwen_folder), CPU)


@pytest.fixture(params=["flux", "flux guided", "qwen", "qwen unguided"])
def either(request: pytest.FixtureRequest) -> tuple[Any, EditConfig]:
    name, _, how = request.param.partition(" ")
    config = FLUX if name == "flux" else QWEN
    config = replace(config, true_cfg=3.0) if how == "guided" else config
    return request.getfixturevalue(name), replace(config, true_cfg=None) if how == "unguided" else config


def with_speed(backbone: Any, config: EditConfig, speed: SpeedConfig, plan: Plan = PLAN) -> Any:
    return backbone.condition(REQUEST, plan, replace(config, speed=speed))


def noise(backbone: Any, cond: Any, seed: int = 0) -> torch.Tensor:
    shape = backbone.noise(cond).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("executor", "isolate"), [("dense", False), ("cascade", True), ("flex", False)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_reuse_within_one_noise_level_changes_nothing(
    either: tuple[Any, EditConfig], executor: str, isolate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, config = either
    monkeypatch.setattr(backbone, "attention", executor)
    cond = with_speed(backbone, config, replace(BACKGROUND, isolate_reference=isolate))
    x, velocity = noise(backbone, cond), backbone.velocity(cond)
    full = velocity.step(x, LOW, "full")
    assert velocity.executors == {executor}
    assert apart(velocity.step(x, LOW, "cached"), full) <= 1e-6
    assert apart(velocity.step(x, LOW, "region"), full) <= 1e-6
    exact = backbone.velocity(with_speed(backbone, config, EXACT))
    if not isolate:  # the same rules: only the background's own path differs
        inside = _inside(cond)
        assert apart(full[:, inside], exact(x, LOW)[:, inside]) <= 1e-6


def _inside(cond: Any) -> torch.Tensor:
    """The noise tokens of the regions and their halo, found by hand [P]."""
    grid = cond.layout.noise
    expand = (FLUX if grid == Grid(12, 8) else QWEN).mask.expand
    inside = torch.zeros(grid.rows, grid.columns, dtype=torch.bool)
    for region in REGIONS:
        part = region.box.expand(expand, PLAN.size)
        cells = part.cells(Size(48, 32), grid)
        inside[max(cells.top - 1, 0) : cells.bottom + 1, max(cells.left - 1, 0) : cells.right + 1] = True
    return inside.flatten()


@torch.no_grad()
def test_the_regions_and_their_halo_are_queried(flux: FluxKontext) -> None:
    cond = with_speed(flux, FLUX, BACKGROUND)
    velocity = flux.velocity(cond)
    inside = _inside(cond)
    assert velocity.active == int(inside.sum()) < cond.layout.noise.columns * cond.layout.noise.rows
    x = noise(flux, cond)
    path = (x - cond.tensors["reference"]) / LOW
    off = (velocity.step(x, LOW, "full") - path).abs().amax(dim=(0, 2)) > 1e-5
    assert torch.equal(off, inside)


@torch.no_grad()
def test_reference_cache_is_exact_on_2511_only(plus_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", 48 * 48)
    plus = QwenImageEditPlus.load(str(plus_folder), CPU)
    newer = bool(plus.pipe.transformer.config.zero_cond_t)
    for isolate in (True, False):
        cond = with_speed(plus, QWEN, replace(REFERENCE, isolate_reference=isolate))
        velocity, fresh = plus.velocity(cond), plus.velocity(cond)
        x = noise(plus, cond)
        velocity.step(noise(plus, cond, 1), HIGH, "full")  # another noise level and other noise
        difference = apart(velocity.step(x, LOW, "cached"), fresh.step(x, LOW, "full"))
        assert difference <= 1e-6 if newer and isolate else difference > 1e-5
        assert velocity.kinds.count("full") == 1
    refreshing = replace(REFERENCE, warmup_steps=2, refresh_interval=2)
    kinds = "".join(kind[0] for kind in plus.velocity(with_speed(plus, QWEN, refreshing)).kinds)
    assert kinds == ("fccccc" if newer else "ffcfcf")


@torch.no_grad()
def test_one_reference_cache_serves_both_branches_of_2511(plus_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", 48 * 48)
    plus = QwenImageEditPlus.load(str(plus_folder), CPU)
    lengths: list[int] = []
    hook = plus.pipe.transformer.img_in.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    cond = with_speed(plus, QWEN, REFERENCE)
    tokens = cond.layout.noise.columns * cond.layout.noise.rows
    plus.velocity(cond)(noise(plus, cond), cond.sigmas[0])
    hook.remove()
    assert lengths == ([2 * tokens, tokens] if plus.pipe.transformer.config.zero_cond_t else [2 * tokens, 2 * tokens])


def test_what_lies_outside_ends_at_the_reference(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    speed = replace(BACKGROUND, warmup_steps=2, final_steps=1)
    cond = with_speed(backbone, config, speed)
    velocity = backbone.velocity(cond)
    latent = sample(velocity, backbone.noise(cond), cond.sigmas)
    assert [kind[0] for kind in velocity.taken] == list("ffrrrf")
    inside, source = _inside(cond), cond.tensors["reference"]
    assert (latent - source)[:, ~inside].abs().max() <= 1e-5
    assert (latent - source)[:, inside].abs().max() > 1e-2
    pasted = torch.where(inside[None, :, None], latent, source)  # the round trip, but for the regions
    edited, expected, untouched = (np.asarray(backbone.decode(each, cond), float) for each in (latent, pasted, source))
    assert np.abs(edited - expected).max() <= 1
    assert np.abs(edited - untouched).max() > 1


@pytest.mark.parametrize("preset", ["cached", "fast"])
def test_presets_isolate_the_reference_only_where_that_is_exact(
    plus_folder: Path, flux: FluxKontext, preset: str
) -> None:
    speed = load_speed(preset)
    assert with_speed(flux, FLUX, speed).speed == replace(speed, isolate_reference=False)
    transformer = QwenImageEditPlus.load(str(plus_folder), CPU).pipe.transformer
    layout = with_speed(flux, FLUX, speed).layout
    assert usable(speed, PLAN, layout, transformer)[0].isolate_reference == transformer.config.zero_cond_t


def test_without_regions_nothing_is_reused(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    bare = Plan("", "keep the image unchanged", (), Size(48, 32))
    for speed in (REFERENCE, BACKGROUND):
        cond, plain = with_speed(backbone, config, speed, bare), with_speed(backbone, config, EXACT, bare)
        freed = speed is BACKGROUND  # the picture is another one than asked for; else only the time is
        assert [("the plan has no regions" in note) for note in cond.notes] == [True] * freed
        assert plain.notes == ()
        assert cond.speed == EXACT
        got, expected = (sample(backbone.velocity(each), backbone.noise(each), each.sigmas) for each in (cond, plain))
        assert torch.equal(got, expected)
    stock = backbone.condition(REQUEST, None, replace(config, speed=BACKGROUND))
    assert (stock.speed, stock.notes) == (EXACT, ())


def test_candidates_equal_their_single_runs(either: tuple[Any, EditConfig]) -> None:
    backbone, config = either
    for speed in (replace(REFERENCE, isolate_reference=False), REFERENCE, replace(BACKGROUND, refresh_interval=3)):
        cond = with_speed(backbone, config, speed)
        both = replace(cond, seeds=(4, 9))
        together = sample(backbone.velocity(both), backbone.noise(both), cond.sigmas)
        for number, seed in enumerate(both.seeds):
            one = replace(cond, seeds=(seed,))
            alone = sample(backbone.velocity(one), backbone.noise(one), cond.sigmas)
            assert apart(together[number : number + 1], alone) <= 1e-4


@torch.no_grad()
def test_no_step_rests_on_another_runs_state(flux: FluxKontext) -> None:
    cond = with_speed(flux, FLUX, BACKGROUND)
    velocity = flux.velocity(cond)
    x, y = noise(flux, cond), noise(flux, cond, 1)
    sigmas = cond.sigmas

    def fresh(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return flux.velocity(cond).step(x, sigma, "full")

    velocity(x, sigmas[0])
    velocity(x, sigmas[1])
    assert velocity.taken == ["full", "region"]
    assert torch.equal(velocity(y, sigmas[3]), fresh(y, sigmas[3]))  # a step was left out
    assert torch.equal(velocity(y, torch.tensor(0.123)), fresh(y, torch.tensor(0.123)))  # no step of this run
    assert torch.equal(velocity(y, sigmas[0]), fresh(y, sigmas[0]))  # a new run
    both = torch.cat([x, y])
    assert torch.equal(velocity(both, sigmas[1]), fresh(both, sigmas[1]))  # another batch
    sample(velocity, x, sigmas)
    assert velocity.taken == ["full"] + ["region"] * 5


def test_gradients_are_those_of_full_steps(flux: FluxKontext) -> None:
    cond = with_speed(flux, FLUX, BACKGROUND)
    velocity, grads = flux.velocity(cond), []
    with torch.no_grad():
        velocity(noise(flux, cond), cond.sigmas[0])
    for each in (velocity, flux.velocity(cond)):
        x = noise(flux, cond).requires_grad_()
        v = each(x, cond.sigmas[1])
        grads.append(torch.autograd.grad(v.square().sum(), x)[0])
    assert velocity.taken == ["full", "full"]
    assert torch.equal(*grads)
    assert torch.isfinite(grads[0]).all()


@torch.no_grad()
def test_steps_that_cannot_be(flux: FluxKontext) -> None:
    cond = with_speed(flux, FLUX, REFERENCE)
    x = noise(flux, cond)
    with pytest.raises(BackboneError, match="take a full step first"):
        flux.velocity(cond).step(x, LOW, "cached")
    with pytest.raises(ConfigError, match="= reference only full, cached"):
        flux.velocity(cond).step(x, LOW, "region")
    outside = Plan("", "x", (Region(Box(4, 4, 5, 5), "keep it"),), Size(48, 32))
    assert flux.velocity(with_speed(flux, FLUX, BACKGROUND, outside)).active == 9  # one token and its halo


@torch.no_grad()
def test_stock_processors_are_back_after_every_kind_of_step(
    either: tuple[Any, EditConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, config = either
    monkeypatch.setattr(backbone, "attention", "cascade")
    before = list(backbone.pipe.transformer.attn_processors.values())
    velocity = backbone.velocity(with_speed(backbone, config, BACKGROUND))
    x = noise(backbone, with_speed(backbone, config, BACKGROUND))
    for kind in ("full", "cached", "region"):
        velocity.step(x, LOW, kind)
        after = list(backbone.pipe.transformer.attn_processors.values())
        assert all(one is other for one, other in zip(before, after, strict=True))
    layout = with_speed(backbone, config, BACKGROUND).layout
    assert velocity.plan_bytes == 4 * layout.length  # an int32 per token; 35 KiB for a megapixel
