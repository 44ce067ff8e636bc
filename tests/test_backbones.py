"""No regions: every backbone equals its stock pipeline bit for bit. With regions: masks, hints, candidates, sizes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from replan.backbones.base import EditConfig
from replan.backbones.flux_kontext import FluxKontext
from replan.backbones.qwen_image_edit import QwenImageEdit, fitted, picture_processor
from replan.backbones.qwen_image_edit_plus import QwenImageEditPlus
from replan.backbones.runtime import Runtime
from replan.denoise import sample
from replan.rules import MaskConfig
from replan.types import EditRequest

FLUX = EditConfig(
    steps=3, guidance=2.5, true_cfg=None, negative_prompt="", max_area=48 * 32, auto_resize=False,
    max_sequence_length=16, hint_padding="tight", mask=MaskConfig(expand=0.0, isolate=0.5),
)  # fmt: skip


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def apart(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)).max())


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.flux_kontext(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def flux_lora(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path) -> Path:
    from diffusers import FluxKontextPipeline

    return tiny.lora(tmp_path_factory.mktemp("lora"), flux_folder, FluxKontextPipeline)


def stock_flux(folder: Path, image: Image.Image, config: EditConfig, seed: int, **extra: Any) -> Any:
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline.from_pretrained(folder)
    if lora := extra.pop("lora", None):
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    width, height = image.size
    return pipe(
        image=image, prompt="make the red cup blue", num_inference_steps=config.steps, guidance_scale=config.guidance,
        true_cfg_scale=config.true_cfg or 1.0, negative_prompt=config.negative_prompt if config.true_cfg else None,
        width=width, height=height, max_area=width * height, _auto_resize=False, output_type="latent",
        max_sequence_length=config.max_sequence_length, generator=torch.Generator().manual_seed(seed), **extra,
    ).images  # fmt: skip


def own(backbone: Any, config: EditConfig, image: Image.Image, seed: int) -> torch.Tensor:
    request = EditRequest(image, "make the red cup blue", seed)
    cond = backbone.condition(request, None, config)
    return sample(backbone.velocity(cond), backbone.noise(cond), cond.sigmas)


@pytest.mark.parametrize("true_cfg", [None, 3.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_flux_equals_stock(flux_folder: Path, true_cfg: float | None, steps: int) -> None:
    config = replace(FLUX, true_cfg=true_cfg, negative_prompt="keep it", steps=steps)
    expected = stock_flux(flux_folder, picture(), config, seed=5)
    backbone = FluxKontext.load(str(flux_folder), Runtime(device="cpu"))
    assert apart(own(backbone, config, picture(), 5), expected) == 0.0


QWEN = EditConfig(
    steps=3, guidance=1.0, true_cfg=4.0, negative_prompt=" ", max_area=64 * 64, auto_resize=False,
    max_sequence_length=1024, hint_padding="tight", mask=MaskConfig(expand=0.0, isolate=0.5),
)  # fmt: skip


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import QwenImageEditPipeline

    return tiny.qwen_image_edit(tmp_path_factory.mktemp("qwen"), QwenImageEditPipeline)


@pytest.fixture(scope="session", params=[False, True], ids=["2509", "2511"])
def plus_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    from diffusers import QwenImageEditPlusPipeline

    return tiny.qwen_image_edit(tmp_path_factory.mktemp("plus"), QwenImageEditPlusPipeline, zero_cond_t=request.param)


@pytest.fixture
def small_qwen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock pipelines' fixed areas, made small enough for a test: 1024 x 1024 becomes 64 x 64."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    def small(original: Any) -> Any:
        return lambda area, ratio: original(64 * 64 if area == 1024 * 1024 else area, ratio)

    monkeypatch.setattr(edit, "calculate_dimensions", small(edit.calculate_dimensions))
    monkeypatch.setattr(plus, "calculate_dimensions", small(plus.calculate_dimensions))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 48 * 48)


def stock_qwen(kind: str, folder: Path, images: Any, config: EditConfig, seed: int, **extra: Any) -> Any:
    import diffusers

    parts = {} if has_torchvision() else {"processor": picture_processor(str(folder))}
    pipe = getattr(diffusers, kind).from_pretrained(folder, **parts)
    if lora := extra.pop("lora", None):
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        image=images, prompt="make the red cup blue", num_inference_steps=config.steps,
        true_cfg_scale=config.true_cfg or 1.0, negative_prompt=config.negative_prompt if config.true_cfg else None,
        generator=torch.Generator().manual_seed(seed), output_type="latent", **extra,
    ).images  # fmt: skip


@pytest.mark.usefixtures("small_qwen")
@pytest.mark.parametrize("true_cfg", [None, 4.0])
def test_qwen_equals_stock(qwen_folder: Path, true_cfg: float | None) -> None:
    config = replace(QWEN, true_cfg=true_cfg)
    expected = stock_qwen("QwenImageEditPipeline", qwen_folder, picture(90, 60), config, seed=5)
    backbone = QwenImageEdit.load(str(qwen_folder), Runtime(device="cpu"))
    assert apart(own(backbone, config, picture(90, 60), 5), expected) == 0.0


@pytest.mark.usefixtures("small_qwen")
@pytest.mark.parametrize("extra", [0, 2])
def test_plus_equals_stock(plus_folder: Path, extra: int) -> None:
    images = [picture(90, 60), picture(40, 60, 1), picture(50, 50, 2)][: 1 + extra]
    backbone = QwenImageEditPlus.load(str(plus_folder), Runtime(device="cpu"))
    request = EditRequest(images[0], "make the red cup blue", 5, extra_images=tuple(images[1:]))
    cond = backbone.condition(request, None, QWEN)
    got = sample(backbone.velocity(cond), backbone.noise(cond), cond.sigmas)
    # the stock pipeline takes the last picture's aspect for the output, unless told otherwise
    width, height = fitted(images[0], QWEN.max_area)
    size = {"width": width, "height": height}
    expected = stock_qwen("QwenImageEditPlusPipeline", plus_folder, images, QWEN, 5, **size)
    assert apart(got, expected) == 0.0
