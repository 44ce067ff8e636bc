"""The folder of a run, the same for every engine.

<output>/run.json          resolved settings, data with fingerprints, versions, git revision, starts and resumptions
<output>/rollouts.jsonl    one line a step: items, rewards (null: left out because our machinery failed), failures
<output>/samples/          pages with sample rollouts
<output>/checkpoint-<k>/   engine trl: an ordinary folder of transformers, with the trainer's state beside the weights
<output>/planner/          the finished planner, an ordinary folder of transformers
<output>/adapter/          engine trl with LoRA: what was trained, before it was merged into the planner
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from replan import config as configs
from replan import record
from replan.errors import ConfigError
from replan.images import write_atomic
from replan.train.data import Rows
from replan.train.grpo import GrpoConfig
from replan.train.score import Scored

RUN, ROLLOUTS, SAMPLES, PLANNER, ADAPTER = "run.json", "rollouts.jsonl", "samples", "planner", "adapter"
FORMAT = 1
_PACKAGES = ("trl", "verl", "vllm", "ray", "datasets", "pyarrow")
# What may differ between a run and its resumption without making it another run.
_FREE = ("steps", "save_every", "keep", "val_every", "val_items", "loggers", "samples", "services", "nodes", "gpus")


def start(config: GrpoConfig, train: Rows, val: Rows | None, engine: Mapping[str, Any]) -> None:
    """Write run.json, or add this start to it. `engine` are the settings as the engine understood them.

    Raises ConfigError when the folder holds a run of other settings or other data.
    """
    path = config.output / RUN
    found = {
        "format": FORMAT,
        "config": configs.dump(config),
        "data": {name: _about(rows) for name, rows in (("train", train), ("val", val)) if rows is not None},
        "engine": engine,
    }
    starts: list[Any] = []
    if path.exists():
        earlier = json.loads(path.read_bytes())
        starts = earlier.get("starts", [])
        _same(path, earlier, found)
    free = {name: value for name, value in found["config"].items() if name in _FREE}  # run.json keeps the last ones
    now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "settings": free}
    record.write_json(found | {"starts": [*starts, now]}, path)


def finish(output: Path) -> None:
    """Note in run.json that <output>/planner is the run's end; the next start takes the note away."""
    found = json.loads((output / RUN).read_bytes())
    record.write_json(found | {"finished": True}, output / RUN)


def is_finished(output: Path) -> bool:
    """Whether <output>/planner is what the run came to, and not what an earlier, shorter one did."""
    try:
        return json.loads((output / RUN).read_bytes()).get("finished", False) is True
    except (OSError, ValueError, AttributeError):
        return False


def check_rows(config: GrpoConfig, rows: Rows) -> None:
    """Raises ConfigError for data that does not fill a single step."""
    if len(rows) < config.rollout.prompts:
        raise ConfigError(f"{config.train}: {len(rows)} rows are fewer than rollout.prompts = {config.rollout.prompts}")


def versions() -> dict[str, str]:
    """Versions and git revision, the training libraries included."""
    found = record.versions()
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _about(rows: Rows) -> dict[str, Any]:
    return {"path": str(rows.path), "rows": len(rows), "sha256": rows.fingerprint, **rows.about}


def _same(path: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, about in now["data"].items():
        before = earlier.get("data", {}).get(name, {})
        if before.get("sha256") != about["sha256"]:
            raise ConfigError(
                f"{path}: this run was started on other {name} data ({str(before.get('sha256'))[:12]}, now "
                f"{about['sha256'][:12]}); use another output folder, or the same data"
            )
    plain = json.loads(json.dumps(now["config"]))
    changed = [key for key, value in plain.items() if key not in _FREE and earlier["config"].get(key) != value]
    if changed:
        raise ConfigError(
            f"{path}: this run was started with other settings of {', '.join(changed)}; "
            "use another output folder, or the same settings"
        )


class RolloutLog:
    """rollouts.jsonl: which items and which rewards each step saw. Lines of steps that are done again are replaced."""

    def __init__(self, output: Path, first: int) -> None:
        self.path = output / ROLLOUTS
        kept = [line for line in read(self.path) if line["step"] < first]
        write_atomic(self.path, "".join(_line(entry) for entry in kept).encode())

    def add(self, step: int, items: Sequence[int], outcomes: Sequence[Scored]) -> None:
        """One step's rollouts, in order."""
        rewards = [None if one.value is None else round(one.value, 6) for one in outcomes]
        failures = sorted({f"{one.failure.stage}: {one.failure.error}" for one in outcomes if one.failure})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, "items": list(items), "rewards": rewards, "failures": failures}))
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a rollouts.jsonl; a kill may have cut the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
