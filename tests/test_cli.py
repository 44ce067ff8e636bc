"""The command line end to end, with fakes in place of the two models."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackbone, FakePlanner, picture, plan_for
from PIL import Image
from typer.testing import CliRunner, Result

from replan import plan, record
from replan.cli import app
from replan.edit import Editor
from replan.errors import PlanError
from replan.record import Setup
from replan.types import EditRequest, Size

VERBS = ("plan", "mask", "edit", "session", "doctor")


class Shell:
    """Runs `replan ...` in a folder of its own and keeps what the fakes saw."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.planner = FakePlanner()
        self.before: Callable[[EditRequest], Any] = lambda request: None
        self.backbone = FakeBackbone(lambda request: self.before(request))
        self.setups: list[Setup] = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr(Setup, "open", lambda setup: self._open(setup))
        picture().save(folder / "in.png")

    def _open(self, setup: Setup) -> Editor:
        self.setups.append(setup)
        return Editor(self.planner, self.backbone, setup.config)

    def __call__(self, *words: object, code: int = 0, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        assert result.exit_code == code, result.output + repr(result.exception)
        if code:
            assert "Traceback" not in result.stderr
        return result

    def write(self, name: str, value: Any) -> Path:
        path = self.folder / name
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {"in.png"}


@pytest.fixture
def sh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(tmp_path, monkeypatch)


@pytest.fixture
def plan_file(sh: Shell) -> Path:
    return sh.write("plan.json", plan.to_json(plan_for(picture())))


# help


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_a_page(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) > 8
    assert "[bold]" not in result.stdout
    assert "<bool>" not in result.stdout  # a switch takes no value
    commands = [line.strip() for line in lines if line.startswith("   ") and line.strip()]
    # an example that is broken over two lines goes on with other words
    assert all(line.startswith("replan ") for line in commands)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['replan', 'edit', '--help']\nfrom replan.cli import main\ntry:\n    main()\nfinally:\n"
    )
    code += "    print({'torch', 'numpy', 'PIL', 'yaml', 'transformers', 'diffusers'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "set()"


def test_version(sh: Shell) -> None:
    assert sh("--version").stdout == "0.1.0\n"


# plan


def test_plan_is_json_on_stdout(sh: Shell) -> None:
    result = sh("plan", "in.png", "make it red", "--seed", 3)
    found = plan.from_json(json.loads(result.stdout))
    assert found.regions[0].hint == "make it red"
    assert sh.planner.requests[0].seed == 3
    assert "make it red" in result.stderr


def test_plan_candidates_are_lines(sh: Shell) -> None:
    lines = [json.loads(line) for line in sh("plan", "in.png", "red", "--candidates", 3).stdout.splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 2]
    assert [line["plan"]["regions"][0]["hint"] for line in lines] == ["red 0", "red 1", "red 2"]
    sh("edit", "in.png", "--plan", sh.write("one.json", lines[1]), "-o", "out.png")
    assert sh.backbone.plans[0] == plan.from_json(lines[1]["plan"])


def test_plan_that_fails(sh: Shell) -> None:
    assert sh("plan", "in.png", "nonsense", code=1).stderr == "error: no tags in the answer\n"
    assert "server does not answer" in sh("plan", "in.png", "outage", code=1).stderr
    result = sh("plan", "in.png", "outage", "--candidates", 2, code=1)
    assert [json.loads(line)["seed"] for line in result.stdout.splitlines()] == [0, 1]


def test_planner_settings(sh: Shell, tmp_path: Path) -> None:
    template = sh.write("prompt.txt", "look")
    sh("plan", "in.png", "red", "planner.frame=original", "--prompt-template", template, "--planner", "http://x/v1#m")
    (setup,) = sh.setups
    assert (setup.planner, setup.planner_config.frame) == ("http://x/v1#m", "original")
    assert setup.planner_config.template == str(template)
    told = sh("plan", "in.png", "red", "planner.fram=original", code=2).stderr
    assert told == "error: planner.fram: unknown (did you mean frame?)\n"


# mask


def test_mask_draws_and_tabulates(sh: Shell, plan_file: Path) -> None:
    result = sh("mask", "in.png", "--plan", plan_file, "-o", "mask.png")
    assert "hint 1" in result.stdout
    assert "vision" not in result.stdout
    assert Image.open("mask.png").width >= 640
    assert sh.setups == []


