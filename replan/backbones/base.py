"""What every editor has in common: its settings, its conditioning, and the four calls that the rest of replan knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from replan.errors import BackboneError, ConfigError
from replan.rules import MaskConfig
from replan.speed import EXACT, SpeedConfig
from replan.types import Box, EditRequest, Plan, Size

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from replan.denoise import Velocity
    from replan.mask import RegionMask, TokenLayout


@dataclass(frozen=True, slots=True)
class EditConfig:
    """How one edit is made. The values of each backbone live in configs/edit/<backbone>.yaml and nowhere else.

    steps                denoising steps
    guidance             distilled guidance; ignored by models without a guidance embedding
    true_cfg             classifier-free guidance with `negative_prompt`; null or <= 1 means none
    max_area             pixels that the model works at, at the picture's own aspect
    auto_resize          take the nearest of the model's own trained sizes instead of `max_area`
    max_sequence_length  tokens that the main prompt is padded or cut to, where a backbone pads its prompts
    hint_padding         tight: a hint has its true length; full: padded like the main prompt, padding visible, which is
                         what the paper did (no effect where prompts are not padded)
    mask                 who reads whom
    keep_background      paste the untouched source pixels back outside the boxes
    speed                what is reused between steps; a preset's name or its settings
    """

    steps: int
    guidance: float
    true_cfg: float | None
    negative_prompt: str
    max_area: int
    auto_resize: bool
    max_sequence_length: int
    hint_padding: Literal["tight", "full"]
    mask: MaskConfig
    keep_background: bool = False
    speed: SpeedConfig = EXACT

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("max_area", 1), ("max_sequence_length", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} = {value!r}: must be a whole number, {least} or more")
        for name in ("guidance", "true_cfg"):
            value = getattr(self, name)
            if name == "true_cfg" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name} = {value!r}: must be a finite number, 0 or more")
        if self.hint_padding not in ("tight", "full"):
            raise ConfigError(f"hint_padding = {self.hint_padding!r}: must be tight or full")

    @property
    def guided(self) -> bool:
        """True when each step needs a second, negative forward."""
        return self.true_cfg is not None and self.true_cfg > 1


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """Everything a velocity depends on beside (x, sigma). Without reuse between steps (`speed`), velocity(cond) is a
    pure function of (x, sigma).

    tensors   what the transformer is fed, batch 1; the backbone that made it knows the names
    sigmas    [steps + 1] float32 on the CPU, descending to 0
    masks     (while sigma is above this, mask), in descending order; empty or None = full attention
    negative  the conditioning of the negative prompt, without a mask; None = no classifier-free guidance
    scale     strength of the guidance away from `negative`
    layout    the joint sequence; its noise grid fixes the latent's shape
    source    size that the finished picture is brought back to
    seeds     one for each picture made in one batched forward; `dataclasses.replace(cond, seeds=...)` makes candidates
    speed     what is reused between steps; nothing where there are no regions
    notes     what the user should know about how it will run
    """

    tensors: Mapping[str, Tensor]
    sigmas: Tensor
    layout: TokenLayout
    source: Size
    seeds: tuple[int, ...]
    masks: tuple[tuple[float, RegionMask | None], ...] = ()
    negative: Conditioning | None = None
    scale: float = 1.0
    speed: SpeedConfig = EXACT
    notes: tuple[str, ...] = ()

    def mask(self, sigma: float) -> RegionMask | None:
        """The mask that rules at this noise level."""
        for above, mask in self.masks:
            if sigma > above:
                return mask
        return self.masks[-1][1] if self.masks else None


class Backbone(Protocol):
    """One file per model; nothing downstream asks which one it is."""

    def condition(self, request: EditRequest, plan: Plan | None, config: EditConfig) -> Conditioning:
        """Encode picture, prompt and hints. `plan=None` is the stock editor with the bare instruction."""
        ...

    def noise(self, cond: Conditioning) -> Tensor:
        """Pure noise [len(cond.seeds), P, C]; a seed always gives the same noise."""
        ...

    def velocity(self, cond: Conditioning) -> Velocity:
        """v(x, sigma) with classifier-free guidance inside; differentiable. One per run: it may remember steps."""
        ...

    def decode(self, latent: Tensor, cond: Conditioning) -> Image:
        """The picture of a latent [1, P, C], at the source's size."""
        ...


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed, so that a seed means the same noise on every device, in any order and batch.

    Raises ConfigError for a seed that is no 64-bit number.
    """
    import torch

    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise ConfigError(f"seed = {seed!r}: must be a whole number of at most 64 bits")
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def schedule(scheduler: Any, steps: int, tokens: int) -> Tensor:
    """The noise levels [steps + 1] of the pipeline's own scheduler, shifted for `tokens` noise tokens; float32, CPU.

    The scheduler itself is left alone. Raises BackboneError for a class that the loop is not equal to, ConfigError when
    its settings do not allow so few steps.
    """
    import numpy as np
    import torch
    from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("stochastic_sampling"):
        raise BackboneError(
            f"scheduler {type(scheduler).__name__}: only a deterministic FlowMatchEulerDiscreteScheduler can be run; "
            "put one in the model's scheduler folder"
        )
    own: Any = type(scheduler).from_config(scheduler.config)
    mu = calculate_shift(
        tokens,
        own.config.get("base_image_seq_len", 256),
        own.config.get("max_image_seq_len", 4096),
        own.config.get("base_shift", 0.5),
        own.config.get("max_shift", 1.15),
    )
    with np.errstate(invalid="ignore", divide="ignore"):  # the check below says it better
        own.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device="cpu", mu=mu)
    if not torch.isfinite(own.sigmas).all():
        raise ConfigError(f"steps = {steps}: too few for this model's scheduler (shift_terminal); use 2 or more")
    return own.sigmas


def mask_schedule(
    phases: Sequence[tuple[float, RegionMask | None]], sigmas: Tensor
) -> tuple[tuple[float, RegionMask | None], ...]:
    """From (until this share of the steps, mask) to (while sigma is above this, mask).

    A share s of n steps covers the first int(s * n) of them.
    """
    levels = sigmas.tolist()
    total = len(levels) - 1
    return tuple((levels[int(share * total)], mask) for share, mask in phases)


def usable(
    speed: SpeedConfig, plan: Plan | None, layout: TokenLayout, transformer: Any
) -> tuple[SpeedConfig, tuple[str, ...]]:
    """What of `speed` a plan allows, with every open question settled, and a note where that changes the picture."""
    if speed.cache == "none" or plan is None:
        return EXACT, ()
    if not layout.hints:
        kept = speed.cache == "background"  # without regions all of the picture may change
        return EXACT, ("the plan has no regions, so the background is not held to the source",) if kept else ()
    if speed.isolate_reference is None:
        speed = replace(speed, isolate_reference=timeless_reference(transformer))
    return speed, ()


def timeless_reference(transformer: Any) -> bool:
    """Whether reference tokens are modulated as clean ones at every noise level."""
    return bool(transformer.config.get("zero_cond_t", False))


def regions(plan: Plan | None, source: Size) -> tuple[str | None, tuple[Box, ...], tuple[str, ...]]:
    """(main prompt, boxes in the source's pixels, hints) of a plan; (None, (), ()) without one."""
    if plan is None:
        return None, (), ()
    found = plan.to(source).regions
    return plan.prompt, tuple(region.box for region in found), tuple(region.hint for region in found)
