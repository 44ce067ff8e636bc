"""The ways to edit that the benchmark compares, with tiny weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import picture
from planner_server import Answer, serve

from replan import config
from replan.backbones.instruct_pix2pix import InstructPix2Pix
from replan.backbones.runtime import Runtime
from replan.errors import BackboneError, PlannerError
from replan.eval import methods, rephrase
from replan.eval.data import DataConfig, load_bench
from replan.eval.generate import generate, read_done
from replan.eval.rephrase import load_rewriter, read_rewrite
from replan.types import EditRequest


@pytest.fixture(scope="module")
def pix2pix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionInstructPix2PixPipeline with random weights."""
    import tiny
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("pix2pix")
    tokenizer = tiny._clip_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=32, in_channels=8, out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=2,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=24, attention_head_dim=4,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=24, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
    StableDiffusionInstructPix2PixPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_instruct_pix2pix_edits_at_the_sources_size_by_the_items_seed(pix2pix: Path) -> None:
    settings = methods.Pix2PixConfig(steps=2, max_area=64 * 64)
    edit = InstructPix2Pix(str(pix2pix), settings, Runtime(device="cpu"))
    request = EditRequest(picture(90, 50), "make it red", 3)
    first, again = edit(request), edit(request)
    assert first.image.size == (90, 50)
    assert first.plan is None
    assert first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != edit(EditRequest(request.image, "make it red", 4)).image.tobytes()
    assert first.image.tobytes() != edit(EditRequest(request.image, "a blue cup", 3)).image.tobytes()
    with pytest.raises(BackboneError, match="cannot be loaded"):
        InstructPix2Pix(str(pix2pix / "none"), settings, Runtime(device="cpu"))(request)


@pytest.mark.parametrize("method", ["replan", "baseline", "instruct-pix2pix"])
def test_a_run_of_each_method(method: str, flux_folder: Path, pix2pix: Path, tmp_path: Path) -> None:
    backbone = pix2pix if method == "instruct-pix2pix" else flux_folder
    settings: dict[str, Any] = {"output": str(tmp_path), "method": method, "backbone": str(backbone)}
    settings |= {
        "planner": "answer",
        "preset": "edit/mini",
        "edit": {"steps": 1},
        "pix2pix": {"steps": 1, "max_area": 4096},
    }
    chosen = config.load(methods.GenerateConfig, settings | {"data": {"limit": 2}, "runtime": {"device": "cpu"}})
    bench = load_bench(chosen.data)
    todo = methods.todo(chosen)
    assert [made.error for made in generate(bench.items, tmp_path, todo)] == [None, None]
    done = read_done(tmp_path, 1)
    assert done is not None
    assert (done["plan"] is not None) == (method == "replan")
    described = methods.describe(chosen, todo, bench)
    assert described["settings"]["method"] == method
    assert json.loads(json.dumps(described)) == described


def test_rephrase_sends_the_instruction_alone_and_keeps_the_request(flux_folder: Path, tmp_path: Path) -> None:
    with serve() as server:
        reply = {"role": "assistant", "content": ' "make the cup red" '}
        server.script = [Answer({"id": "1", "choices": [{"index": 0, "message": reply, "finish_reason": "stop"}]})]
        chosen = methods.GenerateConfig(
            str(tmp_path), "rephrase", str(flux_folder), rewriter=f"{server.url}/v1#m", preset="edit/mini",
            edit={"steps": 1}, data=DataConfig(limit=1), runtime=Runtime(device="cpu"),
        )  # fmt: skip
        (item,) = load_bench(chosen.data).items
        (made,) = generate([item], tmp_path, methods.todo(chosen))
        assert made.error is None
        (body,) = server.bodies()
    (part,) = body["messages"][0]["content"]
    assert part["type"] == "text"
    assert item.instruction in part["text"]
    done = read_done(tmp_path, item.id)
    assert done is not None
    assert (done["instruction"], done["plan"]) == (item.instruction, None)
    assert "instruction rewritten: make the cup red" in done["notes"]


def test_an_outage_of_the_rewriter_is_the_planners_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rephrase, "RETRIES", 0)
    with serve() as server:
        server.script = [Answer({"error": {"message": "asleep"}}, status=503), Answer({"error": {}}, status=401)]
        rewrite = load_rewriter(f"{server.url}/v1#m", Runtime(device="cpu"))
        for told in ("rewriter m: .*503", "rewriter m: .*401"):
            with pytest.raises(PlannerError, match=told):
                rewrite("make it red")
    nobody = "http://127.0.0.1:9/v1"
    with pytest.raises(PlannerError, match="rewriter m: no connection"):
        load_rewriter(f"{nobody}#m", Runtime(device="cpu"))("make it red")
    with pytest.raises(PlannerError, match="which models it has"):
        load_rewriter(nobody, Runtime(device="cpu"))


def test_rewrites() -> None:
    assert read_rewrite('  "make it red"\n') == "make it red"
    assert read_rewrite('write "GIRAFFE"') == 'write "GIRAFFE"'
    with pytest.raises(PlannerError, match="empty"):
        read_rewrite(' "" ')
    with pytest.raises(PlannerError, match="cannot be loaded"):
        load_rewriter("/nowhere/at/all", Runtime(device="cpu"))("make it red")
