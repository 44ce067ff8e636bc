"""Many edits from a file: bad lines, resume, failures, a full disk, Ctrl-C. Everything but the models is real."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackbone, FakePlanner, picture, plan_for, with_hint
from PIL import Image

from replan import batch, config, images, plan, record
from replan.backbones import EditConfig, Runtime
from replan.batch import Job, Outcome, read_jobs, run
from replan.edit import Editor
from replan.errors import ConfigError
from replan.planner import PlannerConfig
from replan.record import Setup
from replan.types import EditRequest


@pytest.fixture
def setup() -> Setup:
    return Setup("mini", "mini", config.load(EditConfig, "edit/mini", ["steps=2"]), Runtime(), PlannerConfig())


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    for number in range(4):
        picture(32 + number).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{number}.png", "instruction": f"edit {number}"} for number in range(4)]
    return jobs_of(tmp_path, lines)


def jobs_of(folder: Path, lines: list[dict]) -> list[Job]:
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, problems = read_jobs(path)
    assert problems == []
    return found


def go(
    jobs: list[Job], folder: Path, setup: Setup, before: Callable[[EditRequest], Any] | None = None, seed: int = 0
) -> tuple[list[Outcome], int]:
    """Outcomes, and how many edits were really made."""
    backbone = FakeBackbone(before)
    editor = Editor(FakePlanner(), backbone, setup.config)
    outcomes = list(run(jobs, folder, setup, seed, lambda request: editor(request, strict=setup.strict)))
    return outcomes, len(backbone.requests)


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def test_results_and_sidecars(tmp_path: Path, jobs: list[Job], setup: Setup) -> None:
    outcomes, made = go(jobs, tmp_path / "out", setup)
    assert (statuses(outcomes), made) == (["done"] * 4, 4)
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert Image.open(outcome.path).size == Image.open(job.image).size
        found = record.read(outcome.path.with_suffix(".json"))
        assert (found.instruction, found.image.path) == (job.instruction, str(job.image))
        assert found.plan is not None
        assert (found.plan["reasoning"], found.plan["raw"]) == ("the left half is meant", "<think>raw</think>")
        assert found.result.sha256 == record.sha256(outcome.path)
        assert found.setup() == setup


def test_resume_does_nothing_twice(tmp_path: Path, jobs: list[Job], setup: Setup) -> None:
    first, _ = go(jobs, tmp_path / "out", setup)
    times = [outcome.path.stat().st_mtime_ns for outcome in first]
    again, made = go(jobs, tmp_path / "out", setup)
    assert (statuses(again), made) == (["skipped"] * 4, 0)
    assert [outcome.path.stat().st_mtime_ns for outcome in again] == times
    assert [outcome.id for outcome in again] == [outcome.id for outcome in first]


def test_order_and_neighbours_do_not_matter(tmp_path: Path, jobs: list[Job], setup: Setup) -> None:
    go(jobs, tmp_path / "all", setup)
    go(jobs[::-1][:2], tmp_path / "some", setup)
    names = sorted(path.name for path in (tmp_path / "some").glob("*.png"))
    assert len(names) == 2
    assert all((tmp_path / "all" / name).read_bytes() == (tmp_path / "some" / name).read_bytes() for name in names)


@pytest.mark.parametrize("change", ["instruction", "picture", "seed", "plan", "config", "default seed"])
def test_a_changed_job_is_redone(tmp_path: Path, setup: Setup, change: str) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    line: dict = {"image": "a.png", "instruction": "red", "id": "a", "plan": plan.to_json(plan_for(image))}
    seed = 0
    go(jobs_of(tmp_path, [line]), tmp_path / "out", setup)
    before = (tmp_path / "out" / "a.png").read_bytes()
    match change:
        case "instruction":
            line["instruction"] = "blue"
        case "picture":
            image.putpixel((0, 0), (1, 2, 3))
            image.save(tmp_path / "a.png")
        case "seed":
            line["seed"] = 5
        case "default seed":
            seed = 5
        case "plan":
            line["plan"] = plan.to_json(with_hint(plan_for(image), "another"))
        case "config":
            setup = replace(setup, config=replace(setup.config, steps=3))
    outcomes, made = go(jobs_of(tmp_path, [line]), tmp_path / "out", setup, seed=seed)
    assert (statuses(outcomes), made) == (["done"], 1)
    if change not in ("instruction",):  # a given plan, not the instruction, decides the pixels
        assert (tmp_path / "out" / "a.png").read_bytes() != before
    assert statuses(go(jobs_of(tmp_path, [line]), tmp_path / "out", setup, seed=seed)[0]) == ["skipped"]


def test_strict_is_no_change(tmp_path: Path, jobs: list[Job], setup: Setup) -> None:
    go(jobs, tmp_path / "out", setup)
    assert statuses(go(jobs, tmp_path / "out", replace(setup, strict=True))[0]) == ["skipped"] * 4


def test_a_lost_picture_is_made_again(tmp_path: Path, jobs: list[Job], setup: Setup) -> None:
    outcomes, _ = go(jobs, tmp_path / "out", setup)
    outcomes[1].path.unlink()
    outcomes[2].path.with_suffix(".json").write_text("{}")
    assert statuses(go(jobs, tmp_path / "out", setup)[0]) == ["skipped", "done", "done", "skipped"]


def test_a_failed_item_is_recorded_and_tried_again(tmp_path: Path, jobs: list[Job], setup: Setup) -> None:
    def before(request: EditRequest) -> None:
        if request.instruction == "edit 1":
            raise ZeroDivisionError("a bug in a model")

    outcomes, _ = go(jobs, tmp_path / "out", setup, before)
    assert statuses(outcomes) == ["done", "failed", "done", "done"]
    assert outcomes[1].error == "ZeroDivisionError: a bug in a model"
    (failure,) = (tmp_path / "out").glob("*.failed.json")
    told = json.loads(failure.read_text())
    assert (told["line"], "a bug in a model" in told["traceback"]) == (2, True)
    again, made = go(jobs, tmp_path / "out", setup)
    assert (statuses(again), made) == (["skipped", "done", "skipped", "skipped"], 1)
    assert list((tmp_path / "out").glob("*.failed.json")) == []


def test_a_picture_that_cannot_be_read_fails_alone(tmp_path: Path, jobs: list[Job], setup: Setup) -> None:
    good = jobs[1].image.read_bytes()
    jobs[1].image.write_bytes(b"no picture")
    outcomes, _ = go(jobs, tmp_path / "out", setup)
    assert statuses(outcomes) == ["done", "failed", "done", "done"]
    assert "not a picture" in str(outcomes[1].error)
    assert (tmp_path / "out" / "line-0002.failed.json").is_file()
    jobs[1].image.write_bytes(good)
    assert statuses(go(jobs, tmp_path / "out", setup)[0]) == ["skipped", "done", "skipped", "skipped"]
    assert list((tmp_path / "out").glob("*.failed.json")) == []


def test_the_source_is_never_overwritten(tmp_path: Path, setup: Setup) -> None:
    picture().save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    outcomes, made = go(jobs_of(tmp_path, [{"image": "a.png", "instruction": "red", "id": "a"}]), tmp_path, setup)
    assert (statuses(outcomes), made) == (["failed"], 0)
    assert "is the picture to edit" in str(outcomes[0].error)
    assert (tmp_path / "a.png").read_bytes() == before


def test_strict_planning_failures_fail_alone(tmp_path: Path, setup: Setup) -> None:
    picture().save(tmp_path / "a.png")
    jobs = jobs_of(tmp_path, [{"image": "a.png", "instruction": text} for text in ("nonsense", "outage", "fine")])
    assert statuses(go(jobs, tmp_path / "a", setup)[0]) == ["done", "failed", "done"]
    outcomes, _ = go(jobs, tmp_path / "b", replace(setup, strict=True))
    assert statuses(outcomes) == ["failed", "failed", "done"]
    assert outcomes[0].error == "no tags in the answer"


@pytest.mark.parametrize("suffix", [".png", ".json"])
def test_a_full_disk_stops_and_keeps_what_is_finished(
    tmp_path: Path, jobs: list[Job], setup: Setup, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    real, written = images.write_atomic, []

    def write(path: str | Path, content: bytes) -> None:
        if Path(path).suffix == suffix:
            written.append(path)
            if len(written) == 3:
                raise images.ImageError(f"{path}: no space left") from OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(images, "write_atomic", write)
    monkeypatch.setattr(record, "write_atomic", write)
    editor = Editor(FakePlanner(), FakeBackbone(), setup.config)
    outcomes: list[Outcome] = []
    with pytest.raises(images.ImageError, match="no space left"):
        outcomes.extend(run(jobs, tmp_path / "out", setup, 0, editor))
    assert statuses(outcomes) == ["done", "done"]
    monkeypatch.undo()
    assert statuses(go(jobs, tmp_path / "out", setup)[0]) == ["skipped", "skipped", "done", "done"]


def test_ctrl_c_loses_only_the_item_in_hand(tmp_path: Path, jobs: list[Job], setup: Setup) -> None:
    def before(request: EditRequest) -> None:
        if request.instruction == "edit 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(jobs, tmp_path / "out", setup, before)
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert statuses(go(jobs, tmp_path / "out", setup)[0]) == ["skipped", "skipped", "done", "done"]


def test_plan_files_and_objects(tmp_path: Path, setup: Setup) -> None:
    image = picture(32, 24)
    image.save(tmp_path / "a.png")
    picture(64, 48).save(tmp_path / "twice.png")
    made = plan.to_json(plan_for(image))
    (tmp_path / "plan.json").write_text(json.dumps(made))
    lines = [
        {"image": "a.png", "plan": made, "id": "object"},
        {"image": "a.png", "plan": "plan.json", "id": "file"},
        {"image": "twice.png", "plan": "plan.json", "id": "twice"},
    ]
    outcomes, _ = go(jobs_of(tmp_path, lines), tmp_path / "out", setup)
    assert statuses(outcomes) == ["done"] * 3
    assert (tmp_path / "out" / "object.png").read_bytes() == (tmp_path / "out" / "file.png").read_bytes()
    assert "plan rescaled from 32x24 to 64x48" in record.read(tmp_path / "out" / "twice.json").notes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON: Expecting property name"),
        ("[1]", "holds a list, not an object"),
        ('{"instruction": "x"}', "image: missing"),
        ('{"image": "a.png"}', "instruction: missing (or give a plan)"),
        ('{"image": "a.png", "instruction": "  "}', "instruction: missing (or give a plan)"),
        ('{"image": "gone.png", "instruction": "x"}', "image: there is no file"),
        ('{"image": ".", "instruction": "x"}', "image: there is no file"),
        ('{"image": 3, "instruction": "x"}', "image: 3 should be a text"),
        ('{"image": "a.png", "instruction": "x", "seed": "1"}', "seed: '1' should be a whole number"),
        ('{"image": "a.png", "instruction": "x", "seed": true}', "seed: True should be a whole number"),
        ('{"image": "a.png", "plan": [1]}', "plan: [1] should be an object or a text"),
        ('{"image": "a.png", "plan": "gone.json"}', "plan: there is no file"),
        ('{"image": "a.png", "instruktion": "x"}', "instruktion: unknown (did you mean instruction?)"),
        ('{"image": "a.png", "instruction": "x", "id": "../up"}', "id: '../up' becomes a file name"),
        ('{"image": "a.png", "instruction": "x", "id": ""}', "id: '' becomes a file name"),
        ('{"image": "a.png", "instruction": "x", "id": "first"}', "id 'first' is already that of line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    picture().save(tmp_path / "a.png")
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"image": "a.png", "instruction": "x", "id": "first"}\n\n' + line + "\n")
    jobs, problems = read_jobs(path)
    assert [job.line for job in jobs] == [1]
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:3: {message}")


def test_a_jobs_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "gone", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=message):
            read_jobs(path)
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a text file"):
        read_jobs(tmp_path / "bad")


def test_keys_differ_where_results_may(setup: Setup) -> None:
    image = picture()
    base = EditRequest(image, "red", 0)
    other = replace(setup, runtime=Runtime(lora=("x",)))
    variants = [
        batch.job_key(base, "a", setup),
        batch.job_key(base, "b", setup),
        batch.job_key(replace(base, seed=1), "a", setup),
        batch.job_key(replace(base, instruction="blue"), "a", setup),
        batch.job_key(replace(base, plan=plan_for(image)), "a", setup),
        batch.job_key(base, "a", other),
        batch.job_key(base, "a", replace(setup, baseline=True)),
        batch.job_key(base, "a", replace(setup, backbone="flux-kontext")),
    ]
    assert len(set(variants)) == len(variants)
