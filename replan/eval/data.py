"""Items of a benchmark in IV-Edit's row schema: the mini world's, a dataset of the hub, a folder, parquet or JSONL.

A row has `image`, `prompt`, `answer` and `extra_info` (an object as a JSON string). A bad row is kept apart with its
index and the reason; it is never silently dropped.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from replan.errors import ConfigError, ImageError, ReplanError
from replan.images import ImageLimits, check_size, to_rgb
from replan.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image

UNKNOWN = "unknown"  # the category of an item whose row names none


class RowError(ReplanError, ValueError):
    """A row breaks the schema."""


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which items.

    source     mini (the embedded world), a hub id such as TainU/IV-Edit, a folder, or a .parquet, .jsonl or .arrow file
    split      split of a dataset that has several
    revision   commit or tag of a hub dataset
    limit      only the first so many rows
    referring  key in extra_info (or in its instruction_details) that names the referring type
    task       key that names the task type
    """

    source: str = "mini"
    split: str = "test"
    revision: str | None = None
    limit: int | None = None
    referring: str = "referring_type"
    task: str = "task_type"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"data.limit = {self.limit}: must be 1 or more")


@dataclass(frozen=True, slots=True)
class Item:
    """One row, checked. `read` gives the picture file's bytes; `expression` is empty where the row has none."""

    id: int
    instruction: str
    expression: str
    referring: str
    task: str
    answer: str
    extra: Mapping[str, Any]
    read: Callable[[], bytes] = field(repr=False, compare=False)

    def image(self) -> Image:
        """The source picture, upright RGB. Raises ImageError."""
        return decode(self.read(), f"item {self.id}")

    def digest(self) -> str:
        """SHA-256 of the picture file's bytes."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Bench:
    """The items of a benchmark, in order, and the rows that cannot be used."""

    items: tuple[Item, ...]
    bad: tuple[BadRow, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures should know about the data."""
        found = [f"row {row.index}: {row.reason}" for row in self.bad]
        bare = sum(not item.expression for item in self.items)
        if bare:
            found.append(f"{bare} of {len(self.items)} rows have no referring expression; judges see none for them")
        return tuple(found)


def load_bench(config: DataConfig) -> Bench:
    """Read and check every row. Raises ConfigError when there is no such data, or not one good row."""
    items: list[Item] = []
    bad: list[BadRow] = []
    seen: dict[int, int] = {}
    for index, row in _rows(config):
        try:
            if isinstance(row, RowError):
                raise row
            item = read_row(row, index, config)
            if item.id in seen:
                raise RowError(f"image_id {item.id} is already that of row {seen[item.id]}")
        except RowError as error:
            bad.append(BadRow(index, str(error)))
            continue
        seen[item.id] = index
        items.append(item)
    if not items:
        first = f"; row {bad[0].index}: {bad[0].reason}" if bad else ""
        raise ConfigError(f"data.source = {config.source}: not one usable row among {len(bad)}{first}")
    return Bench(tuple(items), tuple(bad))


def read_row(row: Mapping[str, Any], index: int, config: DataConfig) -> Item:
    """A row as an item. Raises RowError naming the field and the rule."""
    missing = [name for name in ("image", "prompt", "extra_info") if row.get(name) is None]
    if missing:
        raise RowError(f"{', '.join(missing)}: missing; the schema is image, prompt, answer, extra_info")
    prompt, answer = row["prompt"], row.get("answer")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RowError(f"prompt: {prompt!r} should be a text that says what to change")
    extra = _extra(row["extra_info"])
    read = _reader(row["image"])
    _check_header(read)
    return Item(
        id=_identifier(row.get("image_id", extra.get("image_id")), index),
        instruction=prompt.strip(),
        expression=_text(_find(extra, "referring_expression")),
        referring=_text(_find(extra, config.referring)) or UNKNOWN,
        task=_text(_find(extra, config.task)) or UNKNOWN,
        answer=answer if isinstance(answer, str) else "" if answer is None else json.dumps(answer),
        extra=extra,
        read=read,
    )


def decode(content: bytes, name: str) -> Image:
    """Bytes of a picture file as upright RGB. Raises ImageError."""
    from PIL import Image as Images

    try:
        with Images.open(io.BytesIO(content)) as image:
            check_size(Size(*image.size), ImageLimits(), name)
            return to_rgb(image)
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Images.DecompressionBombError) as error:
        raise ImageError(f"{name}: its picture is damaged: {error or type(error).__name__}") from error