def test_mask_of_other_backbones_and_rules(sh: Shell, plan_file: Path) -> None:
    result = sh("mask", "in.png", "--plan", plan_file, "-b", "qwen-image-edit", "--isolate", "0.5", "mask.expand=0.1")
    assert "vision" in result.stdout
    assert "steps 0% to 50%" in result.stdout
    assert "steps 50% to 100%" in result.stdout
    rules = sh.write("rules.yaml", "main: all\n")
    assert "steps 0% to 100%" in sh("mask", "in.png", "--plan", plan_file, "--rules", rules).stdout


# edit


def test_edit_writes_picture_and_sidecar(sh: Shell) -> None:
    result = sh("edit", "in.png", "make it red", "-o", "out.png", "--seed", 7, "--steps", 2)
    assert result.stdout == "out.png\n"
    assert Image.open("out.png").size == Image.open("in.png").size
    found = record.read(Path("out.json"))
    assert found.plan is not None
    assert (found.plan["raw"], found.plan["reasoning"]) == ("<think>raw</think>", "the left half is meant")
    assert (found.seed, found.instruction, found.backbone, found.planner) == (7, "make it red", "mini", "mini")
    assert (found.config["steps"], found.notes) == (2, ("made up",))
    assert {"replan", "python", "torch", "diffusers", "transformers"} <= set(found.versions)
    assert found.command[0] == "replan"
    assert found.result.sha256 == record.sha256(Path("out.png"))
    assert found.image.sha256 == record.sha256(Path("in.png"))


def test_default_output_folder_and_suffix(sh: Shell) -> None:
    assert sh("edit", "in.png", "x").stdout == "in_edited.png\n"
    assert sh("edit", "in.png", "x", "-o", "new/").stdout == "new/in_edited.png\n"
    assert sh("edit", "in.png", "x", "-o", "new").stdout == "new/in_edited.png\n"
    assert sh("edit", "in.png", "x", "-o", "deep/er/a.webp").stdout == "deep/er/a.webp\n"
    assert Image.open("deep/er/a.webp").format == "WEBP"
    assert "unknown kind of picture" in sh("edit", "in.png", "x", "-o", "out.gift", code=2).stderr


def test_layers_of_settings(sh: Shell) -> None:
    file = sh.write("own.yaml", "steps: 3\nguidance: 3.0\nnegative_prompt: file\nplanner: {frame: original}\n")
    rules = sh.write("rules.yaml", "main: all\n")
    sh("edit", "in.png", "x", "steps=4", "guidance=4.0", "--config", file, "--steps", 5, "--expand", 0.5)
    sh("edit", "in.png", "x", "--config", file)
    words = ("--rules", rules, "--isolate", 0.25, "--keep-background", "--negative-prompt", "true", "true_cfg=2")
    sh("edit", "in.png", "x", *words)
    sh("edit", "in.png", "x")
    first, second, third, plain = (setup.config for setup in sh.setups)
    assert (first.steps, first.guidance, first.negative_prompt, first.mask.expand) == (5, 4.0, "file", 0.5)
    assert (second.steps, second.guidance, second.mask.expand) == (3, 3.0, plain.mask.expand)
    assert sh.setups[1].planner_config.frame == "original"
    assert (third.mask.isolate, third.keep_background, third.negative_prompt) == (0.25, True, "true")
    assert third.mask.rules[0].rows == ("main: all",)


def test_a_mini_editor_in_a_folder_goes_with_the_mini_planner(sh: Shell) -> None:
    folder = sh.folder / "editor"
    folder.mkdir()
    sh.write("editor/model_index.json", {"_class_name": "FluxKontextPipeline"})
    sh("edit", "in.png", "x", "-b", folder)
    sh.write("editor/replan.yaml", "config: edit/mini\n")
    sh("edit", "in.png", "x", "-b", folder)
    assert [setup.planner for setup in sh.setups] == ["TainU/RePlan-Qwen2.5-VL-7B", "mini"]


def test_guidance_means_what_the_backbone_uses(sh: Shell) -> None:
    sh("edit", "in.png", "x", "-b", "flux-kontext", "--guidance", 7)
    sh("edit", "in.png", "x", "-b", "qwen-image-edit", "--guidance", 7)
    flux, qwen = sh.setups
    assert (flux.config.guidance, flux.config.true_cfg, qwen.config.true_cfg) == (7, None, 7)
    assert flux.planner == qwen.planner == "TainU/RePlan-Qwen2.5-VL-7B"


