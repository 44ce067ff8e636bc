"""One self-contained page to look at runs: pictures, boxes, plans, scores and the judge's reasons; no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan.errors import ConfigError, ImageError
from replan.eval.data import Item
from replan.eval.generate import FAILED, PICTURE, read_done, read_json
from replan.eval.pixels import COLUMNS, PIXELS
from replan.eval.score import SCORES, read_scores
from replan.images import load_image, write_atomic
from replan.judge import DIMENSIONS

if TYPE_CHECKING:
    from PIL.Image import Image


def write(
    items: Sequence[Item], folders: Sequence[Path], output: Path, judge: str | None = None, side: int = 512
) -> None:
    """Write the page over one run, or two beside each other. Raises ConfigError."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"{folders[0]}: named twice; compare two different runs")
    scores = [_scores(folder, judge) for folder in folders]
    runs = [
        {"name": folder.resolve().name, "judge": (found or {}).get("judge")}
        for folder, found in zip(folders, scores, strict=True)
    ]
    rows = [{int(row["id"]): row for row in (found or {}).get("items", [])} for found in scores]
    measured = [read_json(folder / PIXELS).get("items", {}) for folder in folders]
    entries = []
    for item in items:
        results = [
            _result(folder, item, rows[place].get(item.id, {}), measured[place].get(str(item.id), {}), side)
            for place, folder in enumerate(folders)
        ]
        entries.append(_entry(item, results, side))
    data = {"runs": runs, "dimensions": list(DIMENSIONS), "pixels": list(COLUMNS), "items": entries}
    write_atomic(output, page(data).encode())


def page(data: Mapping[str, Any]) -> str:
    """The page around its data. Data is JSON in which no tag can end or begin, and the script sets text, never HTML.

    A content security policy allows no other script than ours, and no connection at all.
    """
    parts = {name: _asset(name) for name in ("browse.html", "browse.css", "browse.js")}
    mark = base64.b64encode(hashlib.sha256(parts["browse.js"].encode()).digest()).decode()
    text = json.dumps(data, ensure_ascii=True, allow_nan=False)
    for risky in "<>&":
        text = text.replace(risky, f"\\u{ord(risky):04x}")
    fill = {"@CSS@": parts["browse.css"], "@JS@": parts["browse.js"], "@HASH@": mark, "@DATA@": text}
    html = parts["browse.html"]
    for name, value in fill.items():  # @DATA@ comes last: nothing in the data is looked at for marks
        html = html.replace(name, value, 1)
    return html


def _asset(name: str) -> str:
    return resources.files("replan.eval").joinpath(name).read_text(encoding="utf-8")


def _scores(folder: Path, judge: str | None) -> Mapping[str, Any] | None:
    """A run that is not scored yet can be looked at all the same."""
    return read_scores(folder, judge) if judge or any((folder / SCORES).glob("*.json")) else None


def _entry(item: Item, results: Sequence[Mapping[str, Any]], side: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": item.id,
        "instruction": item.instruction,
        "expression": item.expression,
        "referring": item.referring,
        "task": item.task,
        "results": list(results),
    }
    try:
        source = item.image()
    except ImageError as error:
        return entry | {"size": [1, 1], "source": None, "error": str(error)}
    return entry | {"size": list(source.size), "source": data_url(source, side)}


def _result(folder: Path, item: Item, row: Mapping[str, Any], measured: Mapping[str, Any], side: int) -> dict[str, Any]:
    done = read_done(folder, item.id)
    if done is None:
        failure = read_json(folder / str(item.id) / FAILED).get("error")
        return {"missing": failure or "not generated", "ratings": {}, "plan": None, "notes": [], "pixels": {}}
    ratings = {
        name: {key: found.get(key) for key in ("score", "reason", "unscored", "model", "date")}
        for name, found in row.get("ratings", {}).items()
    }
    return {
        "picture": data_url(load_image(folder / str(item.id) / PICTURE), side),
        "plan": done.get("plan"),
        "notes": done.get("notes", []),
        "ratings": ratings,
        "pixels": {name: measured.get(name) for name in COLUMNS if measured.get(name) is not None},
    }


def data_url(image: Image, side: int) -> str:
    """Small pictures exactly, larger ones shrunk and lossy: a page of 800 photographs must still open."""
    content = io.BytesIO()
    if max(image.size) <= 192:
        image.save(content, format="PNG")
        return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    image = image.copy()
    image.thumbnail((side, side))
    image.save(content, format="WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
