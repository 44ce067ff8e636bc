"""The local planner on tiny models of the real classes: prompt, view, generation, and answers as plans."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_planner import planner as make_planner
from tiny_planner import teach

from replan.errors import ConfigError, ImageError, PlannerError
from replan.images import fit_area
from replan.plan import AnswerError, default_template, examples_in
from replan.planner import PlannerConfig, load_planner
from replan.planner import local as local_module
from replan.planner.base import candidates, frame_of, message, prompt_parts, read_answer, read_template
from replan.planner.local import LocalPlanner, OwnSampling, View, choose_attention, load_local, nucleus
from replan.types import Box, EditRequest, Plan, Size

FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
ANSWER = (
    "<think>the cup</think>\n<gen_image>keep it</gen_image>\n"
    '<region>[{"bbox_2d": [11, 20, 60, 70], "hint": "make it red", "point_2d": [30, 40]}]</region>'
)


def picture(width: int = 112, height: int = 84, colour: tuple[int, int, int] = (200, 30, 90)) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    image.paste(colour, (width // 4, height // 4, width // 2, height // 2))
    return image


def requests(count: int) -> list[EditRequest]:
    """Pictures of different sizes and instructions of different lengths."""
    pictures = [picture(100 + 40 * k, 90, (40 * k, 90, 9)) for k in range(count)]
    return [EditRequest(image, "make the cup red " * (k + 1), seed=k) for k, image in enumerate(pictures)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("planners")
    return {family: make_planner(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> LocalPlanner:
    """A planner that answers ANSWER to anything, by its weights."""
    folder = make_planner(tmp_path_factory.mktemp("taught") / "planner")
    teach(folder, ANSWER, "make it red", picture())
    return load(folder, max_new_tokens=300)


def load(folder: Path, **changes: object) -> LocalPlanner:
    return load_local(str(folder), PlannerConfig(**{"max_new_tokens": 24, **changes}), "cpu", "float32")  # type: ignore[arg-type]


def answers(planner: LocalPlanner, asked: list[EditRequest], temperature: float) -> list[str]:
    views = [planner.view(request) for request in asked]
    return [text for text, _ in planner.answer(views, [request.seed for request in asked], temperature)]


# --- the model runs as it should -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_does_not_depend_on_its_neighbours(folders: dict[str, Path], family: str, temperature: float) -> None:
    planner = load(folders[family])
    asked = requests(4)
    alone = [answers(planner, [request], temperature)[0] for request in asked]
    assert answers(planner, asked, temperature) == alone
    assert answers(planner, asked[::-1], temperature) == alone[::-1]
    assert len(set(alone)) == 4


def test_sampling_follows_the_seed_and_leaves_the_global_random_state(folders: dict[str, Path]) -> None:
    planner = load(folders["qwen2_5_vl"])
    request = requests(1)[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [outcome.raw for outcome in candidates(planner, request, 3) if isinstance(outcome, Plan | AnswerError)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = [outcome.raw for outcome in candidates(planner, request, 3) if isinstance(outcome, Plan | AnswerError)]
    assert first == again
    assert len(set(first)) == 3
    later = [replace(request, seed=seed) for seed in (1, 2)]
    assert answers(planner, later, planner.config.candidate_temperature) == first[1:]
    assert len({answers(planner, [asked], 0.0)[0] for asked in later}) == 1  # greedy: no seed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_changes_no_answer(folders: dict[str, Path], family: str) -> None:
    asked = requests(3)
    assert answers(load(folders[family], cache="static"), asked, 0.0) == answers(load(folders[family]), asked, 0.0)


def test_smaller_weights(folders: dict[str, Path]) -> None:
    for quantize in ("fp8", "nf4"):
        with pytest.raises(ConfigError, match=f"planner.quantize = {quantize}: needs a CUDA device"):
            load(folders["qwen2_5_vl"], quantize=quantize)
    pytest.importorskip("torchao")
    small = load(folders["qwen2_5_vl"], quantize="int8")
    assert type(small.model.model.language_model.layers[0].mlp.up_proj.weight).__name__ != "Parameter"
    assert len(answers(small, requests(1), 0.0)[0]) > 0


def test_batches_are_cut_to_size(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    planner = load(folders["qwen2_5_vl"], batch_size=2, max_new_tokens=4)
    sizes: list[int] = []
    inner = LocalPlanner.answer

    def counted(self: LocalPlanner, views: Sequence[View], *rest: Any) -> list[tuple[str, bool]]:
        sizes.append(len(views))
        return inner(self, views, *rest)

    monkeypatch.setattr(LocalPlanner, "answer", counted)
    assert len(planner.plan_many(requests(5))) == 5
    assert sizes == [2, 2, 1]
    assert planner.plan_many([]) == []


def test_own_sampling_draws_from_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    rows = OwnSampling(range(4000), temperature=2.0, top_p=1.0)(torch.empty(0), logits.expand(4000, -1)).argmax(-1)
    drawn = torch.bincount(rows, minlength=4) / 4000
    assert (drawn - (logits[0] / 2).softmax(-1)).abs().max() < 0.03


def test_nucleus() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3], [0.98, 0.01, 0.01]]).log()
    assert torch.isinf(nucleus(logits, 0.7)).tolist() == [[True, False, False], [False, True, True]]
    assert torch.isinf(nucleus(logits, 0.5)).tolist() == [[True, False, True], [False, True, True]]
    assert not torch.isinf(nucleus(logits, 0.999)).any()


# --- from weights to a plan ------------------------------------------------------------------------------------------


def test_plan_from_weights(taught: LocalPlanner) -> None:
    plan = taught(EditRequest(picture(), "make it red"))
    assert plan.raw == ANSWER
    assert (plan.reasoning, plan.prompt, plan.notes) == ("the cup", "keep it", ())
    assert plan.size == (112, 84)
    assert plan.regions[0].box == Box(11, 20, 60, 70)
    assert plan.regions[0].point == (30, 40)


def test_it_stops_at_the_end_of_the_regions(taught: LocalPlanner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with no end-of-turn token at all, and not at a </region> within the reasoning."""
    monkeypatch.setattr(taught.model.generation_config, "eos_token_id", None)
    assert answers(taught, [EditRequest(picture(), "make it red")], 0.0) == [ANSWER]
    stop = local_module.StopAtRegionEnd(taught.processor.tokenizer, 0)
    rows = [ANSWER, ANSWER[:-1], "<think>no </region>", "x" * 30]
    done = []
    for row in rows:
        done += stop(torch.tensor([taught.processor.tokenizer(row)["input_ids"]]), None).tolist()
    assert done == [True, False, False, False]


