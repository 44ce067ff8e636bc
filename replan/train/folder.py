"""Folders of trained planners: such that transformers, vLLM and `replan` load them like the model they began as."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from replan.errors import ConfigError
from replan.planner.base import PROMPT_FILE
from replan.train.build import model_folder

# Everything beside the weights comes from the start as it was: our processor may be a subclass without its video part,
# and AutoProcessor would silently make a bare tokenizer of a name that it does not know.
BESIDE = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
    "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", PROMPT_FILE,
)  # fmt: skip


def complete(folder: Path, start: str) -> None:
    """Put the files beside the weights in `folder` as the model `start` has them, and remove those that it has not."""
    from transformers.utils.hub import cached_file

    for name in BESIDE:
        found = cached_file(
            model_folder(start),
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None and Path(found).resolve() != (folder / name).resolve():
            shutil.copyfile(found, folder / name)
        elif found is None:
            (folder / name).unlink(missing_ok=True)


def export(source: Path, target: Path) -> Path:
    """Make an ordinary model folder of a run's newest state, or of a checkpoint, of any engine. Raises ConfigError."""
    source = _newest(source)
    if (source / "fsdp_config.json").exists() or any((source / name).is_dir() for name in ("actor", "checkpoints")):
        from replan.train import engine_verl

        engine_verl.merge(source, target)
        return target
    if (source / "adapter_config.json").exists():
        return merge_adapter(source, target)
    if not (source / "config.json").exists():
        raise ConfigError(f"{source}: holds no model; name a run's folder, a checkpoint-<k> or a global_step_<k>/actor")
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt") and path.name != "trainer_state.json":
            shutil.copyfile(path, target / path.name)
    return target


def _newest(source: Path) -> Path:
    """Of a run its planner, when that is its end, else its newest checkpoint; anything else as it is."""
    from replan.train import run
    from replan.train.engine_trl import last_checkpoint

    planner, last = source / run.PLANNER, last_checkpoint(source)
    has_checkpoints = last is not None or (source / "checkpoints").is_dir()  # engine verl's
    if (planner / "config.json").exists() and (run.is_finished(source) or not has_checkpoints):
        return planner
    return last or source


def merge_adapter(source: Path, target: Path) -> Path:
    """Write the base of the adapter in `source` with the adapter merged into it."""
    import json

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    start = json.loads((source / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    base: Any = AutoModelForImageTextToText.from_pretrained(start)
    merged: Any = PeftModel.from_pretrained(base, str(source)).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(target)
    complete(target, start)
    return target
