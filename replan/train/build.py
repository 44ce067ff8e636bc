"""Builds training data: rows of reason_edit_base's schema, or the mini world, to parquet; nothing is lost unsaid."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from replan import config as configs
from replan.errors import ConfigError, ImageError
from replan.eval.data import BadRow, DataConfig, Item, RowError, load_bench, read_row
from replan.images import fit_area
from replan.plan import default_template
from replan.planner.base import PROMPT_FILE, prompt_parts
from replan.train.data import FORMAT, IMAGE, Row, Task, need_pyarrow, prompt_content, write_rows
from replan.train.detection import read_objects, rescaled
from replan.train.reward import Kind, examples_of
from replan.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image

MINI = "mini"
FIRST_SEED = {"train": 1 << 42}  # of the mini world's items; apart from its held-out splits and from what it learnt on
_CONTROL = re.compile(r"<\|[^|<>]{1,40}\|>")  # a chat model's control tokens, in a user's words


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """Which rows, and how they are asked.

    source      mini, a hub id such as TainU/reason_edit_base, a folder, or a .parquet, .jsonl or .arrow file
    split       train, dev, test or what the dataset has
    count       only the first so many rows; the mini world's train split is endless and takes 2,000 by default
    model       the planner that will be trained: its tokenizer counts the prompt, its folder may bring a template
    template    prompt file; null: the model's own, else the package's (detection: the package's for finding objects)
    order       image_first, as planners are asked; text_first: rules, picture, request, as in the released training
    frame       seen: boxes in pixels of the stored picture; thousand: in thousandths of each side
    multiple    sides of stored pictures are multiples of this: the model's patch size times its merge size
    max_pixels  stored pictures are no larger
    max_prompt  tokens, the picture's included; longer prompts are left out and counted
    """

    source: str = MINI
    split: str = "train"
    revision: str | None = None
    count: int | None = None
    model: str | None = None
    template: str | None = None
    order: Literal["image_first", "text_first"] = "image_first"
    frame: Literal["seen", "thousand"] = "seen"
    multiple: int = 28
    max_pixels: int = 1_204_224
    max_prompt: int = 2048
    kind: Kind = "edit"

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"count = {self.count}: must be 1 or more")
        if self.multiple < 1 or self.max_pixels < self.multiple**2:
            raise ConfigError(f"max_pixels = {self.max_pixels}: must be at least multiple² = {self.multiple**2}")


@dataclass(frozen=True, slots=True)
class Built:
    """What was written, and what was left out and why."""

    path: Path
    written: int
    overlong: tuple[BadRow, ...]
    broken: tuple[BadRow, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each row that was left out."""
        return tuple(f"row {row.index}: {row.reason}" for row in (*self.broken, *self.overlong))

    def counts(self) -> dict[str, int]:
        """How many rows were written, overlong, and broken by their kind of fault."""
        kinds = Counter(row.reason.partition(":")[0] for row in self.broken)
        found = {"written": self.written, "overlong": len(self.overlong), "broken": len(self.broken)}
        return found | {f"broken, {kind}": count for kind, count in sorted(kinds.items())}


def build(settings: BuildConfig, path: Path) -> Built:
    """Write the parquet. Raises ConfigError when there is no such data, or not one usable row."""
    need_pyarrow()  # before the work, not after it
    items, broken = _items(settings)
    template, tokenizer = _template(settings), _tokenizer(settings)
    rows, overlong = list[Row](), list[BadRow]()
    for item in items:
        try:
            row = make_row(item, len(rows), template, settings)
        except ImageError as error:
            broken.append(BadRow(item.id, f"image: {error}"))
            continue
        except RowError as error:
            broken.append(BadRow(item.id, str(error)))
            continue
        length = _length(row, tokenizer, settings)
        if length > settings.max_prompt:
            overlong.append(BadRow(item.id, f"prompt of {length} tokens: max_prompt is {settings.max_prompt}"))
        else:
            rows.append(row)
    built = Built(path, len(rows), tuple(overlong), tuple(broken))
    if not rows:
        raise ConfigError(f"source = {settings.source}: not one usable row; {'; '.join(built.notes[:3])}")
    about = {"format": FORMAT, "settings": configs.dump(settings), "counts": built.counts(), "left_out": built.notes}
    write_rows(path, rows, about)
    return built


def make_row(item: Item, index: int, template: str, settings: BuildConfig) -> Row:
    """One item as a row. Raises ImageError, and RowError for a detection row without known objects."""
    image = item.image()
    size = Size(*image.size)
    seen = fit_area(size, settings.max_pixels, settings.multiple)
    if seen != size:
        image = image.resize(seen)
    frame = Size(1000, 1000) if settings.frame == "thousand" else seen
    before, after = prompt_parts(_safe(template), _safe(item.instruction), frame)
    prompt = before + IMAGE + after if settings.order == "text_first" else IMAGE + before + after
    answer = _objects(item.answer, size, frame) if settings.kind == "detection" else item.answer
    task = Task(item.id, item.instruction, item.expression, answer, frame, examples_of(template), item.extra)
    return Row(index, prompt, _png(image), task)


def _objects(answer: str, size: Size, frame: Size) -> str:
    """A detection row's answer, measured in the frame in which the planner answers. Raises RowError."""
    try:
        return json.dumps(rescaled(read_objects(answer), size, frame))
    except ValueError as error:
        raise RowError(f"answer: {error}") from error


def _items(settings: BuildConfig) -> tuple[Iterator[Item] | tuple[Item, ...], list[BadRow]]:
    if settings.source == MINI and settings.split in FIRST_SEED:
        return _mini(FIRST_SEED[settings.split], settings.count or 2000), []
    bench = load_bench(DataConfig(settings.source, settings.split, settings.revision, settings.count))
    return bench.items, list(bench.bad)


def _mini(first: int, count: int) -> Iterator[Item]:
    from replan.mini.instructions import item_at
    from replan.mini.rows import row

    for number in range(count):
        seed = first + number
        fields = row(item_at(seed), number, seed)
        try:
            yield read_row(fields, number, DataConfig())
        except RowError as error:  # the world itself is broken
            raise ConfigError(f"mini, seed {seed}: {error}") from error


def _template(settings: BuildConfig) -> str:
    """The configured file, else the one in the model's folder or the package's; for detection always the package's."""
    path = settings.template
    if path is None and settings.kind == "detection":
        return default_template("detect")
    if path is None and settings.model is not None:
        from transformers.utils.hub import cached_file

        path = cached_file(
            model_folder(settings.model),
            PROMPT_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if path is None:
        return default_template()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"template = {path}: cannot be read: {error}") from error


def _tokenizer(settings: BuildConfig) -> Any:
    if settings.model is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_folder(settings.model))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model = {settings.model}: no tokenizer can be loaded: {error}") from error


def _length(row: Row, tokenizer: Any, settings: BuildConfig) -> int:
    """Tokens of a prompt: the chat text, and the picture's cells. Without a tokenizer four letters are one token."""
    width, height = _picture_size(row)
    cells = width * height // settings.multiple**2
    if tokenizer is None:
        return cells + len(row.prompt) // 4
    turns = [{"role": "user", "content": prompt_content(row.prompt)}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return cells + len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 1  # the picture's own place


def _picture_size(row: Row) -> Size:
    return Size(*row.image().size)


def _safe(text: str) -> str:
    """Words that would open a picture or end the turn lose their brackets."""
    return _CONTROL.sub(" ", text).replace(IMAGE, "image")


def _png(image: Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def model_folder(name: str) -> str:
    """`mini` as the folder inside the package; other names as they are."""
    if name != MINI:
        return name
    from importlib.resources import files

    return str(files("replan").joinpath("mini", "weights", "planner"))