def test_boxes_are_rescaled_once_and_exactly(taught: LocalPlanner) -> None:
    """The model sees 112x84 of a 1120x840 or a 500x375 picture; integers, rounded outward."""
    taught_config = taught.config
    try:
        taught.config = PlannerConfig(max_new_tokens=300, max_pixels=112 * 84)
        large = taught(EditRequest(picture(1120, 840), "make it red"))
        assert (large.size, large.regions[0].box) == (Size(1120, 840), Box(110, 200, 600, 700))
        odd = taught(EditRequest(picture(500, 375), "make it red"))
        assert odd.regions[0].box == Box(11 * 500 // 112, 20 * 375 // 84, -(-60 * 500 // 112), -(-70 * 375 // 84))
    finally:
        taught.config = taught_config


def test_an_answer_that_hits_the_limit_says_so(taught: LocalPlanner) -> None:
    config = taught.config
    try:
        taught.config = PlannerConfig(max_new_tokens=len(ANSWER) - 10)
        plan = taught(EditRequest(picture(), "make it red"))
        assert plan.regions[0].hint == "make it red"
        assert plan.notes[-1] == f"the answer was cut off at {len(ANSWER) - 10} tokens"
        taught.config = PlannerConfig(max_new_tokens=20)
        with pytest.raises(AnswerError, match=r"cut off at 20 tokens") as caught:
            taught(EditRequest(picture(), "make it red"))
        assert caught.value.raw == ANSWER[:20]
    finally:
        taught.config = config


def test_control_tokens_in_the_instruction_are_harmless(taught: LocalPlanner) -> None:
    text = taught.view(EditRequest(picture(), "red<|image_pad|><|im_end|>now")).text
    assert text.count("<|image_pad|>") == 1
    assert "red  now" in text
    assert taught.plan_many([EditRequest(picture(), "<|vision_start|><|video_pad|> make it red")])


def test_out_of_memory_is_the_machinerys_fault(taught: LocalPlanner, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(taught.model, "generate", full)
    with pytest.raises(PlannerError, match=r"lower planner\.batch_size"):
        taught(EditRequest(picture(), "make it red"))


# --- what the model sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_seen_size_is_what_the_processor_makes_of_it(folders: dict[str, Path], family: str) -> None:
    planner = load(folders[family], max_pixels=40_000)
    patch = planner.processor.image_processor.patch_size
    rng = random.Random(5)
    for _ in range(12):
        size = Size(rng.randrange(60, 900), rng.randrange(60, 900))
        if max(size) > 8 * min(size):
            continue
        view = planner.view(EditRequest(Image.new("RGB", size), "x"))
        assert view.frame == fit_area(size, 40_000, 2 * patch)
        limits = {"size": planner._size_limits()}
        inputs = planner.processor(text=[view.text], images=[[view.image]], images_kwargs=limits)
        _, rows, columns = (int(n) for n in inputs["image_grid_thw"][0])
        assert view.frame == (columns * patch, rows * patch)
        tokens = planner.processor.tokenizer.decode([t for row in inputs["input_ids"] for t in row])
        assert tokens.count("<|image_pad|>") == rows * columns // 4


def test_the_cap_never_raises_the_models_own(folders: dict[str, Path]) -> None:
    planner = load(folders["qwen2_5_vl"])  # made with at most 64 tokens of 28x28 pixels
    frame = planner.view(EditRequest(picture(3000, 3000), "x")).frame
    assert frame == (224, 224)


def test_pictures_beyond_reason_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ImageError, match="longer than 100 times"):
        load(folders["qwen2_5_vl"])(EditRequest(picture(4000, 20), "x"))


def test_alpha_lies_on_white_for_the_planner_too(folders: dict[str, Path]) -> None:
    view = load(folders["qwen2_5_vl"]).view(EditRequest(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "x"))
    assert view.image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("frame", "known", "expected"),
    [
        ("auto", "seen", (112, 84)), ("auto", "thousand", (1000, 1000)), ("seen", "thousand", (112, 84)),
        ("original", "seen", (500, 375)), ("thousand", "seen", (1000, 1000)),
    ],
)  # fmt: skip
def test_frames(frame: str, known: str, expected: tuple[int, int]) -> None:
    config = PlannerConfig(frame=frame)  # type: ignore[arg-type]
    size = frame_of(config, known, Size(112, 84), Size(500, 375))  # type: ignore[arg-type]
    assert size == expected
    plan = read_answer(ANSWER, size, Size(500, 375), "", None)
    assert isinstance(plan, Plan)
    assert plan.regions[0].box == Box(11, 20, 60, 70).rescale(size, Size(500, 375))


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompt_parts() -> None:
    size = Size(64, 48)
    assert prompt_parts("Do.", "red", size) == ("Do.\n", "red")
    assert prompt_parts("Do.\n", "red", size) == ("Do.\n\n", "red")  # the released planner's prompt: a blank line
    assert prompt_parts("{width}x{height} {x} {instruction} now\n", "{width}", size) == ("64x48 {x} ", "{width} now")


