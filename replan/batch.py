"""Many edits from a JSONL file, one after the other, such that running it again does only what is missing.

A job is known by the hash of everything that decides its result (the picture's bytes, instruction, plan, seed, setup).
Its picture is written first and its sidecar, which carries the hash, last: a sidecar with the right hash means done.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from replan import config, plan, record
from replan.errors import ConfigError, ReplanError
from replan.images import load_image, save_image
from replan.record import Setup
from replan.types import Edit, EditRequest, Plan, Size

_FIELDS = ("image", "instruction", "plan", "seed", "id")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,119}")


@dataclass(frozen=True, slots=True)
class Job:
    """One line of the file. `image` is absolute; `plan` is a plan object or the path of a plan file."""

    line: int
    image: Path
    instruction: str
    plan: Mapping[str, Any] | Path | None = None
    seed: int | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job. `path` is the edited picture, also when it was there before; `error` is set when failed."""

    job: Job
    id: str
    status: Literal["done", "skipped", "failed"]
    path: Path
    error: str | None = None
    seconds: float = 0.0


def read_jobs(path: Path) -> tuple[list[Job], list[str]]:
    """The jobs of a JSONL file and, for each bad line, what is wrong with it. Raises ConfigError if it cannot be read.

    Relative paths in it are relative to the file itself, so that a folder of jobs and pictures can be moved.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file (UTF-8)") from error
    jobs: list[Job] = []
    problems: list[str] = []
    ids: dict[str, int] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            job = _job(number, text, path.parent)
            if job.id is not None and job.id in ids:
                raise ConfigError(f"id {job.id!r} is already that of line {ids[job.id]}")
        except ConfigError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        if job.id is not None:
            ids[job.id] = number
        jobs.append(job)
    return jobs, problems


def run(
    jobs: Sequence[Job],
    folder: Path,
    setup: Setup,
    seed: int,
    edit: Callable[[EditRequest], Edit],
    command: Sequence[str] = (),
) -> Iterator[Outcome]:
    """Do each job that is not done yet and yield its outcome; `seed` is that of jobs without one of their own.

    A failed job leaves `<id>.failed.json` and is tried again by the next run. When the disk is full the error is
    raised, as the jobs after it would fail the same way. Whatever was yielded before stays on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        started = time.perf_counter()
        name = unnamed = job.id or f"line-{job.line:04d}"
        try:
            request, key = _prepare(job, setup, seed)
            name = job.id or f"{_safe(job.image.stem)}-{key[:8]}"
            target = folder / f"{name}.png"
            if target.resolve() == job.image:
                raise ConfigError(f"{target}: is the picture to edit; give the job another id, or -o another folder")
            if _done(target, key):
                yield Outcome(job, name, "skipped", target)
                continue
            _finish(edit(request), job, key, target, setup, command)
        except Exception as error:  # one bad item must not end a run of thousands; what it was is kept in full
            if record.disk_full(error):
                raise
            told = str(error) if isinstance(error, ReplanError) else f"{type(error).__name__}: {error}"
            failure = {"line": job.line, "image": str(job.image), "error": told, "traceback": traceback.format_exc()}
            record.write_json(failure, folder / f"{name}.failed.json")
            yield Outcome(job, name, "failed", folder / f"{name}.png", told, time.perf_counter() - started)
            continue
        for stale in (name, unnamed):
            (folder / f"{stale}.failed.json").unlink(missing_ok=True)
        yield Outcome(job, name, "done", target, seconds=time.perf_counter() - started)


def job_key(request: EditRequest, image_sha256: str, setup: Setup) -> str:
    """SHA-256 over everything that decides the edited picture."""
    fields = {
        "image": image_sha256,
        "instruction": request.instruction,
        "plan": None if request.plan is None else plan.to_json(request.plan),
        "seed": request.seed,
        "setup": config.dump(replace(setup, strict=False)),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _job(number: int, text: str, root: Path) -> Job:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"holds a {type(fields).__name__}, not an object")
    for name in fields:
        if name not in _FIELDS:
            raise ConfigError(f"{name}: unknown{config.nearest(name, _FIELDS)}")
    given = {name: value for name, value in fields.items() if value is not None}
    _check(given)
    found: Mapping[str, Any] | Path | None = given.get("plan")
    if isinstance(found, str):
        found = root / found
        if not found.is_file():
            raise ConfigError(f"plan: there is no file {found}")
    image = root / given["image"]
    if not image.is_file():
        raise ConfigError(f"image: there is no file {image}")
    identifier = given.get("id")
    return Job(
        number,
        image.resolve(),
        given.get("instruction", ""),
        found,
        given.get("seed"),
        None if identifier is None else str(identifier),
    )


def _check(given: Mapping[str, Any]) -> None:
    kinds: dict[str, tuple[type, ...]] = {"image": (str,), "instruction": (str,), "plan": (dict, str), "seed": (int,)}
    for name, allowed in kinds.items():
        if name in given and (not isinstance(given[name], allowed) or isinstance(given[name], bool)):
            words = {"str": "a text", "int": "a whole number", "dict": "an object"}
            expected = " or ".join(words[kind.__name__] for kind in allowed)
            raise ConfigError(f"{name}: {given[name]!r} should be {expected}")
    if "image" not in given:
        raise ConfigError("image: missing")
    if not given.get("instruction", "").strip() and "plan" not in given:
        raise ConfigError("instruction: missing (or give a plan)")
    if "id" in given and not _ID.fullmatch(str(given["id"])):
        raise ConfigError(
            f"id: {given['id']!r} becomes a file name: use letters, digits, `.`, `_` and `-`, at most 120"
        )


def _prepare(job: Job, setup: Setup, seed: int) -> tuple[EditRequest, str]:
    image = load_image(job.image)
    found: Plan | None = None
    if job.plan is not None:
        found = record.read_plan(job.plan, Size(*image.size))
    request = EditRequest(image, job.instruction, seed if job.seed is None else job.seed, found)
    return request, job_key(request, record.sha256(job.image), setup)


def _done(target: Path, key: str) -> bool:
    sidecar = target.with_suffix(".json")
    if not (sidecar.is_file() and target.is_file()):
        return False
    try:
        return record.read(sidecar).job == key
    except ConfigError:
        return False  # somebody else's file or an older format: made anew


def _finish(edit: Edit, job: Job, key: str, target: Path, setup: Setup, command: Sequence[str]) -> None:
    sidecar = target.with_suffix(".json")
    sidecar.unlink(missing_ok=True)  # from here until the new one is written the job counts as not done
    save_image(edit.image, target)
    record.write(record.record(edit, setup, job.image, target, command=tuple(command), job=key), sidecar)


def _safe(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60].strip("_") or "image"
