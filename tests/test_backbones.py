"""No regions: every backbone equals its stock pipeline bit for bit, whatever is loaded or hooked. And how they load."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

from replan.backbones import BACKBONES, default_config, find, load_backbone
from replan.backbones.base import EditConfig, schedule
from replan.backbones.flux_kontext import FluxKontext, frame
from replan.backbones.qwen_image_edit import QwenImageEdit, fitted, picture_processor
from replan.backbones.qwen_image_edit_plus import QwenImageEditPlus
from replan.backbones.runtime import Runtime
from replan.cli.options import Flags
from replan.config import load
from replan.denoise import sample
from replan.errors import BackboneError, ConfigError
from replan.rules import MaskConfig
from replan.types import EditRequest, Plan, Size

CPU = Runtime(device="cpu")
PROMPT = "make the red cup blue"
FLUX = EditConfig(
    steps=3, guidance=2.5, true_cfg=None, negative_prompt="keep it", max_area=48 * 32, auto_resize=False,
    max_sequence_length=16, hint_padding="tight", mask=MaskConfig(expand=0.0, isolate=0.5),
)  # fmt: skip
QWEN = replace(FLUX, true_cfg=4.0, negative_prompt=" ", max_area=64 * 64, max_sequence_length=1024)
CFG = [None, 4.0]


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def apart(one: Any, other: Any) -> float:
    """The largest difference; nan counts. `pytest -rP` shows it."""
    found = float((one.double() - other.double()).abs().max())
    print(f"largest difference: {found}")
    return found


def stock(kind: str, folder: Path, config: EditConfig, *, lora: Path | None = None, **arguments: Any) -> Any:
    """The latents of the stock pipeline's own __call__."""
    parts: dict[str, Any] = {"dtype": arguments.pop("dtype", torch.float32)}
    if kind != "FluxKontextPipeline" and not is_torchvision_available():
        parts["processor"] = picture_processor(str(folder))
    pipe = getattr(diffusers, kind).from_pretrained(folder, **parts)
    if lora is not None:
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    negative = config.negative_prompt if config.true_cfg else None
    return pipe(
        prompt=PROMPT, num_inference_steps=config.steps, true_cfg_scale=config.true_cfg or 1.0,
        negative_prompt=negative, generator=torch.Generator().manual_seed(5), output_type="latent", **arguments,
    ).images  # fmt: skip


def stock_flux(folder: Path, config: EditConfig, image: Image.Image, **extra: Any) -> Any:
    """With the frame of `config`: the reference is brought to it first, as ours is."""
    size = frame(Size(*image.size), config, 4)
    return stock(
        "FluxKontextPipeline", folder, config, image=image.resize(size, Image.Resampling.LANCZOS), width=size.width,
        height=size.height, max_area=size.width * size.height, _auto_resize=False, guidance_scale=config.guidance,
        max_sequence_length=config.max_sequence_length, **extra,
    )  # fmt: skip


def own(backbone: Any, config: EditConfig, images: list[Image.Image], plan: Plan | None = None) -> torch.Tensor:
    request = EditRequest(images[0], PROMPT, 5, extra_images=tuple(images[1:]))
    cond = backbone.condition(request, plan, config)
    return sample(backbone.velocity(cond), backbone.noise(cond), cond.sigmas)


@pytest.fixture
def small_qwen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock pipelines' fixed areas, made small enough for a test: 1024 x 1024 becomes 64 x 64."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    def small(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda area, ratio: original(64 * 64 if area == 1024 * 1024 else area, ratio)

    monkeypatch.setattr(edit, "calculate_dimensions", small(edit.calculate_dimensions))
    monkeypatch.setattr(plus, "calculate_dimensions", small(plus.calculate_dimensions))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 48 * 48)


@pytest.mark.parametrize("true_cfg", CFG)
@pytest.mark.parametrize("steps", [1, 3])
def test_flux_equals_stock(flux_folder: Path, true_cfg: float | None, steps: int) -> None:
    config = replace(FLUX, true_cfg=true_cfg, steps=steps)
    expected = stock_flux(flux_folder, config, picture())
    backbone = FluxKontext.load(str(flux_folder), CPU)
    assert apart(own(backbone, config, [picture()]), expected) == 0.0
    empty = Plan("", PROMPT, (), Size(48, 32))
    assert apart(own(backbone, config, [picture()], empty), expected) == 0.0


