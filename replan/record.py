"""Files beside a picture: the plan file that goes in, and the sidecar that holds everything needed to repeat a run."""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan import __version__, config, plan
from replan.errors import ConfigError, PlanError
from replan.images import write_atomic
from replan.types import Edit, Plan, Size

if TYPE_CHECKING:
    from replan.backbones.base import EditConfig
    from replan.backbones.runtime import Runtime
    from replan.edit import Editor
    from replan.planner import PlannerConfig

FORMAT = 1
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "pillow")


class PlanFileError(PlanError):
    """A plan file cannot be read, holds nothing that can be used, or belongs to another picture."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What decides, besides picture, instruction, plan and seed, how an edit comes out."""

    backbone: str
    planner: str | None
    config: EditConfig
    runtime: Runtime
    planner_config: PlannerConfig
    baseline: bool = False
    strict: bool = False

    def open(self) -> Editor:
        """An editor for this setup; it loads its models when they are first used."""
        from replan.edit import Editor

        return Editor.load(
            self.backbone,
            self.planner,
            config=self.config,
            runtime=self.runtime,
            planner_config=self.planner_config,
        )


@dataclass(frozen=True, slots=True)
class File:
    """A picture on disk: where it was, and the SHA-256 of its bytes."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """Which one of several edits that were made in one forward."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Record:
    """The sidecar. `plan` holds the planner's answer word for word; `also` are further pictures that the editor saw."""

    format: int
    image: File
    result: File
    instruction: str
    seed: int
    backbone: str
    planner: str | None
    baseline: bool
    strict: bool
    plan: Mapping[str, Any] | None
    notes: tuple[str, ...]
    timings: Mapping[str, float]
    config: Mapping[str, Any]
    runtime: Mapping[str, Any]
    planner_config: Mapping[str, Any]
    versions: Mapping[str, str]
    command: tuple[str, ...]
    also: tuple[File, ...] = ()
    candidate: Candidate | None = None
    job: str | None = None

    def setup(self) -> Setup:
        """The setup of the recorded run."""
        from replan.backbones.base import EditConfig
        from replan.backbones.runtime import Runtime
        from replan.planner import PlannerConfig

        return Setup(
            self.backbone,
            self.planner,
            config.load(EditConfig, self.config),
            config.load(Runtime, self.runtime),
            config.load(PlannerConfig, self.planner_config),
            self.baseline,
            self.strict,
        )


def record(edit: Edit, setup: Setup, image: Path, result: Path, **more: Any) -> Record:
    """The sidecar of a finished edit whose pictures lie at `image` and `result`; `more` are further fields."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "image": File(str(image.resolve()), sha256(image)),
        "result": File(result.name, sha256(result)),
        "instruction": edit.request.instruction,
        "seed": edit.request.seed,
        "backbone": setup.backbone,
        "planner": setup.planner,
        "baseline": setup.baseline,
        "strict": setup.strict,
        "plan": None if edit.plan is None else plan.to_json(edit.plan),
        "notes": edit.notes,
        "timings": {stage: round(seconds, 4) for stage, seconds in edit.timings.items()},
        "config": config.dump(setup.config),
        "runtime": config.dump(setup.runtime),
        "planner_config": config.dump(setup.planner_config),
        "versions": versions(),
        "command": (),
    }
    return Record(**(fields | more))


def read(path: Path) -> Record:
    """Load a sidecar. Raises ConfigError if the file is none."""
    if path.suffix != ".json":
        raise ConfigError(f"{path}: a sidecar is the .json file that lies next to an edited picture")
    try:
        found = config.load(Record, path)
    except ConfigError as error:
        if str(error).startswith(str(path)):
            raise
        first = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not a sidecar of `replan edit`: {first}") from error
    if found.format != FORMAT:
        raise ConfigError(f"{path}: has format {found.format}; this version reads format {FORMAT}")
    return found


def read_plan(source: Path | Mapping[str, Any], size: Size) -> Plan:
    """A plan for a picture of `size`: from a plan file, a sidecar, or an object already read. Raises PlanFileError.

    A plan of another size is rescaled with a note when the two pictures have the same shape.
    """
    try:
        inner = _sidecar_plan(source) if isinstance(source, Path) else source
        found = (
            plan.read_plan(source, size) if inner is None and isinstance(source, Path) else plan.from_json(inner, size)
        )
    except PlanError as error:
        raise PlanFileError(str(error)) from error
    if found.size == size:
        return found
    if not _same_shape(found.size, size):
        name = str(source) if isinstance(source, Path) else "plan"
        raise PlanFileError(
            f"{name}: was made for a picture of {found.size.width}x{found.size.height}, this one has "
            f"{size.width}x{size.height} and another shape; plan this picture anew with `replan plan`"
        )
    note = f"plan rescaled from {found.size.width}x{found.size.height} to {size.width}x{size.height}"
    return replace(found.to(size), notes=(*found.notes, note))


def write_json(value: Any, path: Path) -> None:
    """Write JSON so that the file is there whole or not at all. Raises ImageError."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write(found: Record, path: Path) -> None:
    """Write a sidecar, whole or not at all. Raises ImageError."""
    write_json(config.dump(found), path)


def disk_full(error: BaseException | None) -> bool:
    """Whether this error, or what caused it, is that nothing more can be written."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen.append(error)
        error = error.__cause__
    return False


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of python, replan and what it computes with, and the git revision when running from a checkout."""
    found = {"replan": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    revision = git_revision()
    return found | ({"git": revision} if revision else {})


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, with a `+` if files are changed; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        call = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        answer = subprocess.run(call, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _sidecar_plan(path: Path) -> Mapping[str, Any] | None:
    """The plan inside a sidecar, or inside a line of `replan plan --candidates`; None if the file is neither."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # read_plan says what is wrong with it
    inner = found.get("plan") if isinstance(found, dict) else None
    return inner if isinstance(inner, dict) else None


def _same_shape(one: Size, other: Size) -> bool:
    """Whether one is the other resized: some side follows from the other three to within one pixel."""
    across, down = one.width * other.height, one.height * other.width
    return abs(across - down) <= max(one.width, one.height, other.width, other.height)
