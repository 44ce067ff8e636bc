"""Rows: every source reads the same items; bad rows are told with index and reason."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from replan import plan
from replan.errors import ConfigError
from replan.eval.data import Bench, DataConfig, load_bench
from replan.mini import rows
from replan.mini.judge import judge
from replan.mini.scenes import draw

datasets = pytest.importorskip("datasets")
COUNT = 5


@pytest.fixture(scope="module")
def mini() -> Bench:
    return load_bench(DataConfig(limit=COUNT))


def told(bench: Bench) -> list[Any]:
    return [(i.id, i.instruction, i.expression, i.referring, i.task, i.answer, i.extra, i.read()) for i in bench.items]


def write_jsonl(folder: Path, *lines: Any) -> DataConfig:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, format="PNG")
    (folder / "a.png").write_bytes(picture.getvalue())
    path = folder / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return DataConfig(source=str(path))


def good(**fields: Any) -> dict[str, Any]:
    return {"image": "a.png", "prompt": "make it blue", "answer": "", "extra_info": "{}"} | fields


def test_mini_test_split_has_500_items_with_exact_answers() -> None:
    bench = load_bench(DataConfig())
    assert (len(bench.items), bench.bad) == (500, ())
    item = rows.item_of(bench.items[7].extra)
    assert item is not None
    assert item.instruction == bench.items[7].instruction
    assert judge(item, draw(item.target)).success
    assert plan.parse(bench.items[7].answer, item.plan.size).regions == item.plan.regions


def test_jsonl_folder_and_file(mini: Bench, tmp_path: Path) -> None:
    path = rows.export(tmp_path, "test", COUNT)
    for source in (path, tmp_path):
        assert told(load_bench(DataConfig(source=str(source)))) == told(mini)


@pytest.mark.parametrize("form", ["parquet", "saved", "saved with splits", "folder of parquet"])
def test_datasets_of_every_form(form: str, mini: Bench, tmp_path: Path) -> None:
    fields = list(rows.rows("test", COUNT))
    kinds = datasets.Features(
        {"image": datasets.Image(), **{name: datasets.Value("string") for name in ("prompt", "answer", "extra_info")}}
    )
    made = [row | {"image": {"bytes": row["image"], "path": None}} for row in fields]
    data = datasets.Dataset.from_list(made, features=kinds)
    path = tmp_path / "data"
    if form == "parquet":
        path = path.with_suffix(".parquet")
        data.to_parquet(path)
    elif form == "folder of parquet":
        path.mkdir()
        data.to_parquet(path / "test-00000-of-00001.parquet")
    elif form == "saved":
        data.save_to_disk(str(path))
    else:
        datasets.DatasetDict({"test": data, "train": data.select([0])}).save_to_disk(str(path))
    assert told(load_bench(DataConfig(source=str(path)))) == told(mini)
    assert len(load_bench(DataConfig(source=str(path), limit=2)).items) == 2


def test_a_broken_picture_in_parquet_is_one_bad_row(tmp_path: Path) -> None:
    kinds = datasets.Features(
        {"image": datasets.Image(), "prompt": datasets.Value("string"), "extra_info": datasets.Value("string")}
    )
    whole = next(rows.rows("test", 1))["image"]
    made = [
        {"image": {"bytes": content, "path": None}, "prompt": "p", "extra_info": "{}"}
        for content in (whole, b"no", whole)
    ]
    datasets.Dataset.from_list(made, features=kinds).to_parquet(tmp_path / "x.parquet")
    bench = load_bench(DataConfig(source=str(tmp_path / "x.parquet")))
    assert [item.id for item in bench.items] == [0, 2]
    assert [(row.index, "not a picture" in row.reason) for row in bench.bad] == [(1, True)]


@pytest.mark.parametrize(
    "extra", [{"referring_expression": "the cup"}, {"instruction_details": {"referring_expression": "the cup"}}]
)
def test_both_places_of_the_referring_expression(extra: dict[str, Any], tmp_path: Path) -> None:
    for form in (extra, json.dumps(extra)):
        bench = load_bench(write_jsonl(tmp_path, good(extra_info=form)))
        assert bench.items[0].expression == "the cup"
        assert bench.notes == ()


@pytest.mark.parametrize("empty", [None, {"bytes": None, "path": None}, {"bytes": None, "path": "/no/such.png"}])
def test_a_missing_picture_in_parquet_is_one_bad_row(empty: Any, tmp_path: Path) -> None:
    whole = {"bytes": next(rows.rows("test", 1))["image"], "path": None}
    made = [{"image": image, "prompt": "p", "extra_info": "{}"} for image in (whole, empty)]
    datasets.Dataset.from_list(made).to_parquet(tmp_path / "x.parquet")
    bench = load_bench(DataConfig(source=str(tmp_path / "x.parquet")))
    assert ([item.id for item in bench.items], [row.index for row in bench.bad]) == ([0], [1])


def test_lines_end_where_json_lines_end_and_bytes_that_are_no_text_are_one_bad_row(tmp_path: Path) -> None:
    config = write_jsonl(tmp_path)
    lines = [
        json.dumps(good(prompt="one\u2028two\x85three"), ensure_ascii=False).encode(),
        b"\xff\xfe\x00",
        b"[" * 9999,
    ]
    Path(config.source).write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    bench = load_bench(config)
    assert [item.instruction for item in bench.items] == ["one\u2028two\x85three"]
    assert [row.index for row in bench.bad] == [1, 2]


BAD = [
    (good(image="a.b" * 2000), "image: File name too long"),
    ("{oops", "not valid JSON"),
    ("[1]", "should be an object"),
    (good(prompt="  "), "prompt: '  ' should be a text"),
    (good(prompt=None), "prompt: missing"),
    (good(extra_info="{"), "extra_info: not valid JSON"),
    (good(extra_info="[]"), "extra_info: a list"),
    (good(image="gone.png"), "there is no file"),
    (good(image="rows.jsonl"), "not a picture that can be read"),
    (good(image=5), "a int, should be a picture"),
    (good(image_id="x1"), "image_id: 'x1' should be a whole number"),
    (good(image_id=0), "image_id 0 is already that of row 0"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason[:20] for _, reason in BAD])
def test_bad_rows_are_told_and_counted(line: Any, reason: str, tmp_path: Path) -> None:
    bench = load_bench(write_jsonl(tmp_path, good(image_id=0), line, good()))
    assert [item.id for item in bench.items] == [0, 2]
    assert [row.index for row in bench.bad] == [1]
    assert reason in bench.bad[0].reason
    assert any(note.startswith("row 1: ") for note in bench.notes)


def test_base64_pictures_ids_and_categories(tmp_path: Path) -> None:
    config = write_jsonl(tmp_path, good())
    content = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    extra = {"image_id": "17", "category": ["a", "b"], "task_type": "State"}
    config = write_jsonl(
        tmp_path, good(image=content, extra_info=extra), good(image=f"data:image/png;base64,{content}")
    )
    first, second = load_bench(DataConfig(source=config.source, referring="category")).items
    assert (first.id, first.referring, first.task) == (17, "a, b", "State")
    assert (second.id, second.referring, second.expression) == (1, "unknown", "")
    assert first.image().size == second.image().size == (32, 32)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    for source, reason in (
        (str(tmp_path / "none"), "cannot be loaded"),
        (str(tmp_path / "x.txt"), r"use a .parquet, .arrow or .jsonl"),
        (write_jsonl(tmp_path, "{").source, "not one usable row among 1; row 0"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_bench(DataConfig(source=source))
    with pytest.raises(ConfigError, match="split 'train': the mini world has dev, test"):
        load_bench(DataConfig(split="train"))
    datasets.Dataset.from_list([good(image=1)]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="column image holds no pictures"):
        load_bench(DataConfig(source=str(tmp_path / "x.parquet")))
    datasets.Dataset.from_list([{"picture": 1, "prompt": "p"}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"no column extra_info, image; it has picture, prompt"):
        load_bench(DataConfig(source=str(tmp_path / "x.parquet")))
