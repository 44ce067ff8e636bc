"""The table of editors. To add one: a file here that speaks condition / noise / velocity / decode, and a row."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from replan.backbones.base import Backbone, Conditioning, EditConfig
from replan.backbones.runtime import Runtime, guard
from replan.config import config_names, load, nearest, read
from replan.errors import BackboneError, ConfigError
from replan.types import Grid, Size

__all__ = [
    "BACKBONES",
    "Backbone",
    "Conditioning",
    "EditConfig",
    "Row",
    "Runtime",
    "default_config",
    "find",
    "load_backbone",
    "token_grid",
]


@dataclass(frozen=True, slots=True)
class Row:
    """One editor: its name, the stock pipeline's class, our module and class, its default weights and settings."""

    name: str
    pipeline: str
    module: str
    kind: str
    weights: str
    config: str


BACKBONES = (
    Row("mini", "FluxKontextPipeline", "flux_kontext", "FluxKontext", "", "edit/mini"),
    Row(
        "flux-kontext", "FluxKontextPipeline", "flux_kontext", "FluxKontext",
        "black-forest-labs/FLUX.1-Kontext-dev", "edit/flux_kontext",
    ),
    Row(
        "qwen-image-edit", "QwenImageEditPipeline", "qwen_image_edit", "QwenImageEdit",
        "Qwen/Qwen-Image-Edit", "edit/qwen_image_edit",
    ),
    Row(
        "qwen-image-edit-plus", "QwenImageEditPlusPipeline", "qwen_image_edit_plus", "QwenImageEditPlus",
        "Qwen/Qwen-Image-Edit-2511", "edit/qwen_image_edit_plus",
    ),
)  # fmt: skip


def find(name: str) -> tuple[Row, str]:
    """(row, weights) of a name of the table, a folder, or a hub id `owner/name`, whose class its model_index.json says.

    A folder may say in its replan.yaml which settings it was made for (`config: edit/mini`); the row then has those.
    Raises ConfigError for an unknown name, BackboneError when the folder or id holds no pipeline that we know.
    """
    for row in BACKBONES:
        if row.name == name:
            return row, row.weights or str(Path(__file__).parent.parent / "mini" / "weights" / "editor")
    names = [row.name for row in BACKBONES]
    if not Path(name).is_dir() and name.count("/") != 1:
        raise ConfigError(
            f"backbone {name!r}: unknown{nearest(name, names)}; "
            f"use {', '.join(names)}, a folder, or a hub id owner/name"
        )
    kind = _pipeline_class(name)
    for row in reversed(BACKBONES):  # of two rows with one class the real model, not the mini one, lends its settings
        if row.pipeline == kind:
            return replace(row, config=_own_config(Path(name)) or row.config), name
    known = ", ".join(dict.fromkeys(row.pipeline for row in BACKBONES))
    raise BackboneError(f"model {name}: is a {kind}; replan can drive {known}")


def default_config(name: str) -> EditConfig:
    """The settings that belong to a backbone. Raises as `find`."""
    return load(EditConfig, find(name)[0].config)


def load_backbone(name: str, runtime: Runtime) -> Backbone:
    """A backbone with its weights in place. Raises as `find`, and BackboneError when the weights cannot be loaded."""
    row, weights = find(name)
    if not row.weights and name == row.name and not Path(weights).is_dir():
        raise BackboneError(f"backbone {name}: its weights are not in the installation ({weights}); reinstall replan")
    kind: Any = getattr(importlib.import_module(f"replan.backbones.{row.module}"), row.kind)
    return kind.load(weights, runtime)


def token_grid(name: str, source: Size, config: EditConfig) -> Grid:
    """The grid of image tokens in which a picture of size `source` is edited; loads no weights. Raises as `find`."""
    row, weights = find(name)
    module: Any = importlib.import_module(f"replan.backbones.{row.module}")
    token = _token_pixels(Path(weights))
    size: Size = module.frame(source, config, token)
    return Grid(size.width // token, size.height // token)


def _token_pixels(weights: Path) -> int:
    """Pixels that one token covers each way: the VAE's factor (a folder's own config tells) times the 2x2 packing."""
    try:
        vae = json.loads((weights / "vae" / "config.json").read_text(encoding="utf-8"))
        halvings = (
            len(vae["temperal_downsample"]) if "temperal_downsample" in vae else len(vae["block_out_channels"]) - 1
        )
    except (OSError, ValueError, KeyError, TypeError):
        return 16  # every published model of these classes
    return 2 * 2**halvings


def _own_config(folder: Path) -> str | None:
    """The settings that a folder names. Only the package's own: a folder from elsewhere brings no values of its own."""
    note = folder / "replan.yaml"
    if not note.is_file():
        return None
    values = read(note)
    own = values.get("config")
    known = [known for known in config_names() if known.startswith("edit/")]
    if list(values) != ["config"] or own not in known:
        raise ConfigError(f"{note}: must be one line, config: NAME, with one of {', '.join(known)}")
    return own


def _pipeline_class(weights: str) -> str:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    index = dict(guard(f"model {weights}", lambda: DiffusionPipeline.load_config(weights)))
    return str(index.get("_class_name"))
