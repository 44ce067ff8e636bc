"""What is measured: transformers by their published shapes, and how many tokens they get. Pure Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from replan.errors import ConfigError

Family = Literal["flux", "qwen"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One editor as the bench builds it.

    config    arguments of the diffusers transformer class
    tokens    tokens of the noise along one side; the reference has as many
    main      tokens of the main prompt (for Qwen with what its text encoder says of the picture)
    padded    what the original pads each hint to
    hint      tokens of a hint as we pad it
    steps     of a whole edit
    settings  the configs/edit file whose attention rules are used
    """

    name: str
    family: Family
    config: Mapping[str, Any]
    tokens: int
    main: int
    padded: int
    hint: int
    steps: int
    settings: str

    @property
    def layers(self) -> int:
        """Blocks; double and single ones have the same linear weights per token."""
        return self.config["num_layers"] + self.config.get("num_single_layers", 0)

    @property
    def width(self) -> int:
        return self.config["attention_head_dim"] * self.config["num_attention_heads"]

    @property
    def guided(self) -> bool:
        """Whether a whole edit runs a second, negative branch."""
        return self.family == "qwen"


# The published config.json of FLUX.1-Kontext-dev and Qwen-Image-Edit-2511, transformer part.
KONTEXT = Shape(
    "kontext",
    "flux",
    {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
    },
    tokens=64, main=512, padded=512, hint=64, steps=28, settings="edit/flux_kontext",
)  # fmt: skip
QWEN_2511 = Shape(
    "qwen-2511",
    "qwen",
    {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56), "zero_cond_t": True,
    },
    tokens=64, main=256, padded=512, hint=64, steps=40, settings="edit/qwen_image_edit_plus",
)  # fmt: skip
# Shallow and narrow, but with over 4,600 tokens, so that arithmetic and not bookkeeping takes the time.
TINY = (
    Shape(
        "kontext-tiny",
        "flux",
        {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64,
            "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32,
            "guidance_embeds": True, "axes_dims_rope": (16, 24, 24),
        },
        tokens=48, main=96, padded=96, hint=16, steps=28, settings="edit/flux_kontext",
    ),
    Shape(
        "qwen-2511-tiny",
        "qwen",
        {
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 64,
            "num_attention_heads": 2, "joint_attention_dim": 64, "guidance_embeds": False,
            "axes_dims_rope": (16, 24, 24), "zero_cond_t": True,
        },
        tokens=48, main=64, padded=96, hint=16, steps=40, settings="edit/qwen_image_edit_plus",
    ),
)  # fmt: skip
SIZES = ("mini", "tiny", "kontext", "qwen-2511")


def shapes(size: str, steps: int | None = None) -> tuple[Shape, ...]:
    """The editors of a --size. Raises ConfigError for an unknown one."""
    known = {"tiny": TINY, "kontext": (KONTEXT,), "qwen-2511": (QWEN_2511,)}
    if size not in SIZES:
        raise ConfigError(f"size = {size!r}: must be one of {', '.join(SIZES)}")
    found = (_mini(),) if size == "mini" else known[size]
    return tuple(shape if steps is None else replace(shape, steps=steps) for shape in found)


def _mini() -> Shape:
    """The shipped mini editor's own transformer."""
    import replan

    folder = Path(replan.__file__).parent / "mini" / "weights" / "editor"
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    known["axes_dims_rope"] = tuple(known["axes_dims_rope"])
    return Shape("mini", "flux", known, tokens=12, main=24, padded=24, hint=8, steps=8, settings="edit/mini")