def test_flux_without_guidance_embedding_equals_stock(tmp_path: Path) -> None:
    folder = tiny.flux_kontext(tmp_path, guidance=False)
    expected = stock_flux(folder, FLUX, picture())
    assert apart(own(FluxKontext.load(str(folder), CPU), FLUX, [picture()]), expected) == 0.0


def test_flux_equals_stock_at_its_trained_sizes(tmp_path: Path) -> None:
    folder = tiny.flux_kontext(tmp_path, blocks=6)  # a token covers 64 pixels, so that a megapixel is few tokens
    config = replace(FLUX, auto_resize=True, steps=1)
    size = frame(Size(270, 200), config, 64)
    arguments = {"width": size.width, "height": size.height, "max_area": size.width * size.height}
    expected = stock(
        "FluxKontextPipeline", folder, config, image=picture(270, 200), guidance_scale=config.guidance,
        max_sequence_length=config.max_sequence_length, **arguments,
    )  # fmt: skip
    assert apart(own(FluxKontext.load(str(folder), CPU), config, [picture(270, 200)]), expected) == 0.0


@pytest.mark.usefixtures("small_qwen")
@pytest.mark.parametrize("true_cfg", CFG)
def test_qwen_equals_stock(qwen_folder: Path, true_cfg: float | None) -> None:
    config = replace(QWEN, true_cfg=true_cfg)
    expected = stock("QwenImageEditPipeline", qwen_folder, config, image=picture(90, 60))
    assert apart(own(QwenImageEdit.load(str(qwen_folder), CPU), config, [picture(90, 60)]), expected) == 0.0


def stock_plus(folder: Path, images: list[Image.Image], **extra: Any) -> Any:
    # the stock pipeline takes the last picture's aspect for the output, unless told otherwise
    width, height = fitted(images[0], QWEN.max_area)
    return stock("QwenImageEditPlusPipeline", folder, QWEN, image=images, width=width, height=height, **extra)


@pytest.mark.usefixtures("small_qwen")
@pytest.mark.parametrize("count", [1, 3])
def test_plus_equals_stock(plus_folder: Path, count: int) -> None:
    images = [picture(90, 60), picture(40, 60, 1), picture(50, 50, 2)][:count]
    backbone = QwenImageEditPlus.load(str(plus_folder), CPU)
    assert apart(own(backbone, QWEN, images), stock_plus(plus_folder, images)) == 0.0


@pytest.mark.usefixtures("small_qwen")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_equal_to_stock_in_half_precision(flux_folder: Path, qwen_folder: Path, dtype: str) -> None:
    runtime, kind = Runtime(device="cpu", dtype=dtype), getattr(torch, dtype)
    flux, qwen = FluxKontext.load(str(flux_folder), runtime), QwenImageEdit.load(str(qwen_folder), runtime)
    got = own(flux, FLUX, [picture()])
    assert got.dtype == kind
    assert apart(got, stock_flux(flux_folder, FLUX, picture(), dtype=kind)) == 0.0
    expected = stock("QwenImageEditPipeline", qwen_folder, QWEN, image=picture(), dtype=kind)
    assert apart(own(qwen, QWEN, [picture()]), expected) == 0.0


@pytest.mark.usefixtures("small_qwen")
@pytest.mark.parametrize("offload", ["none", "group"])
def test_equal_to_stock_with_a_lora_and_with_offload_hooks(
    flux_folder: Path, qwen_folder: Path, plus_folder: Path, tmp_path: Path, offload: str
) -> None:
    rows: list[tuple[Any, Path, EditConfig, list[Image.Image], Callable[..., Any]]] = [
        (FluxKontext, flux_folder, FLUX, [picture()], lambda lora: stock_flux(flux_folder, FLUX, picture(), lora=lora)),
        (
            QwenImageEdit, qwen_folder, QWEN, [picture()],
            lambda lora: stock("QwenImageEditPipeline", qwen_folder, QWEN, image=picture(), lora=lora),
        ),
        (
            QwenImageEditPlus, plus_folder, QWEN, [picture(), picture(30, 40)],
            lambda lora: stock_plus(plus_folder, [picture(), picture(30, 40)], lora=lora),
        ),
    ]  # fmt: skip
    for kind, folder, config, images, expect in rows:
        name = find(str(folder))[0].pipeline
        parts = {} if kind is FluxKontext else {"processor": None}
        lora = tiny.lora(tmp_path / f"{kind.__name__}{offload}", folder, getattr(diffusers, name), **parts)
        runtime = Runtime(device="cpu", offload=offload)
        plain, tuned = kind.load(str(folder), runtime), kind.load(str(folder), replace(runtime, lora=(str(lora),)))
        assert apart(own(plain, config, images), expect(None)) == 0.0
        assert apart(own(tuned, config, images), expect(lora)) == 0.0
        assert apart(own(plain, config, images), own(tuned, config, images)) > 1e-3


