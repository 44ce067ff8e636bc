"""The second mini editor: training's shortcuts equal what runs at edit time; a short run saves a folder that edits."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
from PIL import Image
from typer.testing import CliRunner

from replan import EditRequest, config
from replan.backbones import EditConfig
from replan.backbones.qwen_image_edit import QwenImageEdit
from replan.backbones.runtime import Runtime
from replan.cli import app
from replan.denoise import sample
from replan.mini.pool import KEEP_PROMPTS, all_texts, pack
from replan.mini.scenes import SIZE, draw, random_scene
from replan.mini.train_qwen_autoencoder import (
    CHANNELS,
    build_autoencoder,
    decode,
    encode,
    refine_decoder,
    single_frame,
)
from replan.mini.train_qwen_editor import NO_PROMPT, Editor, PromptReader, build_tokenizer, save_editor, template
from replan.mini.training import TrainConfig
from replan.plan import Plan
from replan.types import Box, Region

PROMPTS = ["make this red", "Please, replace the left cup with a zebra.", NO_PROMPT, KEEP_PROMPTS[0]]


def pictures(count: int) -> list[Image.Image]:
    return [draw(random_scene(random.Random(seed))) for seed in range(count)]


def pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Random where training starts from zeros, so that nothing is equal for want of a signal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKLQwenImage:
    model = build_autoencoder()
    shaken(model)
    model.register_to_config(
        latents_mean=torch.linspace(-0.5, 0.5, CHANNELS).tolist(),
        latents_std=torch.linspace(0.5, 1.5, CHANNELS).tolist(),
    )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, autoencoder: AutoencoderKLQwenImage) -> Path:
    """An untrained editor, saved."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(all_texts(300))
    editor = Editor(tokenizer)
    shaken(editor)
    where = tmp_path_factory.mktemp("qwen") / "editor"
    save_editor(editor, autoencoder, tokenizer, where)
    return where


@pytest.fixture(scope="module")
def backbone(folder: Path) -> QwenImageEdit:
    return QwenImageEdit.load(str(folder), Runtime(device="cpu", dtype="float32"))


def test_one_frame_gives_what_the_video_model_gives(autoencoder: AutoencoderKLQwenImage):
    images = pixels(pictures(2))
    with torch.no_grad():
        slow = autoencoder.encode(images[:, :, None], return_dict=False)[0].mode()
        shown = autoencoder.decode(slow, return_dict=False)[0][:, :, 0]
        with single_frame(autoencoder):
            fast = encode(autoencoder, images)
            assert torch.allclose(fast, slow[:, :, 0], atol=1e-5)
            assert torch.allclose(decode(autoencoder, fast).clamp(-1, 1), shown, atol=1e-4)
    assert "forward" not in vars(autoencoder.quant_conv)


def test_kernels_that_a_picture_never_meets_stay_zero():
    model = build_autoencoder()
    assert not model.encoder.conv_in.weight[:, :, :-1].any()
    with single_frame(model):
        decode(model, encode(model, pixels(pictures(1)))).sum().backward()
    gradient = model.encoder.conv_in.weight.grad
    assert gradient is not None
    assert not gradient[:, :, :-1].any()
    assert gradient[:, :, -1].any()


