"""Qwen-Image-Edit: a stock QwenImageEditPipeline and its parts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from replan.backbones.base import Conditioning, EditConfig, generators, mask_schedule, regions, schedule, usable
from replan.backbones.memo import Memo, fingerprint
from replan.backbones.runtime import Runtime, guard, load_pipeline
from replan.backbones.stepper import Engine, Query, Stepper
from replan.errors import ConfigError, PlanError
from replan.mask import TokenLayout, phases, without_regions
from replan.types import EditRequest, Grid, Plan, Size

if TYPE_CHECKING:
    from PIL.Image import Image


CONTROL_TOKENS = tuple(
    f"<|{name}|>"
    for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad", "endoftext")
)


@dataclass(frozen=True, slots=True)
class Pictures:
    """What the model sees: pictures for the text encoder, tensors for the VAE, the frame of the result."""

    seen: Any
    pixels: Any
    frame: Size
    refs: tuple[Size, ...]


class QwenImageEdit:
    """Sequence: [picture as the text encoder saw it | main | hint 1..n | noise | reference].

    A hint is encoded with the picture, as a prompt would be, and then cut down to its own words and the template's end.
    """

    stock = "QwenImageEditPipeline"

    def __init__(self, pipe: Any, attention: str = "auto") -> None:
        self.pipe, self.attention = pipe, attention
        self.memo = Memo()

    @classmethod
    def load(cls, weights: str, runtime: Runtime) -> QwenImageEdit:
        """From a hub id or a folder. Raises BackboneError, ConfigError."""
        import diffusers
        from transformers.utils.import_utils import is_torchvision_available

        # without torchvision transformers cannot build the processor's video half, which nothing here uses
        parts = {} if is_torchvision_available() else {"processor": picture_processor(weights)}
        pipe = load_pipeline(getattr(diffusers, cls.stock), weights, runtime, ("text_encoder",), **parts)
        return cls(pipe, runtime.attention)

    @torch.no_grad()
    def condition(self, request: EditRequest, plan: Plan | None, config: EditConfig) -> Conditioning:
        """Encode picture, prompt and hints; see Backbone."""
        image = request.image.convert("RGB")
        source = Size(*image.size)
        prompt, boxes, hints = regions(plan, source)
        prompt = request.instruction if prompt is None else prompt
        pictures = self._pictures(image, [extra.convert("RGB") for extra in request.extra_images], config)
        text, layout = self._text(prompt, hints, pictures)
        shared = {"reference": self._reference(pictures, text.dtype), **self._guidance(config)}
        noise = layout.noise
        sigmas = schedule(self.pipe.scheduler, config.steps, noise.columns * noise.rows)
        speed, notes = usable(config.speed, plan, layout, self.pipe.transformer)
        negative = None
        if config.guided:
            against, bare = self._text(config.negative_prompt, (), pictures)
            tensors = {**shared, "text": against}
            alone = ((0.0, without_regions(bare)),) if speed.isolate_reference else ()
            negative = Conditioning(tensors, sigmas, bare, source, (request.seed,), alone, speed=speed)
        return Conditioning(
            tensors={**shared, "text": text},
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
        return Stepper(engine, cond, rescale=True)

    @torch.no_grad()
    def decode(self, latent: Tensor, cond: Conditioning) -> Image:
        """The picture of a latent [1, P, C], at the source's size."""
        pipe, size = self.pipe, self._size(cond.layout.noise)
        latent = pipe._unpack_latents(latent, size.height, size.width, pipe.vae_scale_factor).to(pipe.vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, pipe.vae.config.z_dim, 1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        # divided by 1 / std, not multiplied by std: the stock pipeline's rounding
        latent = latent / (1.0 / std).to(latent) + mean.to(latent)
        pixels = pipe.vae.decode(latent, return_dict=False)[0][:, :, 0]
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

    def _grid(self, size: Size) -> Grid:
        return Grid(size.width // self._token, size.height // self._token)

    def _pictures(self, image: Image, extra: Sequence[Image], config: EditConfig) -> Pictures:
        """One picture, for the text encoder and the VAE alike, at the size of the output."""
        if extra:
            raise ConfigError(
                f"{len(extra)} extra pictures: Qwen-Image-Edit takes one; use qwen-image-edit-plus for several"
            )
        processor, size = self.pipe.image_processor, fitted(image, config.max_area)
        seen = processor.resize(image, size.height, size.width)
        pixels = processor.preprocess(seen, size.height, size.width).unsqueeze(2)
        return Pictures(seen, pixels, size, (size,))

    def _reference(self, pictures: Pictures, dtype: torch.dtype) -> Tensor:
        """Reference tokens [1, P, C] of all pictures."""
        frame = pictures.frame
        # `latents` given: nothing is drawn here, the noise has its own generators
        return self.pipe.prepare_latents(
            pictures.pixels, 1, self._channels, frame.height, frame.width, dtype, self._device, None, torch.empty(0)
        )[1]

    def _text(self, prompt: str, hints: Sequence[str], pictures: Pictures) -> tuple[Tensor, TokenLayout]:
        """Text tokens [1, L, D] of main prompt and hints, and the layout of the joint sequence.

        The vision tower runs once for all of them: the stock encoding of the main prompt is watched for what it yields.
        """
        for text in (prompt, *hints):
            self._refuse_control_tokens(text)
        seen = fingerprint(pictures.seen)
        main, vision, tower = self.memo(("prompt", prompt, seen), lambda: self._main(prompt, pictures))
        rows = [self.memo(("hint", hint, seen), lambda hint=hint: self._hint(hint, pictures, tower)) for hint in hints]
        grids = tuple(self._grid(size) for size in pictures.refs)
        counts = tuple(row.shape[1] for row in rows)
        layout = TokenLayout(vision, main.shape[1] - vision, counts, self._grid(pictures.frame), grids)
        return torch.cat([main, *(row.to(main) for row in rows)], dim=1), layout

    def _main(self, prompt: str, pictures: Pictures) -> tuple[Tensor, int, Any]:
        """Stock encoding of a prompt [1, L, D], how many of its tokens are the picture's, the vision tower's output."""
        pipe, yielded = self.pipe, []
        watch = pipe.text_encoder.model.visual.register_forward_hook(lambda module, args, out: yielded.append(out))
        try:
            main, _ = pipe.encode_prompt(prompt, image=pictures.seen, device=self._device)
        finally:
            watch.remove()
        return main, self._vision_end(prompt, pictures) - pipe.prompt_template_encode_start_idx, yielded[-1]

    def _inputs(self, text: str, pictures: Pictures) -> Any:
        """The text encoder's inputs, as the stock pipeline makes them."""
        prompt = self.pipe.prompt_template_encode.format(self._picture_prompt(pictures) + text)
        return self.pipe.processor(text=[prompt], images=pictures.seen, padding=True, return_tensors="pt")

    def _picture_prompt(self, pictures: Pictures) -> str:
        """What the stock pipeline puts before the user's words beside its template; here the template has it all."""
        return ""

    def _vision_end(self, text: str, pictures: Pictures) -> int:
        """How many tokens precede the user's words: template, and every picture up to its closing token."""
        ids = self._inputs(text, pictures)["input_ids"][0]
        closing = (ids == self.pipe.tokenizer.convert_tokens_to_ids("<|vision_end|>")).nonzero()[:, 0]
        return int(closing[-1]) + 1

    def _hint(self, hint: str, pictures: Pictures, vision: Any) -> Tensor:
        """The rows [1, L, D] of a hint's own words, out of an encoding that saw the picture.

        `vision` is the vision tower's output for the same pictures. The call has the stock pipeline's arguments.
        """
        encoder, inputs = self.pipe.text_encoder, self._inputs(hint, pictures).to(self._device)
        known = inspect.signature(type(encoder).forward).parameters  # older transformers see the pictures once more
        seen = (
            {"mm_encoder_outputs": {"image": vision}}
            if "mm_encoder_outputs" in known
            else {"pixel_values": inputs["pixel_values"]}
        )
        states = encoder(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            image_grid_thw=inputs["image_grid_thw"],
            output_hidden_states=True,
            **seen,
        ).hidden_states[-1]
        return states[:, self._vision_end(hint, pictures) :]

    def _refuse_control_tokens(self, text: str) -> None:
        """A prompt that spells a control token would be read as pictures or turns that are not there."""
        for token in CONTROL_TOKENS:
            if token in text:
                raise PlanError(f"prompt {text!r}: the text encoder takes {token} for its own token; leave it out")

    def _guidance(self, config: EditConfig) -> dict[str, Tensor]:
        if not self.pipe.transformer.config.guidance_embeds:
            return {}
        return {"guidance": torch.full([1], config.guidance, device=self._device, dtype=torch.float32)}

    def _forward(self, query: Query, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The transformer over the tokens of a query, one prompt."""
        transformer, batch, device = self.pipe.transformer, len(query.hidden), query.hidden.device
        time = (sigma * self.pipe.scheduler.config.num_train_timesteps).to(device)
        guidance = cond.tensors.get("guidance")
        grid = cond.layout.noise
        shapes = [(1, each.rows, each.columns) for each in (grid, *cond.layout.refs)]
        kwargs = query.kwargs
        if query.step is not None:
            image, text = transformer.pos_embed([shapes], max_txt_seq_len=query.text.shape[1], device=device)
            kwargs = {"attention_mask": replace(query.step, rope=(image[query.image_Q], text[query.text_T]))}
            # only their numbers count now, and which of them are noise
            queried, few = query.hidden.shape[1], math.gcd(query.noise, 64)
            noise = shapes[0] if query.noise == grid.columns * grid.rows else (1, query.noise // few, few)
            shapes = [noise, *shapes[1:]] if queried > query.noise else [noise]
        return transformer(
            hidden_states=query.hidden,
            timestep=time.expand(batch).to(query.hidden.dtype) / 1000,
            guidance=None if guidance is None else guidance.expand(batch),
            encoder_hidden_states_mask=None,
            encoder_hidden_states=query.text,
            img_shapes=[shapes] * batch,
            attention_kwargs=kwargs,
            return_dict=False,
        )[0]


def frame(source: Size, config: EditConfig, token: int) -> Size:
    """The size to work at; the stock rule holds for every `token`."""
    return fitted(source, config.max_area)


def fitted(image: Image | Size, area: int) -> Size:
    """The stock pipelines' size for a picture: `area` pixels at its own aspect, sides in multiples of 32."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    width, height, _ = calculate_dimensions(area, image.width / image.height)
    return Size(max(width, 32), max(height, 32))


def picture_processor(weights: str) -> Any:
    """The model's processor without its video half. Raises BackboneError when it cannot be loaded."""
    from transformers import Qwen2VLProcessor

    from replan.planner.processor import image_only

    what = f"model {weights}: processor"
    return guard(what, lambda: image_only(Qwen2VLProcessor).from_pretrained(weights, subfolder="processor"))