def test_loras_from_files_add_up(flux_folder: Path, tmp_path: Path) -> None:
    lora = tiny.lora(tmp_path / "lora", flux_folder, diffusers.FluxKontextPipeline)
    file = str(next(lora.glob("*.safetensors")))
    once = own(FluxKontext.load(str(flux_folder), replace(CPU, lora=(file,))), FLUX, [picture()])
    twice = own(FluxKontext.load(str(flux_folder), replace(CPU, lora=(file, str(lora)))), FLUX, [picture()])
    assert apart(once, own(FluxKontext.load(str(flux_folder), replace(CPU, lora=(str(lora),))), FLUX, [picture()])) == 0
    assert apart(once, twice) > 1e-3


@pytest.mark.parametrize(
    ("source", "flux", "qwen"),
    [
        ((640, 480), (1184, 880), (1184, 896)),
        ((719, 389), (1392, 752), (1408, 768)),
        ((1540, 600), (1568, 672), (1632, 640)),
        ((30_000, 1), (1568, 672), (177_376, 32)),
    ],
)
def test_working_sizes(source: tuple[int, int], flux: tuple[int, int], qwen: tuple[int, int]) -> None:
    config = replace(FLUX, auto_resize=True, max_area=1024 * 1024)
    assert frame(Size(*source), config, 16) == flux
    assert fitted(Size(*source), 1024 * 1024) == qwen
    assert min(frame(Size(*source), FLUX, 16)) >= 16


@pytest.mark.parametrize("row", BACKBONES, ids=lambda row: row.name)
def test_every_row_of_the_table(row: Any) -> None:
    assert isinstance(load(EditConfig, row.config), EditConfig)
    assert default_config(row.name) == load(EditConfig, row.config)
    assert hasattr(diffusers, row.pipeline)
    kind = getattr(importlib.import_module(f"replan.backbones.{row.module}"), row.kind)
    assert all(hasattr(kind, name) for name in ("load", "condition", "noise", "velocity", "decode"))
    assert find(row.name)[0] is row


def test_folders_are_known_by_their_class(flux_folder: Path, qwen_folder: Path) -> None:
    assert isinstance(load_backbone(str(flux_folder), CPU), FluxKontext)
    assert isinstance(load_backbone(str(qwen_folder), CPU), QwenImageEdit)
    assert find(str(flux_folder))[0].name == "flux-kontext"