def test_where_it_runs(sh: Shell) -> None:
    words = "--device cpu --dtype float16 --offload group --quantize nf4 --compile --attention dense --lora a --lora b"
    sh("edit", "in.png", "x", *words.split())
    found = sh.setups[0].runtime
    assert (found.device, found.dtype, found.offload, found.quantize) == ("cpu", "float16", "group", "nf4")
    assert (found.compile, found.attention, found.lora) == (True, "dense", ("a", "b"))
    assert "device = 'tpu': must be one of" in sh("edit", "in.png", "x", "--device", "tpu", code=2).stderr


def test_a_plan_needs_no_instruction_and_no_planner(sh: Shell, plan_file: Path) -> None:
    sh("edit", "in.png", "--plan", plan_file, "steps=2", "-o", "out.png")
    assert sh.planner.requests == []
    assert sh.backbone.plans == [plan_for(picture())]
    assert sh.setups[0].config.steps == 2
    sh("edit", "in.png", "--plan", "-", "-o", "again.png", "steps=2", stdin=plan_file.read_text())
    sh("edit", "in.png", "named", "--plan", "out.json", "-o", "third.png", "steps=2")
    assert sh.backbone.requests[2].instruction == "named"
    assert Path("out.png").read_bytes() == Path("again.png").read_bytes() == Path("third.png").read_bytes()


def test_baseline_never_plans(sh: Shell) -> None:
    sh("edit", "in.png", "x", "--baseline", "--candidates", 2, "-o", "out.png")
    assert (sh.planner.requests, sh.backbone.plans) == ([], [None, None])
    found = record.read(Path("out_1.json"))
    assert (found.plan, found.baseline, found.seed) == (None, True, 1)


def test_candidates(sh: Shell) -> None:
    result = sh("edit", "in.png", "x", "--candidates", 3, "-o", "out.png", "--seed", 4)
    assert result.stdout.split() == ["out_0.png", "out_1.png", "out_2.png"]
    assert len({Path(name).read_bytes() for name in result.stdout.split()}) == 3
    assert [record.read(Path(f"out_{number}.json")).seed for number in range(3)] == [4, 5, 6]


def test_failed_planning_is_loud_and_strict_exits_1(sh: Shell) -> None:
    result = sh("edit", "in.png", "nonsense", "-o", "out.png")
    assert "warning: planning failed" in result.stderr
    found = record.read(Path("out.json"))
    assert found.plan is not None
    assert (found.plan["prompt"], found.plan["regions"]) == ("nonsense", [])
    assert "planning failed" in found.notes[0]
    assert sh("edit", "in.png", "nonsense", "-o", "b.png", "--strict", code=1).stderr.endswith(
        "no tags in the answer\n"
    )
    assert "b.png" not in sh.files()


# repeat


