"""The first release's command line: its flags, its files, its interactive loop."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from fakes import FakeBackbone, FakePlanner, picture
from PIL import Image

from replan import record
from replan.edit import Editor
from replan.plan import KEEP
from replan.record import Setup
from replan.run_replan import main, parser

FILES = {
    "config.json",
    "instruction_and_response.txt",
    "original.png",
    "final_result.png",
    "final_result_with_all_bbox.png",
}
MINI = ["--diffusion_model_name", "mini"]


class Front:
    """Runs `run_replan ...` in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.planner, self.backbone = FakePlanner(), FakeBackbone()
        self.setups: list[Setup] = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr(Setup, "open", lambda setup: self._open(setup))
        picture().save(folder / "in.png")

    def _open(self, setup: Setup) -> Editor:
        self.setups.append(setup)
        return Editor(self.planner, self.backbone, setup.config)

    def __call__(self, *words: str, code: int = 0, stdin: str | None = None) -> Setup | None:
        if stdin is not None:
            self.monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        if code:
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert stop.value.code == code
            return None
        main(words)
        return self.setups[-1]

    def one(self, *words: str) -> Setup:
        setup = self("--image", "in.png", "--instruction", "red", *words)
        assert setup is not None
        return setup


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Front:
    return Front(tmp_path, monkeypatch)


def test_the_originals_files(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    front.one("--id", "mine", *MINI)
    folder = front.folder / "output" / "inference" / "mine"
    assert {path.name for path in folder.iterdir()} == FILES | {"final_result.json"}
    assert capsys.readouterr().out == "output/inference/mine/final_result.png\n"
    assert Image.open(folder / "original.png").tobytes() == picture().tobytes()
    text = (folder / "instruction_and_response.txt").read_text()
    assert "red" in text
    assert "<think>raw</think>" in text
    assert "noise background" in text
    config = json.loads((folder / "config.json").read_text())
    assert (config["instruction"], config["response"], config["pipeline_type"]) == ("red", "<think>raw</think>", "flux")
    assert record.read(folder / "final_result.json").setup() == front.setups[0]


def test_names_of_results(front: Front) -> None:
    front.one(*MINI)
    (folder,) = (front.folder / "output" / "inference").iterdir()
    assert folder.name.startswith("in_20")
    front.one("--only_save_image", "--output_dir", "flat", *MINI)
    assert [path.name for path in (front.folder / "flat").iterdir()] == ["in_edited.png"]
    front.one("--id", "same", *MINI)
    front.one("--id", "same", *MINI)
    assert len(list((front.folder / "output" / "inference").iterdir())) == 2


def test_models(front: Front) -> None:
    flux, qwen = front.one(), front.one("--pipeline_type", "qwen")
    assert (flux.backbone, flux.planner) == ("flux-kontext", "TainU/RePlan-Qwen2.5-VL-7B")
    assert (flux.config.mask.expand, flux.config.mask.isolate) == (0.15, 0.05)
    assert qwen.backbone == "qwen-image-edit"
    assert (qwen.config.mask.expand, qwen.config.mask.isolate) == (0.0, 0.5)
    own = front.one("--vlm_ckpt_path", "a/b", "--lora_path", "c/d", "--device", "cpu", "--dtype", "fp16", *MINI)
    assert (own.planner, own.runtime.lora, own.runtime.device, own.runtime.dtype) == ("a/b", ("c/d",), "cpu", "float16")
    assert front.one(*MINI).planner == "mini"
    assert front.one("--vlm_prompt_template_path", "replan.txt", *MINI).planner_config.template is None
    (front.folder / "replan.txt").write_text("look")
    assert front.one("--vlm_prompt_template_path", "replan.txt", *MINI).planner_config.template is not None
    front("--image", "in.png", "--instruction", "x", "--pipeline_type", "qwen", *MINI, code=2)


def test_regions(front: Front) -> None:
    plain = front.one(*MINI).config.mask
    assert (plain.mutual, plain.symmetric, plain.hide_main) == (True, False, False)
    words = "--no_bboxes_attend_to_each_other --symmetric_masking --delete_main_prompt --expand_value 0.3"
    mask = front.one(*words.split(), *MINI).config.mask
    assert (mask.mutual, mask.symmetric, mask.hide_main, mask.expand) == (False, True, True, 0.3)
    steps = front.setups[0].config.steps
    for given, share in (("0.25", 0.25), ("1", 1.0), ("0", 0.0), ("2", 2 / steps), ("1000", 1.0), ("-1", 0.0)):
        assert front.one("--attention_switch_step", given, *MINI).config.mask.isolate == share


def test_executors_and_switches_without_effect(front: Front) -> None:
    assert front.one("--disable_flex_attn", *MINI).runtime.attention == "dense"
    words = "--enable_flex_attn --flex_attn_use_densemask --bboxes_attend_to_each_other"
    assert front.one(*words.split(), *MINI).runtime.attention == "auto"


def test_global_prompt_and_pixels(front: Front) -> None:
    front.one("--replace_global_prompt", *MINI)
    front.one("--replace_global_prompt", "--custom_global_prompt_text", "dusk", *MINI)
    front.one("--expand_mode", "pixels", "--expand_value", "3", *MINI)
    first, second, third = front.backbone.plans
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.prompt, second.prompt) == (KEEP, "dusk")
    assert third.regions[0].box.as_tuple() == (0, 0, 19, 24)
    assert front.setups[2].config.mask.expand == 0.0


