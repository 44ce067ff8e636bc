"""Training data: one parquet file per split, read alike by every engine.

A row has the columns that verl expects, and holds everything that prompt and reward need:

    data_source   "replan/" and the kind of reward
    prompt        [{"role": "user", "content": text}] with one literal `<image>` where the picture goes
    images        [{"bytes": PNG, "path": ""}], in the very size that the planner will see
    ability       "edit"
    reward_model  {"style": "rule", "ground_truth": a Task as JSON}
    extra_info    {"index": row number, "split": name}

The picture is stored at sides of the model's own multiple, so that no processor resizes it again and boxes are pixels
of the stored picture. The file's metadata (`replan`) holds the settings and the counts of rows that were left out.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan.errors import ConfigError
from replan.train.reward import Examples
from replan.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE = "<image>"  # the picture's place in a stored prompt
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Task:
    """What a rollout is scored against, without the picture.

    frame       the size that the boxes of an answer are measured in
    examples    what the prompt shows and no answer may repeat
    extra       the row's extra_info as it was; the mini world's exact judge reads its seed there
    """

    id: int
    instruction: str
    expression: str
    answer: str
    frame: Size
    examples: Examples = field(default_factory=Examples)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The `ground_truth` of a row."""
        return json.dumps(
            {
                "id": self.id,
                "instruction": self.instruction,
                "expression": self.expression,
                "answer": self.answer,
                "frame": list(self.frame),
                "examples": {
                    "boxes": sorted(map(list, self.examples.boxes)),
                    "hints": sorted(self.examples.hints),
                    "reasoning": sorted(self.examples.reasoning),
                },
                "extra": self.extra,
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Read a row's `ground_truth`."""
        value = json.loads(text)
        examples = value.pop("examples")
        shown = Examples(
            frozenset(tuple(map(float, box)) for box in examples["boxes"]),
            frozenset(examples["hints"]),
            frozenset(examples["reasoning"]),
        )
        return cls(**value | {"frame": Size(*value["frame"]), "examples": shown})


@dataclass(frozen=True, slots=True)
class Row:
    """One training item: what is asked, the picture's PNG bytes, and what answers are scored against."""

    index: int
    prompt: str
    png: bytes = field(repr=False)
    task: Task

    def image(self) -> Image:
        """The picture as the planner sees it, RGB."""
        from PIL import Image as Images

        with Images.open(io.BytesIO(self.png)) as image:
            return image.convert("RGB")


def prompt_content(prompt: str) -> list[dict[str, str]]:
    """A stored prompt as the parts of a chat turn: text, the picture's place, text; empty texts are left out."""
    before, _, after = prompt.partition(IMAGE)
    parts = [{"type": "text", "text": before}, {"type": "image", "text": ""}, {"type": "text", "text": after}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


class Rows:
    """The rows of a parquet file, read on demand: a gigabyte of pictures need not stay in memory."""

    def __init__(self, path: Path) -> None:
        need_pyarrow()
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        self.path = path
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, arrow.ArrowInvalid) as error:
            raise ConfigError(f"data {path}: cannot be read ({error}); make it with: replan train data") from error
        about = (self._file.schema_arrow.metadata or {}).get(b"replan")
        if about is None:
            raise ConfigError(f"data {path}: was not made by replan; make it with: replan train data")
        self.about: Mapping[str, Any] = json.loads(about)
        groups = self._file.metadata
        self._starts: list[int] = [0]
        for number in range(groups.num_row_groups):
            self._starts.append(self._starts[-1] + groups.row_group(number).num_rows)
        self._kept: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        group = next(number for number, start in enumerate(self._starts[1:]) if index < start)
        number, rows = self._kept
        if number != group:
            rows = self._file.read_row_group(group).to_pylist()
            self._kept = (group, rows)
        fields = rows[index - self._starts[group]]
        return Row(
            index,
            fields["prompt"][0]["content"],
            fields["images"][0]["bytes"],
            Task.from_json(fields["reward_model"]["ground_truth"]),
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file: what a run was trained on."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def columns(row: Row, kind: str, split: str) -> dict[str, Any]:
    """A row as it is stored."""
    return {
        "data_source": f"replan/{kind}",
        "prompt": [{"role": "user", "content": row.prompt}],
        "images": [{"bytes": row.png, "path": ""}],
        "ability": "edit",
        "reward_model": {"style": "rule", "ground_truth": row.task.to_json()},
        "extra_info": {"index": row.index, "split": split},
    }


def schema(about: Mapping[str, Any]) -> Any:
    """The parquet schema, with `about` as its metadata."""
    import pyarrow as arrow

    text = arrow.string()
    return arrow.schema(
        [
            ("data_source", text),
            ("prompt", arrow.list_(arrow.struct([("role", text), ("content", text)]))),
            ("images", arrow.list_(arrow.struct([("bytes", arrow.binary()), ("path", text)]))),
            ("ability", text),
            ("reward_model", arrow.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", arrow.struct([("index", arrow.int64()), ("split", text)])),
        ],
        metadata={"replan": json.dumps(about, ensure_ascii=False)},
    )


def need_pyarrow() -> None:
    """Raises ConfigError when parquet files can be neither read nor written."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError("training data needs pyarrow: pip install 'replan[train]'") from error


def write_rows(path: Path, rows: list[Row], about: Mapping[str, Any], group: int = 64) -> None:
    """Write a parquet file, whole or not at all. `about` holds the settings that the rows were built with."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    from replan.images import write_atomic

    head = schema(about)
    kind, split = str(about["settings"]["kind"]), str(about["settings"]["split"])
    content = io.BytesIO()
    with parquet.ParquetWriter(content, head) as writer:
        for start in range(0, len(rows), group):
            part = [columns(row, kind, split) for row in rows[start : start + group]]
            writer.write_table(arrow.Table.from_pylist(part, schema=head))
    write_atomic(path, content.getvalue())