def _extra(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"extra_info: not valid JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise RowError(f"extra_info: a {type(value).__name__}, should be an object")
    return value


def _find(extra: Mapping[str, Any], key: str) -> Any:
    """A key at the top of extra_info or among its instruction_details: published rows were read from both places."""
    details = extra.get("instruction_details")
    inner = details.get(key) if isinstance(details, Mapping) else None
    return extra[key] if extra.get(key) else inner


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return "" if value is None else str(value).strip()


def _identifier(value: Any, index: int) -> int:
    """A whole number: seeds are base seed + id. A row without one is known by its index."""
    if value is None:
        return index
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RowError(f"image_id: {value!r} should be a whole number, 0 or more")
    return value


def _reader(value: Any) -> Callable[[], bytes]:
    """How to get the bytes of a picture: given as bytes, as {bytes, path}, as a callable, or as a PIL picture."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = content if content is not None else Path(path) if path else None
    if callable(value):
        return cast("Callable[[], bytes]", value)
    if isinstance(value, bytes):
        return lambda: value
    if isinstance(value, Path):
        try:
            is_file = value.is_file()
        except OSError as error:  # a name that is too long
            raise RowError(f"image: {error.strerror}: {str(value)[:200]}...") from error
        if not is_file:
            raise RowError(f"image: there is no file {value}")
        return value.read_bytes
    if hasattr(value, "save"):
        content = io.BytesIO()
        value.save(content, format="PNG")
        return content.getvalue
    raise RowError(f"image: a {type(value).__name__}, should be a picture")


def _check_header(read: Callable[[], bytes]) -> None:
    from PIL import Image as Images

    try:
        with Images.open(io.BytesIO(read())) as image:
            check_size(Size(*image.size), ImageLimits(), "image")
    except (ReplanError, OSError, SyntaxError, ValueError, Images.DecompressionBombError) as error:
        raise RowError(f"image: not a picture that can be read: {error}") from error


# --- where rows come from --------------------------------------------------------------------------------------------

Row = Mapping[str, Any] | RowError


def _rows(config: DataConfig) -> Iterable[tuple[int, Row]]:
    path = Path(config.source)
    if config.source == "mini":
        from replan.mini.rows import rows

        return enumerate(rows(config.split, config.limit))
    if path.is_dir() and (path / f"{config.split}.jsonl").is_file():
        path = path / f"{config.split}.jsonl"
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return _jsonl(path, config.limit)
    return _dataset(config, path)


def _jsonl(path: Path, limit: int | None) -> Iterator[tuple[int, Row]]:
    """Rows of a JSONL file; `image` is a path relative to the file, or the picture's bytes in base64."""
    index = 0
    for line in path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines():  # text has line ends that JSON has not
        if not line.strip():
            continue
        if limit is not None and index >= limit:
            return
        yield index, _json_row(line, path.parent)
        index += 1


def _json_row(line: bytes, root: Path) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return RowError(f"not valid JSON: {error}")
    if not isinstance(row, dict):
        return RowError(f"a {type(row).__name__}, should be an object")
    image = row.get("image")
    if isinstance(image, str):
        if (root / image[:1000]).suffix and not image.startswith("data:"):
            return row | {"image": root / image}
        try:
            return row | {"image": base64.b64decode(image.rpartition(",")[2], validate=True)}
        except binascii.Error:
            return RowError("image: neither a path of a picture nor base64")
    return row


def _dataset(config: DataConfig, path: Path) -> Iterator[tuple[int, Row]]:
    data = _open_dataset(config, path)
    lacking = {"image", "prompt", "extra_info"} - set(data.column_names)
    if lacking:
        raise ConfigError(
            f"data.source = {config.source}: no column {', '.join(sorted(lacking))}; "
            f"it has {', '.join(data.column_names)}, and IV-Edit's schema is image, prompt, answer, extra_info"
        )
    from datasets import Image as Picture

    try:
        data = data.cast_column("image", Picture(decode=False))  # so that one broken picture does not end the iteration
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's are of these kinds
        raise ConfigError(f"data.source = {config.source}: column image holds no pictures ({error})") from error
    if config.limit is not None:
        data = data.select(range(min(config.limit, len(data))))
    words = data.remove_columns(["image"])
    for index in range(len(data)):
        yield index, words[index] | {"image": _lazy_picture(data, index)}


def _lazy_picture(data: Any, index: int) -> Callable[[], bytes]:
    """Bytes on demand: a gigabyte of pictures need not stay in memory."""

    def read() -> bytes:
        value = data[index]["image"]
        if value is None or (value["bytes"] is None and not value["path"]):
            raise ValueError("no picture in the row")
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    return read


def _open_dataset(config: DataConfig, path: Path) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError(f"data.source = {config.source}: needs datasets: pip install 'replan[eval]'") from error
    try:
        if path.is_file():
            kind = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}.get(path.suffix)
            if kind is None:
                raise ConfigError(f"data.source = {path}: use a .parquet, .arrow or .jsonl file, or a folder")
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
            return found[config.split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(config.source, split=config.split, revision=config.revision)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data.source = {config.source}, split {config.split}: cannot be loaded ({reason}); "
            "give a hub id, a folder, a .parquet or .jsonl file, or mini"
        ) from error
