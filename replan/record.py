"""Files beside a picture: the plan file that goes in, and the sidecar that holds everything needed to repeat a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan import __version__, config, plan
from replan.errors import ConfigError, PlanError, ReplanError
from replan.types import Edit, Plan, Size

if TYPE_CHECKING:
    from replan.backbones.base import EditConfig
    from replan.backbones.runtime import Runtime

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
    prompt_template: str | None = None
    baseline: bool = False
    strict: bool = False


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
    """The sidecar. `raw` is the planner's answer word for word; `seed` is the request's, of several the first one's."""

    format: int
    image: File
    result: File
    instruction: str
    seed: int
    backbone: str
    planner: str | None
    prompt_template: str | None
    baseline: bool
    strict: bool
    plan: Mapping[str, Any] | None
    raw: str
    notes: tuple[str, ...]
    timings: Mapping[str, float]
    config: Mapping[str, Any]
    runtime: Mapping[str, Any]
    versions: Mapping[str, str]
    command: tuple[str, ...]
    candidate: Candidate | None = None
    job: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def setup(self, overrides: tuple[config.Override, ...] = (), over: tuple[config.Source, ...] = ()) -> Setup:
        """The recorded setup, with changes laid on its config."""
        from replan.backbones.base import EditConfig
        from replan.backbones.runtime import Runtime

        return Setup(
            self.backbone,
            self.planner,
            config.load(EditConfig, self.config, overrides, over),
            config.load(Runtime, self.runtime),
            self.prompt_template,
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
        "prompt_template": setup.prompt_template,
        "baseline": setup.baseline,
        "strict": setup.strict,
        "plan": None if edit.plan is None else plan.to_json(edit.plan),
        "raw": "" if edit.plan is None else edit.plan.raw,
        "notes": edit.notes,
        "timings": {stage: round(seconds, 4) for stage, seconds in edit.timings.items()},
        "config": config.dump(setup.config),
        "runtime": config.dump(setup.runtime),
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
    name = str(source) if isinstance(source, Path) else "plan"
    try:
        found = plan.from_json(_plan_object(source) if isinstance(source, Path) else source)
    except PlanFileError:
        raise
    except ReplanError as error:
        raise PlanFileError(f"{name}: {error}") from error
    if found.size == size:
        return found
    if not _same_shape(found.size, size):
        raise PlanFileError(
            f"{name}: was made for a picture of {found.size.width}x{found.size.height}, this one has "
            f"{size.width}x{size.height} and another shape; plan this picture anew with `replan plan`"
        )
    note = f"plan rescaled from {found.size.width}x{found.size.height} to {size.width}x{size.height}"
    return replace(found.to(size), notes=(*found.notes, note))


def write_json(value: Any, path: Path) -> None:
    """Write JSON so that the file is there whole or not at all. Raises OSError."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(found: Record, path: Path) -> None:
    """Write a sidecar, whole or not at all. Raises OSError."""
    write_json(config.dump(found), path)


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


def _plan_object(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PlanFileError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PlanFileError(f"{path}: not a plan file: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise PlanFileError(f"{path}: not a plan file: holds a {type(found).__name__}, not an object")
    inner = found.get("plan")  # a sidecar carries its plan under this key
    return inner if isinstance(inner, dict) else found


def _same_shape(one: Size, other: Size) -> bool:
    """Whether one is the other resized: some side follows from the other three to within one pixel."""
    across, down = one.width * other.height, one.height * other.width
    return abs(across - down) <= max(one.width, one.height, other.width, other.height)