@pytest.mark.parametrize("words", [[], ["--baseline"], ["--candidates", "2"], ["--steps", "3", "--expand", "0.2"]])
def test_repeat_gives_the_same_bytes(sh: Shell, words: list[str]) -> None:
    sh("edit", "in.png", "make it red", "-o", "out.png", "--seed", 7, *words)
    name = "out_1" if "--candidates" in words else "out"
    planned = len(sh.planner.requests)
    result = sh("edit", "--repeat", f"{name}.json", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path(f"{name}.png").read_bytes()
    assert "repeat: the same bytes" in result.stderr
    assert len(sh.planner.requests) == planned
    assert sh.setups[0] == sh.setups[1]
    sh("edit", "--repeat", "again.json")
    assert Path("again_repeat.png").read_bytes() == Path("again.png").read_bytes()


def test_repeat_with_a_change(sh: Shell) -> None:
    sh("edit", "in.png", "make it red", "-o", "out.png", "--steps", 3)
    result = sh("edit", "--repeat", "out.json", "steps=5", "--seed", 2, "-o", "other.png")
    assert "same bytes" not in result.stderr
    assert Path("other.png").read_bytes() != Path("out.png").read_bytes()
    found = record.read(Path("other.json"))
    assert (found.seed, found.config["steps"]) == (2, 5)


def test_repeat_refuses_what_it_cannot(sh: Shell) -> None:
    sh("edit", "in.png", "x", "-o", "out.png")
    assert "cannot be read" in sh("edit", "--repeat", "gone.json", code=2).stderr
    assert "a sidecar is the .json file" in sh("edit", "--repeat", "out.png", code=2).stderr
    assert "not a sidecar" in sh("edit", "--repeat", sh.write("no.json", {"a": 1}), code=2).stderr
    assert "reads format 1" in sh("edit", "--repeat", sh.write("f.json", _changed("out.json", format=2)), code=2).stderr
    picture(20, 20).save("in.png")
    assert "is not the picture of the recorded run" in sh("edit", "--repeat", "out.json", code=2).stderr
    Path("in.png").unlink()
    assert "is gone" in sh("edit", "--repeat", "out.json", code=2).stderr


def _changed(name: str, **values: Any) -> dict[str, Any]:
    return json.loads(Path(name).read_text()) | values


# batch


def test_batch(sh: Shell) -> None:
    lines = [{"image": "in.png", "instruction": text, "id": text} for text in ("one", "outage", "two")]
    jobs = sh.write("jobs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    result = sh("edit", "--batch", jobs, "-o", "out", "--steps", 2, code=1)
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["status"] for line in told] == ["done", "failed", "done"]
    assert "failed: line 2 (outage): the planner's server does not answer" in result.stderr
    assert "2 done, 0 were done before, 1 failed; in out" in result.stderr
    sh.write("jobs.jsonl", jobs.read_text().replace("outage", "mended"))
    result = sh("edit", "--batch", jobs, "-o", "out", "steps=2")
    assert [json.loads(line)["status"] for line in result.stdout.splitlines()] == ["skipped", "done", "skipped"]
    sh("edit", "--repeat", "out/one.json", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("out/one.png").read_bytes()


def test_batch_reports_all_bad_lines_and_runs_none(sh: Shell) -> None:
    jobs = sh.write("jobs.jsonl", '{"image": "in.png", "instruction": "x", "id": "x"}\n{\n{"image": "gone.png"}\n')
    result = sh("edit", "--batch", jobs, "-o", "out", code=2)
    assert f"{jobs}:2: not valid JSON" in result.stderr
    assert f"{jobs}:3: instruction: missing" in result.stderr
    assert "2 bad lines, nothing was run" in result.stderr
    assert sh.backbone.requests == []
    assert json.loads(sh("edit", "--batch", jobs, "-o", "out", "--skip-bad").stdout)["id"] == "x"
    assert "--batch needs a folder" in sh("edit", "--batch", jobs, code=2).stderr
    assert "in.png: is a file, not a folder" in sh("edit", "--batch", jobs, "-o", "in.png", "--skip-bad", code=2).stderr


def test_ctrl_c_in_a_batch(sh: Shell) -> None:
    def before(request: EditRequest) -> None:
        if request.instruction == "two":
            raise KeyboardInterrupt

    sh.before = before
    lines = [{"image": "in.png", "instruction": text, "id": text} for text in ("one", "two", "three")]
    jobs = sh.write("jobs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    result = sh("edit", "--batch", jobs, "-o", "out", code=130)
    assert "1 done, 0 were done before, 0 failed, 2 not reached (the same command resumes)" in result.stderr
    assert Path("out/one.png").is_file()
    assert Path("out/one.json").is_file()


# session


def test_session(sh: Shell) -> None:
    lines = ["in.png", "red", "", "seed=5", "blue", "^", "green"]
    result = sh("session", "-o", "results", stdin="\n".join(lines) + "\n")
    names = ["results/in_001.png", "results/in_002.png", "results/in_003.png"]
    assert result.stdout.split() == names
    assert len(sh.setups) == 1
    asked = sh.backbone.requests
    assert [(request.instruction, request.seed) for request in asked] == [("red", 0), ("blue", 5), ("green", 5)]
    assert asked[2].image.tobytes() == Image.open(names[1]).tobytes()
    assert record.read(Path(names[2]).with_suffix(".json")).image.path == str(Path(names[1]).resolve())
    assert "3 results in results" in result.stderr
    assert sh("session", "-o", "results", stdin="in.png\nred\n").stdout.split() == ["results/in_004.png"]


def test_errors_do_not_end_a_session(sh: Shell) -> None:
    sh.write("bad.png", "no picture")
    lines = ["^", "gone.png", ".", "bad.png", "red", "seed=x", "in.png", "outage", "", "red"]
    result = sh("session", "-o", "results", stdin="\n".join(lines) + "\n")
    told = result.stderr
    for part in (
        "there is no result yet",
        "gone.png: there is no such file",
        "is a folder",
        "not a picture",
        "seed = 'x'",
    ):
        assert part in told
    assert "the planner's server does not answer" in told
    assert result.stdout.split() == ["results/in_001.png"]


def test_a_session_without_input(sh: Shell) -> None:
    assert sh("session", stdin="").stdout == ""
    assert sh("session", stdin="in.png\n").stdout == ""
    assert "unknown (did you mean steps?)" in sh("session", "step=3", code=2, stdin="").stderr


def test_ctrl_c_in_a_session(sh: Shell) -> None:
    def before(request: EditRequest) -> None:
        if request.instruction == "two":
            raise KeyboardInterrupt

    sh.before = before
    sh("session", "-o", "results", stdin="in.png\none\n\ntwo\n", code=130)
    assert Path("results/in_001.png").is_file()


# doctor


def test_doctor_in_words_and_json(sh: Shell) -> None:
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "120"})
    assert result.exit_code in (0, 1)
    for part in ("python", "torch", "sdpa", "qwen-image-edit"):
        assert part in result.stdout
    checks = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert {"group", "name", "state", "found", "fix"} == set(checks[0])


# mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("edit gone.png x", "gone.png: no such file"),
        ("edit . x", ".: is a directory"),
        ("edit plan.json x", "plan.json: not a picture"),
        ("plan gone.png x", "gone.png: no such file"),
        ("edit", "edit needs a picture and an instruction"),
        ("edit in.png", "edit needs a picture and an instruction"),
        ("edit in.png ''", "the instruction is empty"),
        ("plan in.png ' '", "the instruction is empty"),
        ("edit in.png x --negative-prompt blur", "--negative-prompt: has no effect without true CFG; add true_cfg=2.0"),
        ("edit in.png x y", "'y': a setting is written key=value"),
        ("edit in.png x step=2", "step: unknown (did you mean steps?)"),
        ("edit in.png x mask.expnd=2", "mask.expnd: unknown (did you mean mask.expand?)"),
        ("edit in.png x -o ./in.png", "in.png: is the picture to edit"),
        ("edit in.png x --steps 0", "steps = 0: must be a whole number, 1 or more"),
        ("edit in.png x --expand -1", "expand = -1.0: must be 0 or more"),
        ("edit in.png x --isolate 2", "isolate = 2.0: is a share of the steps"),
        ("edit in.png x --config gone.yaml", "gone.yaml: cannot be read: No such file"),
        ("edit in.png x --rules gone.yaml", "gone.yaml"),
        ("edit in.png x -b flux-kontxt", "backbone 'flux-kontxt': unknown (did you mean flux-kontext?)"),
        ("plan in.png x --planner mni", "planner 'mni': unknown (did you mean mini?)"),
        ("edit in.png --plan gone.json", "gone.json: No such file"),
        ("edit in.png --plan empty.json", "empty.json is empty"),
        ("edit in.png --plan broken.json", "broken.json is not JSON"),
        ("edit in.png --plan in.png", "in.png is not JSON"),
        ("edit in.png --plan other.json", "was made for a picture of 40x40, this one has 32x24"),
        ("edit in.png x --plan plan.json --baseline", "--baseline and --plan exclude each other"),
        ("edit --batch jobs.jsonl --candidates 2", "--batch and --candidates exclude each other"),
        ("edit --repeat out.json --also in.png", "--repeat and --also exclude each other"),
        ("edit in.png --plan plan.json --repeat out.json", "--repeat and --plan exclude each other"),
        ("mask in.png --plan gone.json", "gone.json: No such file"),
        ("mask in.png --plan many.json", "25 regions: at most 19"),
        ("edit --batch gone.jsonl -o out", "gone.jsonl: cannot be read: No such file"),
        ("edit in.png x -o plan.json/out.png", "plan.json: is a file, not a folder"),
        ("edit in.png x -o /proc/no/out.png", "/proc/no"),
    ],
)
def test_mistakes_exit_2_with_a_line_and_no_traceback(sh: Shell, plan_file: Path, words: str, message: str) -> None:
    sh.write("empty.json", "")
    sh.write("broken.json", '{"size": [32')
    one = plan.to_json(plan_for(picture()))
    sh.write("many.json", one | {"regions": one["regions"] * 25})
    sh.write("other.json", plan.to_json(plan_for(picture(40, 40))))
    result = sh(*shlex.split(words), code=2)
    assert message in result.stderr
    assert result.stdout == ""
    assert sh.backbone.requests == []