def test_image_dir(front: Front) -> None:
    (front.folder / "deep").mkdir()
    picture().save(front.folder / "deep" / "there.png")
    front("--image", "there.png", "--instruction", "x", "--image_dir", "deep", *MINI)
    front("--image", "there.png", "--instruction", "x", *MINI, code=2)


def test_interactive_rounds_each_have_a_folder(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    front("--id", "mine", *MINI, stdin="in.png\nred\nin.png\nblue\ngone.png\nx\nin.png\noutage\nin.png\ngreen\n")
    names = capsys.readouterr()
    folders = ["mine", "mine_2", "mine_3"]
    assert names.out.split() == [f"output/inference/{name}/final_result.png" for name in folders]
    assert "gone.png: no such file" in names.err
    assert "server does not answer" in names.err
    assert len(front.setups) == 1


def test_what_is_given_is_offered(front: Front) -> None:
    front("--image", "in.png", *MINI, stdin="\nred\n")
    front("--instruction", "blue", *MINI, stdin="in.png\n\n")
    assert [request.instruction for request in front.backbone.requests] == ["red", "blue"]


def test_failures(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    front("--image", "in.png", "--instruction", "outage", *MINI, code=1)
    front("--image", "in.png", "--instruction", "x", "--expand_value", "-1", *MINI, code=2)
    front("--image", "in.png", "--instruction", "x", "--dtype", "fp8", code=2)
    front("--image", "in.png", "--instruction", "x", "--output_dir", "in.png", *MINI, code=2)
    assert "in.png: is a file, not a folder" in capsys.readouterr().err
    front.one("--replace_global_prompt", "--instruction", "nonsense", *MINI)
    assert front.backbone.plans[-1] is not None
    assert front.backbone.plans[-1].prompt == "nonsense"


def test_every_flag_of_the_original_is_there() -> None:
    flags = """--image --instruction --output_dir --pipeline_type --vlm_ckpt_path --diffusion_model_name --lora_path
        --vlm_prompt_template_path --device --dtype --image_dir --id --only_save_image --delete_main_prompt
        --replace_global_prompt --custom_global_prompt_text --expand_value --expand_mode --bboxes_attend_to_each_other
        --no_bboxes_attend_to_each_other --symmetric_masking --enable_flex_attn --disable_flex_attn
        --flex_attn_use_bitmask --flex_attn_use_densemask --attention_switch_step"""
    text = parser().format_help()
    assert [flag for flag in flags.split() if flag not in text] == []
    assert "default: flux 0.15, qwen 0.0" in " ".join(text.split())