def test_a_folder_names_its_settings(flux_folder: Path, tmp_path: Path) -> None:
    index, note = tmp_path / "model_index.json", tmp_path / "replan.yaml"
    index.write_text((flux_folder / "model_index.json").read_text())
    assert default_config(str(tmp_path)) == default_config("flux-kontext")
    note.write_text("config: edit/mini\n")
    assert default_config(str(tmp_path)) == default_config("mini")
    assert Flags(backbone=str(tmp_path), settings=("steps=3",)).setup().config == replace(
        default_config("mini"), steps=3
    )
    for text in ("config: ../secrets\n", "config: eval/bench\n", "steps: 9\n", "config: [edit/mini]\n"):
        note.write_text(text)
        with pytest.raises(ConfigError, match=r"replan\.yaml: must be one line, config: NAME, with one of edit/flux"):
            find(str(tmp_path))
    note.write_text("config: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        find(str(tmp_path))


def test_a_trained_mini_editor_goes_by_its_folder_alone(tmp_path: Path) -> None:
    """What `replan train mini-editor` saves, untrained, edits at the mini's size with the mini's settings."""
    from replan.mini.train_autoencoder import build_autoencoder
    from replan.mini.train_editor import Editor as MiniEditor
    from replan.mini.train_editor import all_texts, build_clip_tokenizer, build_t5_tokenizer, save_editor

    texts = all_texts(50)
    tokenizers = build_clip_tokenizer(texts), build_t5_tokenizer(texts)
    autoencoder = build_autoencoder()
    autoencoder.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    save_editor(MiniEditor(*map(len, tokenizers)), autoencoder, tokenizers, tmp_path / "editor")
    setup = Flags(backbone=str(tmp_path / "editor"), device="cpu").setup()
    assert setup.config == default_config("mini")
    edited = setup.open().baseline(EditRequest(picture(96, 96), "make it red"))
    assert edited.image.size == (96, 96)


def test_what_cannot_be_loaded_is_named(flux_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean flux-kontext"):
        find("flux-kontex")
    with pytest.raises(BackboneError, match="cannot be loaded"):
        find(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(BackboneError, match="is a StableDiffusionPipeline; replan can drive FluxKontextPipeline"):
        find(str(tmp_path))
    (tmp_path / "model_index.json").write_text((flux_folder / "model_index.json").read_text())
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(tmp_path), CPU)
    with pytest.raises(BackboneError, match="LoRA"):
        load_backbone(str(flux_folder), replace(CPU, lora=(str(tmp_path),)))
    for gone in (str(tmp_path / "no.safetensors"), "runs/no.safetensors", "nowhere", "./a/b"):
        with pytest.raises(ConfigError, match="there is no such file or folder"):
            load_backbone(str(flux_folder), replace(CPU, lora=(gone,)))


def test_without_the_hub_it_is_said_shortly(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = r"^model owner/none: is not on this machine, and the hub cannot be reached; name a folder"
    with pytest.raises(BackboneError, match=told):
        find("owner/none")
    with pytest.raises(BackboneError, match=r"^model black-forest.*hub cannot be reached"):
        load_backbone("flux-kontext", CPU)
    with pytest.raises(BackboneError, match=r"^LoRA owner/none: .*hub cannot be reached"):
        load_backbone(str(flux_folder), replace(CPU, lora=("owner/none",)))


def test_runtimes_that_cannot_be(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for field in ({"device": "gpu"}, {"dtype": "int8"}, {"offload": "disk"}, {"quantize": "int3"}, {"attention": "x"}):
        with pytest.raises(ConfigError, match="must be one of"):
            Runtime(**field)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="none; use auto or cpu"):
        Runtime(device="cuda").torch_device()
    for offload in ("model", "sequential"):
        with pytest.raises(ConfigError, match="needs an accelerator"):
            load_backbone(str(flux_folder), Runtime(device="cpu", offload=offload))
    found = importlib.util.find_spec
    missing = ("torchao", "bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else found(name, *a))
    with pytest.raises(ConfigError, match=r"pip install 'replan\[gpu\]'"):
        load_backbone(str(flux_folder), Runtime(device="cpu", quantize="int8"))
    for quantize in ("fp8", "nf4", "bnb-int8"):
        with pytest.raises(ConfigError, match="needs a CUDA device"):
            load_backbone(str(flux_folder), Runtime(device="cpu", quantize=quantize))


@pytest.mark.parametrize(
    "field",
    [
        {"steps": 0}, {"steps": True}, {"guidance": -1.0}, {"guidance": float("nan")}, {"true_cfg": float("inf")},
        {"max_area": 0}, {"max_sequence_length": 0}, {"hint_padding": "loose"},
    ],
)  # fmt: skip
def test_settings_out_of_range(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        replace(FLUX, **field)


def test_schedules_that_cannot_be(qwen_folder: Path) -> None:
    with pytest.raises(BackboneError, match="EulerDiscreteScheduler"):
        schedule(diffusers.EulerDiscreteScheduler(), 4, 64)
    with pytest.raises(ConfigError, match="too few"):
        own(QwenImageEdit.load(str(qwen_folder), CPU), replace(QWEN, steps=1, max_area=32 * 32), [picture()])


def test_limits_of_the_models(flux_folder: Path, qwen_folder: Path) -> None:
    flux, qwen = FluxKontext.load(str(flux_folder), CPU), QwenImageEdit.load(str(qwen_folder), CPU)
    with pytest.raises(ConfigError, match="at most 512"):
        own(flux, replace(FLUX, max_sequence_length=513), [picture()])
    for backbone, config in ((flux, FLUX), (qwen, QWEN)):
        with pytest.raises(ConfigError, match="qwen-image-edit-plus for several"):
            own(backbone, config, [picture(), picture()])
    with pytest.raises(ConfigError, match="64 bits"):
        flux.noise(replace(flux.condition(EditRequest(picture(), PROMPT), None, FLUX), seeds=(2**64,)))
