"""Flux.1 Kontext: a stock FluxKontextPipeline and its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from replan.backbones.base import (
    Conditioning,
    EditConfig,
    generators,
    mask_schedule,
    regions,
    schedule,
    usable,
)
from replan.backbones.memo import Memo
from replan.backbones.runtime import Runtime, load_pipeline
from replan.backbones.stepper import Engine, Query, Stepper
from replan.errors import ConfigError
from replan.mask import TokenLayout, phases, without_regions
from replan.types import EditRequest, Grid, Plan, Size

if TYPE_CHECKING:
    from PIL.Image import Image

# Tight hints are rounded up to this many tokens, so that a compiled kernel meets few lengths; the padding is masked.
HINT_BUCKET = 8
MAX_TOKENS = 512  # the stock pipeline refuses more


class FluxKontext:
    """Sequence: [main (padded) | hint 1..n | noise | reference]; the reference has the size of the output."""

    def __init__(self, pipe: Any, attention: str = "auto") -> None:
        self.pipe, self.attention = pipe, attention
        self.memo = Memo()

    @classmethod
    def load(cls, weights: str, runtime: Runtime) -> FluxKontext:
        """From a hub id or a folder. Raises BackboneError, ConfigError."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline

        return cls(load_pipeline(FluxKontextPipeline, weights, runtime, ("text_encoder_2",)), runtime.attention)

    @torch.no_grad()
    def condition(self, request: EditRequest, plan: Plan | None, config: EditConfig) -> Conditioning:
        """Encode picture, prompt and hints; see Backbone."""
        if config.max_sequence_length > MAX_TOKENS:
            raise ConfigError(f"max_sequence_length = {config.max_sequence_length}: Flux takes at most {MAX_TOKENS}")
        if request.extra_images:
            count = len(request.extra_images)
            raise ConfigError(f"{count} extra pictures: Flux Kontext takes one; use qwen-image-edit-plus for several")
        image = request.image.convert("RGB")
        source = Size(*image.size)
        prompt, boxes, hints = regions(plan, source)
        prompt = request.instruction if prompt is None else prompt
        picture, grid = self._picture(image, frame(source, config, self._token))
        picture |= self._guidance(config)
        text, counts, pads = self._text(prompt, hints, config)
        layout = TokenLayout(0, config.max_sequence_length, counts, grid, (grid,), hint_pads=pads)
        sigmas = schedule(self.pipe.scheduler, config.steps, grid.columns * grid.rows)
        speed, notes = usable(config.speed, plan, layout, self.pipe.transformer)
        negative = None
        if config.guided:
            against, _, _ = self._text(config.negative_prompt, (), config)
            bare = TokenLayout(0, config.max_sequence_length, (), grid, (grid,))
            alone = ((0.0, without_regions(bare)),) if speed.isolate_reference else ()
            negative = Conditioning({**picture, **against}, sigmas, bare, source, (request.seed,), alone, speed=speed)
        return Conditioning(
            tensors={**picture, **text},
            sigmas=sigmas,
            layout=layout,
            source=source,
            seeds=(request.seed,),
            masks=mask_schedule(
                phases(layout, boxes, source, config.mask, isolated_reference=bool(speed.isolate_reference)), sigmas
            ),
            negative=negative,
            scale=config.true_cfg or 1.0,
            speed=speed,
            notes=notes,
        )

    def noise(self, cond: Conditioning) -> Tensor:
        """[seeds, P, C], as the stock pipeline draws it."""
        size = self._size(cond.layout.noise)
        dtype = cond.tensors["text"].dtype
        return self.pipe.prepare_latents(
            None, len(cond.seeds), self._channels, size.height, size.width, dtype, self._device, generators(cond.seeds)
        )[0]

    def velocity(self, cond: Conditioning) -> Stepper:
        """v(x, sigma); see Backbone."""
        engine = Engine(self.pipe.transformer, self._forward, self.attention, self._device)
        return Stepper(engine, cond, rescale=False)

    @torch.no_grad()
    def decode(self, latent: Tensor, cond: Conditioning) -> Image:
        """The picture of a latent [1, P, C], at the source's size."""
        pipe, size = self.pipe, self._size(cond.layout.noise)
        latent = pipe._unpack_latents(latent, size.height, size.width, pipe.vae_scale_factor)
        latent = (latent / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
        pixels = pipe.vae.decode(latent, return_dict=False)[0]
        picture = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
        pipe.maybe_free_model_hooks()
        return picture if picture.size == cond.source else picture.resize(cond.source)

    @property
    def _device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def _channels(self) -> int:
        return self.pipe.transformer.config.in_channels // 4

    @property
    def _token(self) -> int:
        """Pixels that one token covers each way: the VAE's factor times the 2x2 packing."""
        return self.pipe.vae_scale_factor * 2

    def _size(self, grid: Grid) -> Size:
        return Size(grid.columns * self._token, grid.rows * self._token)

    def _picture(self, image: Image, size: Size) -> tuple[dict[str, Tensor], Grid]:
        """Reference tokens [1, P, C] and the position ids of noise and reference [2P, 3]."""
        pipe = self.pipe
        pixels = pipe.image_processor.resize(image, size.height, size.width)
        pixels = pipe.image_processor.preprocess(pixels, size.height, size.width)
        dtype = pipe.text_encoder_2.dtype
        # `latents` given: nothing is drawn here, the noise has its own generators
        blank = torch.empty(0)
        _, reference, noise_ids, reference_ids = pipe.prepare_latents(
            pixels, 1, self._channels, size.height, size.width, dtype, self._device, None, blank
        )
        ids = torch.cat([noise_ids, reference_ids], dim=0)
        return {"reference": reference, "ids": ids}, Grid(size.width // self._token, size.height // self._token)

    def _text(
        self, prompt: str, hints: Sequence[str], config: EditConfig
    ) -> tuple[dict[str, Tensor], tuple[int, ...], tuple[int, ...]]:
        """Text tokens [1, L, D] of main prompt and hints, their ids, a pooled vector; each hint's length and padding.

        A hint is encoded padded, as the model knows its prompts, and then cut down to its own tokens.
        """
        pipe, limit = self.pipe, config.max_sequence_length
        main, pooled, _ = self.memo(
            ("prompt", prompt, limit),
            lambda: pipe.encode_prompt(prompt, device=self._device, max_sequence_length=limit),
        )
        pieces, counts, pads = [main], [], []
        for hint in hints:
            tokens = self.memo(
                ("hint", hint, limit),
                lambda hint=hint: pipe._get_t5_prompt_embeds(hint, max_sequence_length=limit, device=self._device),
            )
            ids = pipe.tokenizer_2(hint, max_length=limit, truncation=True).input_ids
            true = limit if config.hint_padding == "full" else len(ids)
            count = min(-(-true // HINT_BUCKET) * HINT_BUCKET, limit)
            pieces.append(tokens[:, :count])
            counts.append(count)
            pads.append(count - true)
        if hints and config.mask.pooled != "main":
            texts = list(hints) if config.mask.pooled == "hints" else [""]
            pooled = self.memo(
                ("pooled", *texts),
                lambda: pipe._get_clip_prompt_embeds(texts, device=self._device).mean(dim=0, keepdim=True),
            )
        text = torch.cat(pieces, dim=1)
        ids = torch.zeros(text.shape[1], 3, device=self._device, dtype=pipe.text_encoder.dtype)
        return {"text": text, "pooled": pooled, "text_ids": ids}, tuple(counts), tuple(pads)

    def _guidance(self, config: EditConfig) -> dict[str, Tensor]:
        if not self.pipe.transformer.config.guidance_embeds:
            return {}
        return {"guidance": torch.full([1], config.guidance, device=self._device, dtype=torch.float32)}

    def _forward(self, query: Query, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The transformer over the tokens of a query, one prompt."""
        tensors, batch = cond.tensors, len(query.hidden)
        time = (sigma * self.pipe.scheduler.config.num_train_timesteps).to(query.hidden.device)
        guidance = tensors.get("guidance")
        ids = tensors["ids"]
        return self.pipe.transformer(
            hidden_states=query.hidden,
            timestep=time.expand(batch).to(query.hidden.dtype) / 1000,
            guidance=None if guidance is None else guidance.expand(batch),
            pooled_projections=tensors["pooled"].expand(batch, -1),
            encoder_hidden_states=query.text,
            txt_ids=tensors["text_ids"],  # all alike, so they need no sorting
            img_ids=ids if query.image_Q is None else ids[query.image_Q],
            joint_attention_kwargs=query.kwargs,
            return_dict=False,
        )[0]


def frame(source: Size, config: EditConfig, token: int) -> Size:
    """The size to work at: the nearest trained aspect, or `max_area` at the picture's own; in whole tokens."""
    aspect = source.width / source.height
    if config.auto_resize:
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        aspect = max(source.width // token, 1) / max(source.height // token, 1)  # as the stock pipeline reckons it
        _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    else:
        width, height = round((config.max_area * aspect) ** 0.5), round((config.max_area / aspect) ** 0.5)
    return Size(max(width // token, 1) * token, max(height // token, 1) * token)
