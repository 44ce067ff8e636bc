"""The real backbones with a random transformer and made-up conditioning: everything between prompt and picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from replan.backbones.base import Conditioning, EditConfig, mask_schedule, schedule, usable
from replan.backbones.stepper import Stepper
from replan.bench.sizes import Shape
from replan.config import load
from replan.mask import TokenLayout, phases, without_regions
from replan.rules import MaskConfig
from replan.speed import EXACT, SpeedConfig
from replan.types import Box, Grid, Plan, Size

CFG = 4.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's regions: how many, and which share of the picture they and their halo cover."""

    regions: int
    area: float


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """One random editor on a device."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    backbone: Any

    @property
    def transformer(self) -> Any:
        return self.backbone.pipe.transformer

    def stepper(self, cond: Conditioning, executor: str = "auto") -> Stepper:
        """The product's own velocity, its masks by `executor`."""
        self.backbone.attention = executor
        return self.backbone.velocity(cond)

    def noise(self, seed: int = 0) -> Tensor:
        return self._random((1, self.shape.tokens**2, self._channels), seed)

    def conditioning(
        self, scene: Scene, speed: SpeedConfig = EXACT, *, hint: int | None = None, guided: bool = False
    ) -> Conditioning:
        """Random text and reference; `scene.regions` = 0 is the stock editor. `hint`: tokens of each hint."""
        shape = self.shape
        grid = Grid(shape.tokens, shape.tokens)
        layout = TokenLayout(0, shape.main, (hint or shape.hint,) * scene.regions, grid, (grid,))
        size = Size(grid.columns * 16, grid.rows * 16)
        rules: MaskConfig = replace(load(EditConfig, shape.settings).mask, expand=0.0)
        speed, _ = usable(speed, Plan("", "", (), size), layout, self.transformer)
        found = phases(
            layout, boxes(scene, grid, speed.halo), size, rules, isolated_reference=bool(speed.isolate_reference)
        )
        sigmas = schedule(self.backbone.pipe.scheduler, shape.steps, grid.columns * grid.rows)
        negative = None
        if guided:
            bare = TokenLayout(0, shape.main, (), grid, (grid,))
            alone = ((0.0, without_regions(bare)),) if speed.isolate_reference else ()
            negative = Conditioning(self._tensors(bare, 5), sigmas, bare, size, (0,), alone, speed=speed)
        return Conditioning(
            self._tensors(layout, 3), sigmas, layout, size, (0,), mask_schedule(found, sigmas), negative, CFG, speed
        )

    @property
    def _channels(self) -> int:
        return self.shape.config["in_channels"]

    def _random(self, size: tuple[int, ...], seed: int) -> Tensor:
        made = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        return made.to(self.device, self.dtype)

    def _tensors(self, layout: TokenLayout, seed: int) -> dict[str, Tensor]:
        shape, tokens = self.shape, self.shape.tokens**2
        found = {
            # one stream of numbers: more hints do not change the main prompt
            "text": self._random((1, layout.text_length, shape.config["joint_attention_dim"]), seed),
            "reference": self._random((1, tokens, self._channels), 4),
        }
        if shape.family == "flux":
            found |= {
                "pooled": self._random((1, shape.config["pooled_projection_dim"]), 6),
                "text_ids": torch.zeros(layout.text_length, 3, device=self.device, dtype=self.dtype),
                "ids": self._ids(),
            }
        if shape.config["guidance_embeds"]:
            found["guidance"] = torch.full([1], 2.5, device=self.device, dtype=torch.float32)
        return found

    def _ids(self) -> Tensor:
        """Position ids [2P, 3] of noise and reference, as the stock pipeline makes them."""
        side = torch.arange(self.shape.tokens, device=self.device, dtype=self.dtype)
        rows, columns = torch.meshgrid(side, side, indexing="ij")
        place = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        return torch.cat([place, place + torch.tensor([1, 0, 0], device=self.device, dtype=self.dtype)])


def boxes(scene: Scene, grid: Grid, halo: int) -> list[Box]:
    """One box per region, side by side, in pixels; with `halo` tokens around them they cover about `scene.area`."""
    found = []
    for number in range(scene.regions):
        strip = grid.columns / scene.regions
        # of the strip's own shape, so that the halo weighs least
        scale = math.sqrt(scene.area)
        width = max(1, round(strip * scale) - 2 * halo)
        height = max(1, round(grid.rows * scale) - 2 * halo)
        left, top = round(strip * number + (strip - width) / 2), (grid.rows - height) // 2
        found.append(Box(left * 16, top * 16, (left + width) * 16, (top + height) * 16))
    return found


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Bench:
    """A backbone with random weights, made on the device itself: no download, no copy in the host's memory."""
    transformer = _transformer(shape, device, dtype)
    pipe = SimpleNamespace(
        transformer=transformer, scheduler=_scheduler(shape), _execution_device=device, vae_scale_factor=8
    )
    return Bench(shape, device, dtype, _backbone(shape)(pipe))


def _transformer(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    kind: Any = FluxTransformer2DModel if shape.family == "flux" else QwenImageTransformer2DModel
    with torch.device("meta"):
        model = kind(**shape.config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=generator)  # keeps the size of what it is fed
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)  # norms are the identity, biases nothing
    if shape.family == "qwen":  # its tables are plain attributes, which to_empty does not know
        axes = list(shape.config["axes_dims_rope"])
        model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    return model


def _backbone(shape: Shape) -> Callable[[Any], Any]:
    from replan.backbones.flux_kontext import FluxKontext
    from replan.backbones.qwen_image_edit_plus import QwenImageEditPlus

    return FluxKontext if shape.family == "flux" else QwenImageEditPlus


def _scheduler(shape: Shape) -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    flux = {"max_shift": 1.15, "max_image_seq_len": 4096, "shift": 3.0}
    qwen = {"max_shift": 0.9, "max_image_seq_len": 8192, "shift": 1.0, "shift_terminal": 0.02}
    own: dict[str, Any] = flux if shape.family == "flux" else qwen
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, base_image_seq_len=256, **own)
