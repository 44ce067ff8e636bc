"""InstructPix2Pix, a baseline of the benchmark: the stock diffusers pipeline. It has no region masks and no planner."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from replan.backbones.base import generators
from replan.backbones.runtime import Runtime, guard
from replan.images import fit_area, to_rgb
from replan.types import Edit, EditRequest, Size

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS = "timbrooks/instruct-pix2pix"


class Settings(Protocol):
    """What the pipeline takes: steps, the two guidance scales, and the most pixels that it works at."""

    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def image_guidance(self) -> float: ...
    @property
    def max_area(self) -> int: ...


class InstructPix2Pix:
    """Edits by the bare instruction. The weights load at the first edit. Not safe for several threads."""

    def __init__(self, weights: str, settings: Settings, runtime: Runtime) -> None:
        self.weights = weights
        self.settings = settings
        self.runtime = runtime
        self._pipe: Any = None

    def __call__(self, request: EditRequest) -> Edit:
        """The edited picture at the source's size. Raises BackboneError when the weights cannot be loaded."""
        source = to_rgb(request.image)
        began = time.perf_counter()
        self.load()
        loaded = time.perf_counter()
        size = fit_area(Size(*source.size), self.settings.max_area, 64)  # the U-Net halves the latent three times
        image: Image = self._pipe(
            request.instruction,
            image=source.resize(size),
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            image_guidance_scale=self.settings.image_guidance,
            generator=generators([request.seed])[0],
        ).images[0]
        timings = {"load": loaded - began, "sample": time.perf_counter() - loaded}
        return Edit(request, None, image.resize(source.size), (), timings)

    def load(self) -> None:
        """Load the weights, if they are not there yet. Raises BackboneError."""
        if self._pipe is None:
            self._pipe = guard(f"model {self.weights}", self._load)

    def _load(self) -> Any:
        """The pipeline with its published sampler, ancestral Euler, and without the filter that blackens pictures."""
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
            StableDiffusionInstructPix2PixPipeline,
        )
        from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

        pipe: Any = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            self.weights, dtype=self.runtime.torch_dtype(), safety_checker=None, requires_safety_checker=False
        )
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        device = self.runtime.torch_device()
        if self.runtime.offload == "model" and device.type != "cpu":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        return pipe
