"""One picture per item, such that running it again makes only what is missing, and no order or kill changes a byte.

<output>/run.json                 the settings of the run, data, versions, rows that could not be used
<output>/<id>/final_result.png    the edited picture
<output>/<id>/edit.json           plan, seed, notes and the key of all that decided the picture; written last:
                                  with the right key in it the item is done
<output>/<id>/seconds.json        how long it took
<output>/<id>/failed.json         instead: what went wrong; tried again by the next run
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from replan import plan, record
from replan.errors import ConfigError, PlanError, ReplanError
from replan.eval.data import Item
from replan.eval.pool import in_parallel
from replan.images import save_image
from replan.types import Edit, EditRequest, Plan, Size

RUN, PICTURE, DONE, SECONDS, FAILED = "run.json", "final_result.png", "edit.json", "seconds.json", "failed.json"
FORMAT = 1

Method = Callable[[EditRequest], Edit]


@dataclass(frozen=True, slots=True)
class Made:
    """What became of an item; `error` is set when it failed."""

    id: int
    status: Literal["done", "skipped", "failed"]
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Todo:
    """How every item of a run is made. `settings` are all that decide its picture besides the item and the seed.

    exact   the plan in the row's answer is used instead of a planner's
    check   raises ReplanError when no item can be made at all: a model that cannot be loaded, a service that is out
    stop    called when the run ends, so that what is under way does not wait for long
    """

    edit: Method
    settings: Mapping[str, Any]
    seed: int
    exact: bool = False
    check: Callable[[], None] = lambda: None
    stop: Callable[[], None] = lambda: None


def generate(items: Sequence[Item], folder: Path, todo: Todo, workers: int = 1) -> Iterator[Made]:
    """Make what is missing, `workers` at a time, and yield what became of each item as it is known.

    An error of one item is recorded and the run goes on; a full disk ends it, and so does the error of `todo.check`,
    which is asked after each failure. Closing the iterator (Ctrl-C) starts nothing new, and what is under way is
    finished and kept when there are several workers.
    """
    for made in in_parallel(lambda item: _make(item, folder, todo), items, workers, todo.stop):
        yield made
        if made.status == "failed":
            todo.check()


def compare(folder: Path, run: Mapping[str, Any]) -> None:
    """Raise ConfigError, which names the difference, if the folder holds a run with other settings."""
    if not (folder / RUN).is_file():
        return
    changed = list(_differences(read_run(folder)["settings"], run["settings"]))
    if changed:
        raise ConfigError(
            f"{folder}: holds a run with other settings ({'; '.join(changed[:4])}); "
            "use another output folder, or remove this one"
        )


def start(folder: Path, run: Mapping[str, Any]) -> None:
    """Write the run's settings, if the folder does not hold them already. Raises as `compare`."""
    compare(folder, run)
    path = folder / RUN
    if path.is_file():
        past = read_run(folder)
        if past == {**run, "versions": past.get("versions"), "started": past.get("started")}:
            return
    record.write_json(dict(run), path)


def read_run(folder: Path) -> dict[str, Any]:
    """The settings of a run. Raises ConfigError when the folder holds none."""
    path = folder / RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: holds no run of `replan eval generate` (no {RUN})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{path}: not a run of this version (format {FORMAT})")
    return found


def read_done(folder: Path, item: int) -> dict[str, Any] | None:
    """What edit.json says about a finished item; None if it is not finished."""
    try:
        found = json.loads((folder / str(item) / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and (folder / str(item) / PICTURE).is_file() else None


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object on disk; empty when there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def item_key(item: Item, todo: Todo) -> str:
    """SHA-256 over everything that decides the item's picture."""
    fields = {
        "image": item.digest(),
        "instruction": item.instruction,
        "plan": item.answer if todo.exact else None,
        "seed": todo.seed + item.id,
        "settings": dict(todo.settings),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _make(item: Item, folder: Path, todo: Todo) -> Made:
    place = folder / str(item.id)
    began = time.perf_counter()
    try:
        key = item_key(item, todo)
        past = read_done(folder, item.id)
        if past is not None and past.get("key") == key:
            return Made(item.id, "skipped")
        _clear(place)
        edit = todo.edit(_request(item, todo))
        _finish(item, edit, key, place)
    except Exception as error:  # one bad item must not end a run of hundreds; what it was is kept in full
        if record.disk_full(error):
            raise
        told = str(error) if isinstance(error, ReplanError) else f"{type(error).__name__}: {error}"
        tries = int(read_json(place / FAILED).get("tries", 0)) + 1
        failure = {"id": item.id, "error": told, "tries": tries, "traceback": traceback.format_exc()}
        record.write_json(failure, place / FAILED)
        return Made(item.id, "failed", told, time.perf_counter() - began)
    return Made(item.id, "done", seconds=time.perf_counter() - began)


def _request(item: Item, todo: Todo) -> EditRequest:
    image = item.image()
    given: Plan | None = None
    if todo.exact:
        if not item.answer:
            raise PlanError(f"item {item.id}: planner = answer, but the row's answer is empty")
        given = plan.parse(item.answer, Size(*image.size), ())
    return EditRequest(image, item.instruction, todo.seed + item.id, given)


def _clear(place: Path) -> None:
    """From here until edit.json is written again the item is not done; also sweeps what a killed run left."""
    (place / DONE).unlink(missing_ok=True)
    for stale in place.glob(".*.part"):
        stale.unlink(missing_ok=True)


def _finish(item: Item, edit: Edit, key: str, place: Path) -> None:
    target = place / PICTURE
    save_image(edit.image, target)
    seconds = {stage: round(value, 4) for stage, value in edit.timings.items()}
    record.write_json(seconds, place / SECONDS)
    (place / FAILED).unlink(missing_ok=True)
    done = {
        "format": FORMAT,
        "id": item.id,
        "key": key,
        "seed": edit.request.seed,
        "instruction": edit.request.instruction,
        "sha256": record.sha256(target),
        "plan": None if edit.plan is None else plan.to_json(edit.plan),
        "notes": list(edit.notes),
    }
    record.write_json(done, place / DONE)


def _differences(past: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for name in sorted({*past, *now}):
        one, other = past.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{where}{name}.")
        elif one != other:
            yield f"{where}{name}: {one!r} there, {other!r} now"


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written beside run.json."""
    for stale in folder.glob(".*.part"):
        with suppress(OSError):
            stale.unlink()