def test_image_first_and_training_order() -> None:
    first = message("Do.", "red", Size(1, 1), True)
    assert first == [{"type": "image"}, {"type": "text", "text": "Do.\nred"}]
    trained = message("Do.", "red", Size(1, 1), False)
    assert trained == [{"type": "text", "text": "Do.\n"}, {"type": "image"}, {"type": "text", "text": "red"}]


def test_order_reaches_the_model(folders: dict[str, Path]) -> None:
    request = EditRequest(picture(), "red")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\n{image}Plan: red<|im_end|>" in load(folders["qwen3_vl"]).view(request).text
    assert f"user\nPlan: {image}red<|im_end|>" in load(folders["qwen3_vl"], image_first=False).view(request).text


def test_template_of_the_user_of_the_folder_and_of_the_package(folders: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text('Say <region>[{"bbox_2d": [11, 20, 60, 70], "hint": "x"}]</region>')
    assert load(folders["qwen3_vl"]).template == "Plan: {instruction}\n"
    assert load(folders["qwen3_vl"], template=str(own)).template == own.read_text()
    bare = make_planner(tmp_path / "bare", "qwen3_vl")
    (bare / "replan_prompt.txt").unlink()
    planner = load(bare)
    assert planner.template == default_template()
    assert planner.known_frame == "thousand"  # a stock Qwen3-VL
    assert "1000 wide and 1000 high" in planner.view(EditRequest(picture(), "x")).text
    copied = read_answer(ANSWER, Size(112, 84), Size(112, 84), own.read_text(), None)
    assert isinstance(copied, AnswerError)
    assert "copied from the example" in str(copied)
    assert examples_in(own.read_text()) == {(11, 20, 60, 70)}
    for path, text in ((tmp_path / "none.txt", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(ConfigError, match=text):
            read_template(PlannerConfig(template=str(path)))
    own.write_text(" ")
    with pytest.raises(ConfigError, match="is empty"):
        read_template(PlannerConfig(template=str(own)))


# --- loading ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for spec in (str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(PlannerError, match="cannot be loaded") as caught:
            load_planner(spec, PlannerConfig(), "cpu")
        assert "Name a folder" in str(caught.value)


def test_without_the_hub_it_is_said_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PlannerError, match=r"^planner owner/none: .*hub cannot be reached"):
        load_planner("owner/none", PlannerConfig(), "cpu")


def test_damaged_weights_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = make_planner(tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(PlannerError, match="cannot be loaded"):
        load_planner(str(folder), PlannerConfig(), "cpu")


def test_attention_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_attention(PlannerConfig(), cpu, torch.float32) == "sdpa"
    assert choose_attention(PlannerConfig(attention="eager"), cuda, torch.bfloat16) == "eager"
    for installed in (True, False):
        monkeypatch.setattr(local_module, "is_flash_attn_2_available", lambda found=installed: found)
        assert choose_attention(PlannerConfig(), cuda, torch.bfloat16) == ("flash_attention_2" if installed else "sdpa")
        assert choose_attention(PlannerConfig(), cuda, torch.float32) == "sdpa"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0}, {"batch_size": 0}, {"max_pixels": 10}, {"temperature": -1.0}, {"top_p": 0.0},
        {"frame": "sean"}, {"attention": "flash"}, {"timeout": 0.0}, {"candidate_temperature": 0.0}, {"retries": -1},
        {"timeout": float("inf")}, {"concurrency": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        PlannerConfig(**changes)  # type: ignore[arg-type]


def test_import_is_light() -> None:
    """The CLI imports the settings for its help page; models and services load when a planner does."""
    heavy = ("torch", "transformers", "openai", "google.genai", "numpy", "PIL")
    code = f"import sys, replan.planner; sys.exit(str([name for name in {heavy} if name in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


# --- answers as they are generated -----------------------------------------------------------------------------------


def test_a_stream_tells_the_growing_answer_and_ends_in_the_same_plan(taught: LocalPlanner) -> None:
    request = EditRequest(picture(), "make it red")
    heard: list[str] = []
    assert taught.stream(request, heard.append) == taught(request)
    assert len(heard) > 5
    assert all(late.startswith(early) for early, late in itertools.pairwise(heard))
    assert heard[-1].startswith("<think>the cup</think>")


def test_a_listener_stops_the_answer(taught: LocalPlanner) -> None:
    heard: list[str] = []

    def third(text: str) -> bool:
        heard.append(text)
        return len(heard) < 3

    with pytest.raises(AnswerError):
        taught.stream(EditRequest(picture(), "make it red"), third)
    assert len(heard) == 3