def test_wrong_options_exit_2(sh: Shell) -> None:
    assert "No such option" in sh("edit", "in.png", "x", "--stepz", "3", code=2).stderr
    assert "candidates" in sh("edit", "in.png", "x", "--candidates", "0", code=2).stderr
    assert "No such command" in sh("edti", code=2).stderr


def test_a_plan_for_the_same_picture_resized(sh: Shell, plan_file: Path) -> None:
    picture(64, 48).save("twice.png")
    sh("edit", "twice.png", "--plan", plan_file, "-o", "out.png")
    used = sh.backbone.plans[0]
    assert used is not None
    assert used.size == Size(64, 48)
    assert used.regions[0].box.as_tuple() == (4, 4, 60, 44)
    assert "plan rescaled from 32x24 to 64x48" in record.read(Path("out.json")).notes


def test_a_given_plan_that_cannot_be_carried_out_is_the_users_mistake(sh: Shell, plan_file: Path) -> None:
    def before(request: EditRequest) -> None:
        raise PlanError("25 regions: at most 19")

    sh.before = before
    assert sh("edit", "in.png", "--plan", plan_file, code=2).stderr.endswith("error: 25 regions: at most 19\n")
    sh("edit", "in.png", "x", code=1)


def test_bugs_keep_their_traceback(sh: Shell) -> None:
    def before(request: EditRequest) -> None:
        raise ZeroDivisionError

    sh.before = before
    result = CliRunner().invoke(app, ["edit", "in.png", "x"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_full_disk_keeps_finished_candidates(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from replan import images

    real = images.write_atomic

    def write(path: str | Path, content: bytes) -> None:
        if Path(path).name == "out_1.png":
            raise images.ImageError(f"{path}: cannot be written: No space left on device") from OSError(
                errno.ENOSPC, "x"
            )
        real(path, content)

    monkeypatch.setattr(images, "write_atomic", write)
    result = sh("edit", "in.png", "x", "--candidates", 3, "-o", "out.png", code=1)
    assert "No space left on device; what was finished is kept" in result.stderr
    assert {"out_0.png", "out_0.json"} == sh.files()


def test_out_of_memory_says_what_to_try(sh: Shell) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def before(request: EditRequest) -> None:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    sh.before = before
    assert "Try --offload model" in sh("edit", "in.png", "x", code=1).stderr


# the real process


SLOW = """
import time
import replan.cli.console
from fakes import FakeBackbone, FakePlanner
from replan.cli import main
from replan.edit import Editor
from replan.record import Setup

def wait(request):
    if request.instruction == "slow":
        print("started", flush=True)
        time.sleep(30)

replan.cli.console.quiet_libraries = lambda: None  # saves the import of both libraries
Setup.open = lambda setup: Editor(FakePlanner(), FakeBackbone(wait), setup.config)
main()
"""


def test_ctrl_c_in_a_real_process(sh: Shell) -> None:
    lines = [{"image": "in.png", "instruction": text, "id": text} for text in ("quick", "slow")]
    sh.write("jobs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "edit", "--batch", "jobs.jsonl", "-o", "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline().strip() != "started":
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; what was finished is kept" in told
    assert "Traceback" not in told
    assert {path.name for path in Path("out").iterdir()} == {"quick.png", "quick.json"}


def test_the_log_says_how_it_failed(capsys: pytest.CaptureFixture[str]) -> None:
    """Services tell a client only that they failed, and that the log has the rest."""
    import logging

    from replan.cli.console import start_log

    start_log()
    try:
        raise KeyError("a bug")
    except KeyError:
        logging.getLogger("replan.serve.desk").exception("a batch failed")
    told = capsys.readouterr().err
    assert "error: a batch failed" in told
    assert "Traceback" in told
    assert "KeyError: 'a bug'" in told