def test_refining_the_decoder_leaves_the_latents_alone(tmp_path: Path, autoencoder: AutoencoderKLQwenImage):
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    refine_decoder(copy.deepcopy(autoencoder), tmp_path, TrainConfig(1e-3, batch=1, warmup=1, lr=1e-2, ema=0.0))
    after = AutoencoderKLQwenImage.from_pretrained(tmp_path / "vae")
    changed = {name.split(".")[0] for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert after.config["latents_std"] == autoencoder.config["latents_std"]


def test_prompts_are_read_as_the_stock_pipeline_reads_them(backbone: QwenImageEdit):
    pipe, images = backbone.pipe, pictures(len(PROMPTS))
    with torch.no_grad():
        fast, real = PromptReader(pipe.text_encoder, pipe.tokenizer)(PROMPTS, np.stack([np.asarray(i) for i in images]))
        for prompt, image, states, known in zip(PROMPTS, images, fast, real, strict=True):
            slow, _ = pipe.encode_prompt(prompt, image=image)
            assert int(known.sum()) == slow.shape[1]
            assert torch.allclose(states[known], slow[0], atol=1e-4), prompt
    assert fast.std() > 0.1
    assert not torch.allclose(fast[0, :12], fast[3, :12], atol=1e-2)  # the pictures differ, and that is seen


def test_the_pipeline_cuts_the_head_where_the_picture_begins(backbone: QwenImageEdit):
    text, drop = template()
    ids = backbone.pipe.tokenizer(text).input_ids
    assert backbone.pipe.tokenizer.convert_ids_to_tokens(ids[drop]) == "<|vision_start|>"
    assert backbone.pipe.tokenizer.tokenize("make this red") == ["make", "\u0120this", "\u0120red"]


def test_tokens_of_a_picture_are_those_of_the_stock_pipeline(
    backbone: QwenImageEdit, autoencoder: AutoencoderKLQwenImage
):
    settings = config.load(EditConfig, "edit/mini_qwen")
    image = pictures(1)[0]
    cond = backbone.condition(EditRequest(image, "make this red"), None, settings)
    mean, std = (torch.tensor(autoencoder.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad(), single_frame(autoencoder):
        ours = pack((encode(autoencoder, pixels([image])) - mean) / std)
    assert torch.allclose(cond.tensors["reference"], ours, atol=0.02)  # the saved weights have 16 bits
    assert cond.negative is not None
    assert settings.negative_prompt == NO_PROMPT


def test_an_untrained_editor_edits_with_regions(backbone: QwenImageEdit):
    plan = Plan("", "keep the rest unchanged", (Region(Box(32, 32, 64, 64), "make this red"),), SIZE)
    request = EditRequest(pictures(1)[0], "make the cup red")
    settings = config.load(EditConfig, "edit/mini_qwen", ["steps=2"])
    results = []
    for given in (plan, None):
        cond = backbone.condition(request, given, settings)
        assert bool(cond.masks) == (given is not None)
        latent = sample(backbone.velocity(cond), backbone.noise(cond), cond.sigmas)
        results.append(backbone.decode(latent, cond))
    assert [result.size for result in results] == [tuple(SIZE)] * 2
    assert results[0].tobytes() != results[1].tobytes()


def test_the_folder_is_a_stock_one(folder: Path, backbone: QwenImageEdit):
    assert isinstance(backbone.pipe, QwenImageEditPipeline)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        *("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
    }


def test_the_command_trains_goes_on_and_its_folder_edits(tmp_path: Path, backbone: QwenImageEdit):
    run, picture, result = tmp_path / "run", tmp_path / "in.png", tmp_path / "out.png"
    backbone.pipe.tokenizer.save_pretrained(run / "tokenizer")  # making one takes longer than all the rest
    pictures(1)[0].save(picture)
    train = ["train", "mini-editor", str(run), "--family", "qwen", "--scenes", "3", "--batch", "2"]
    steps, spent = [], 0.0
    for _ in range(2):
        budget = str(spent / 60 + 1e-6)  # one more step
        done = CliRunner().invoke(app, [*train, "--minutes", budget, "--vae-minutes", "1e-6", "--evaluate", "2"])
        assert done.exit_code == 0, done.output
        assert "the editor's own rules" in done.stderr
        assert done.stdout.split()[-1] == str(run / "editor")
        state = torch.load(run / "editor-run" / "state.pt", weights_only=True)
        steps.append(state["step"])
        spent = state["spent"]
    assert steps == [1, 2]
    plan = tmp_path / "plan.json"
    plan.write_text(
        '{"prompt": "keep the rest unchanged", "size": [96, 96],'
        ' "regions": [{"box": [32, 32, 64, 64], "hint": "make this red"}]}'
    )
    edit = ["edit", str(picture), "--plan", str(plan), "-o", str(result), "--steps", "2"]
    done = CliRunner().invoke(app, [*edit, "--backbone", str(run / "editor")])
    assert done.exit_code == 0, done.output
    assert Image.open(result).size == tuple(SIZE)
