"""The shortcuts of training equal what runs at edit time, and a run goes on where it was stopped."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn

from replan.mini.instructions import random_item
from replan.mini.pool import CHANNELS, EDITS, all_texts, encode_pool, pack, pool_edit
from replan.mini.scenes import SIZE, draw, random_scene
from replan.mini.train_autoencoder import refine_decoder
from replan.mini.train_editor import build_clip_tokenizer, build_t5_tokenizer, image_ids, train_editor
from replan.mini.train_planner import Conversations, answer, patches, train_planner, train_tokenizer
from replan.mini.training import TrainConfig, fit
from replan.plan import parse


def test_patches_equal_the_image_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = SIZE.width * SIZE.height
    processor = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    pictures = [draw(random_scene(random.Random(seed))) for seed in range(2)]
    expected = processor(images=pictures, return_tensors="pt")
    ours = patches(np.stack([np.asarray(picture) for picture in pictures]))
    assert expected["image_grid_thw"].tolist() == [[1, 12, 12]] * 2
    assert torch.allclose(ours, expected["pixel_values"], atol=1e-5)


def test_packing_equals_the_stock_pipeline():
    from diffusers import FluxKontextPipeline

    latents = torch.randn(2, CHANNELS, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(latents), FluxKontextPipeline._pack_latents(latents, 2, CHANNELS, 12, 12))
    ids = FluxKontextPipeline._prepare_latent_image_ids(2, 6, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(0), ids)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_answers_survive_the_tokenizer_and_the_parser(tokenizer):
    for seed in range(100):
        item = random_item(random.Random(seed))
        text = answer(item.plan)
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
        assert parse(text, SIZE) == item.plan


def test_only_answers_are_learnt(tokenizer):
    items = [random_item(random.Random(seed)) for seed in range(3)]
    ids, labels, weights = Conversations(tokenizer).pack([(item.instruction, answer(item.plan)) for item in items])
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert learnt == [label for label in labels if label != -100]
    assert [weight > 0 for weight in weights] == [label != -100 for label in labels]
    expected = "".join(answer(item.plan) + "<|im_end|>" for item in items)
    assert tokenizer.decode(learnt, skip_special_tokens=False) == expected


def test_words_of_the_world_are_single_pieces():
    texts = all_texts(500)
    t5, clip = build_t5_tokenizer(texts), build_clip_tokenizer(texts)
    assert t5.tokenize("make this red") == ["▁make", "▁this", "▁red"]
    assert clip.tokenize("make this red") == ["make</w>", "this</w>", "red</w>"]
    assert t5.unk_token_id not in t5("a zebra, please!").input_ids


def test_the_pool_is_a_pure_function():
    assert all(pool_edit(5, edit) == pool_edit(5, edit) for edit in range(EDITS))
    assert pool_edit(5, 0).scene == pool_edit(5, 1).scene


def _fit(folder: Path, minutes: float) -> tuple[nn.Module, list[int]]:
    torch.manual_seed(0)
    model, steps = nn.Linear(2, 1), []

    def loss_at(step: int) -> torch.Tensor:
        steps.append(step)
        return model(torch.ones(1, 2)).square().sum()

    fit(model, loss_at, TrainConfig(minutes, save_every=10, warmup=1), folder)
    return model, steps


def test_a_run_goes_on_where_it_stopped(tmp_path: Path):
    _, first = _fit(tmp_path, 0.003)
    model, second = _fit(tmp_path, 0.006)
    assert first == list(range(len(first)))
    assert second[0] == len(first)
    assert float(model(torch.ones(1, 2)).detach().abs()) < 0.5


WEIGHTS = Path(__file__).parents[2] / "replan" / "mini" / "weights"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.parent.name}/{name}": value for name, value in load_file(file).items()}
    return found


@pytest.mark.parametrize("model", ["planner", "editor"])
def test_training_can_begin_with_a_finished_model(model: str, tmp_path: Path):
    """No minutes, no steps: what comes out is what went in, in the same format, in a folder that was not there."""
    folder = tmp_path / "run"
    if model == "planner":
        train_planner(folder, TrainConfig(0), WEIGHTS / model)
    else:
        train_editor(folder, TrainConfig(0), scenes=2, start=WEIGHTS / model)
    before, after = _weights(WEIGHTS / model), _weights(folder / model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_seed_meets_other_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    met: list[range] = []
    monkeypatch.setattr(Conversations, "batch", lambda self, seeds: met.append(seeds) or _stop())
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            train_planner(tmp_path, TrainConfig(1, batch=4, seed=seed), WEIGHTS / "planner")
    assert [len(seeds) for seeds in met] == [4, 4]
    assert not set(met[0]) & set(met[1])


def _stop() -> None:
    raise KeyboardInterrupt


def test_refining_the_decoder_leaves_the_latents_alone(tmp_path: Path):
    """A few steps: the encoder and the latents' scale are as before, the decoder is not."""
    refine_decoder(WEIGHTS / "editor" / "vae", tmp_path, TrainConfig(1e-3, batch=1, warmup=1, lr=1e-2, ema=0.0))
    before, after = _weights(WEIGHTS / "editor" / "vae"), _weights(tmp_path / "vae")
    same = {name: torch.allclose(before[name].float(), after[name].float(), atol=1e-6) for name in before}
    assert all(kept for name, kept in same.items() if "encoder" in name)
    assert not all(kept for name, kept in same.items() if "decoder" in name)
    scales = [AutoencoderKL.from_pretrained(found).config for found in (WEIGHTS / "editor" / "vae", tmp_path / "vae")]
    assert scales[0]["scaling_factor"] == scales[1]["scaling_factor"]


def test_a_pool_of_another_autoencoder_or_size_is_made_anew(tmp_path: Path):
    file = tmp_path / "pool" / "latents.safetensors"
    calls = []

    def coder(gain: float):
        def encode(images: torch.Tensor) -> torch.Tensor:
            calls.append(gain)
            return gain * torch.nn.functional.interpolate(images, scale_factor=1 / 8).repeat(1, 6, 1, 1)[:, :16]

        return encode

    first = encode_pool(coder(1.0), 3, file)[0]
    calls.clear()
    assert torch.equal(encode_pool(coder(1.0), 3, file)[0], first)
    assert len(calls) == 3  # looked at, not made
    assert torch.allclose(encode_pool(coder(2.0), 3, file)[0], 2 * first)
    assert len(encode_pool(coder(2.0), 4, file)[0]) == 4
