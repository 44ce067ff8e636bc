"""The table of editors. To add one: a file here that speaks condition / noise / velocity / decode, and a row."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replan.backbones.base import Backbone, Conditioning, EditConfig
from replan.backbones.runtime import Runtime, guard
from replan.config import load, nearest
from replan.errors import BackboneError, ConfigError

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
            return row, name
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


def _pipeline_class(weights: str) -> str:
    from diffusers import DiffusionPipeline

    index = guard(f"model {weights}", lambda: DiffusionPipeline.load_config(weights))
    return str(index.get("_class_name"))
