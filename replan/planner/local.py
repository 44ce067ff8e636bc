"""The local planner: any transformers image-text-to-text model; Qwen2.5-VL and newer are the ones meant."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LogitsProcessor,
    StoppingCriteria,
    TorchAoConfig,
)
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_flash_attn_2_available

from replan.errors import ConfigError, PlannerError
from replan.hub import absent, unreachable
from replan.images import ImageLimits, check_size, fit_area, to_rgb
from replan.plan import is_complete
from replan.planner.base import (
    PROMPT_FILE,
    Frame,
    Outcome,
    PlannerConfig,
    frame_of,
    message,
    read_answer,
    read_template,
)
from replan.planner.processor import load_processor
from replan.types import EditRequest, Plan, Size

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

OnText = Callable[[str], bool | None]

VIEW = ImageLimits(min_side=1)  # aspect above 100 is refused: Qwen's processors give up at 200
_QUIET = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
_TAIL = 16  # tokens; "</region>" has nine characters


@dataclass(frozen=True, slots=True)
class View:
    """A request as the model gets it: the picture, the chat text, and the size that its box numbers refer to."""

    image: Image
    text: str
    frame: Size


class LocalPlanner:
    """Plans with a model in this process. Not safe for calls from several threads at once."""

    def __init__(self, model: Any, processor: Any, config: PlannerConfig, template: str, known_frame: Frame) -> None:
        self.model = model
        self.processor = processor
        self.config = config
        self.template = template
        self.known_frame: Frame = known_frame

    def __call__(self, request: EditRequest) -> Plan:
        """One plan. Raises PlanError for a bad answer, PlannerError when the model could not run."""
        outcome = self.plan_many([request])[0]
        if isinstance(outcome, Plan):
            return outcome
        raise outcome

    def plan_many(self, requests: Sequence[EditRequest], *, sampled: bool = False) -> list[Outcome]:
        """One outcome per request, `batch_size` at a time; an answer does not depend on its neighbours."""
        temperature = self.config.candidate_temperature if sampled else self.config.temperature
        outcomes: list[Outcome] = []
        for start in range(0, len(requests), self.config.batch_size):
            batch = requests[start : start + self.config.batch_size]
            views = [self.view(request) for request in batch]
            answers = self.answer(views, [request.seed for request in batch], temperature)
            for request, view, (answer, is_cut) in zip(batch, views, answers, strict=True):
                outcomes.append(self._read(request, view, answer, is_cut))
        return outcomes

    def _read(self, request: EditRequest, view: View, answer: str, is_cut: bool) -> Outcome:
        """An answer as a plan in the source's pixels, or why it is none."""
        cut = f"the answer was cut off at {self.config.max_new_tokens} tokens" if is_cut else None
        return read_answer(answer, view.frame, Size(*request.image.size), self.template, cut)

    def stream(self, request: EditRequest, on_text: OnText) -> Plan:
        """One plan as by a call; `on_text` gets the answer so far after each token and stops it by returning False.

        Raises PlanError, also for an answer that was stopped before its plan, and PlannerError.
        """
        view = self.view(request)
        answer, is_cut = self.answer([view], [request.seed], self.config.temperature, on_text)[0]
        outcome = self._read(request, view, answer, is_cut)
        if isinstance(outcome, Plan):
            return outcome
        raise outcome

    def view(self, request: EditRequest) -> View:
        """Prepare one request: cap the picture, find out what the model will see of it, write the prompt."""
        source = Size(*request.image.size)
        check_size(source, VIEW)
        image = to_rgb(request.image)
        if self._size_limits() is None:
            seen = fit_area(source, min(self.config.max_pixels, source.width * source.height), 1)
            image = image if seen == source else image.resize(seen)
        else:
            grid = self.processor.image_processor(images=[image], size=self._size_limits())["image_grid_thw"][0]
            patch = self.processor.image_processor.patch_size
            seen = Size(int(grid[2]) * patch, int(grid[1]) * patch)
        frame = frame_of(self.config, self.known_frame, seen, source)
        content = message(self.template, self._plain(request.instruction), frame, self.config.image_first)
        turns = [{"role": "user", "content": content}]
        return View(image, self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), frame)

    @torch.inference_mode()
    def answer(
        self, views: Sequence[View], seeds: Sequence[int], temperature: float, on_text: OnText | None = None
    ) -> list[tuple[str, bool]]:
        """Generate one answer per view; the flag says that it met max_new_tokens. `on_text` hears the first one."""
        tokenizer = self.processor.tokenizer
        limits = self._size_limits()
        inputs = self.processor(
            text=[view.text for view in views],
            images=[[view.image] for view in views],
            text_kwargs={"padding": True, "padding_side": "left"},
            images_kwargs={} if limits is None else {"size": limits},
            return_tensors="pt",
        ).to(self.model.device, dtype=self.model.dtype)
        start = inputs["input_ids"].shape[1]
        settings = copy.deepcopy(self.model.generation_config)  # keeps the checkpoint's end tokens and penalties
        # Neutral values, not None: `generate` fills a None from the checkpoint's own sampling settings.
        settings.update(
            do_sample=False, temperature=1.0, top_p=1.0, top_k=50, num_beams=1,
            max_new_tokens=self.config.max_new_tokens,
        )  # fmt: skip
        if self.config.cache == "static":
            settings.cache_implementation = "static"  # on a GPU `generate` then compiles the forward of one token
        if settings.pad_token_id is None:
            settings.pad_token_id = tokenizer.pad_token_id
        draw = [OwnSampling(seeds, temperature, self.config.top_p)] if temperature > 0 else []
        try:
            tokens_BT = self.model.generate(
                **inputs,
                generation_config=settings,
                logits_processor=draw,
                stopping_criteria=[
                    StopAtRegionEnd(tokenizer, start),
                    *([] if on_text is None else [TellText(tokenizer, start, on_text)]),
                ],
            )[:, start:]
        except torch.OutOfMemoryError as error:
            raise PlannerError(
                f"the planner ran out of memory on {len(views)} pictures of up to {self.config.max_pixels:,} pixels: "
                "lower planner.batch_size or planner.max_pixels"
            ) from error
        return [self._read_tokens(row.tolist(), settings.eos_token_id) for row in tokens_BT]

    def _read_tokens(self, tokens: list[int], eos: int | list[int] | None) -> tuple[str, bool]:
        """One row's text up to its end token, and whether it met the limit before its end."""
        tokenizer = self.processor.tokenizer
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        end = next((at for at, token in enumerate(tokens) if token in ends), None)
        kept = [token for token in tokens[:end] if token != tokenizer.pad_token_id]
        # Tags may be special tokens of an own tokenizer, so nothing may be skipped as special.
        text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text, end is None and len(kept) >= self.config.max_new_tokens and not is_complete(text)

    def _size_limits(self) -> dict[str, int] | None:
        """Fewest and most pixels for a Qwen image processor, the most capped by the settings; None for other kinds."""
        processor = self.processor.image_processor
        size = processor.size
        if not hasattr(processor, "merge_size") or "longest_edge" not in size:
            return None
        most = min(int(size["longest_edge"]), self.config.max_pixels)
        return {"shortest_edge": min(int(size["shortest_edge"]), most), "longest_edge": most}

    def _plain(self, instruction: str) -> str:
        """The user's words without the model's control tokens, which would open a picture or end the turn."""
        added = self.processor.tokenizer.added_tokens_decoder.values()
        special = "|".join(re.escape(token.content) for token in added if token.special)
        return re.sub(special, " ", instruction) if special else instruction


class StopAtRegionEnd(StoppingCriteria):
    """Ends each row where its region list ends; most models would go on with an end-of-turn token or with chatter."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer = tokenizer
        self.start = start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        done = [self._is_done(row) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _is_done(self, tokens: list[int]) -> bool:
        # The whole answer is read only when its tail looks right, so that a step costs the same however long it is.
        return "</region>" in self.tokenizer.decode(tokens[-_TAIL:]) and is_complete(self.tokenizer.decode(tokens))


class TellText(StoppingCriteria):
    """Tells the first row's text after each token, and ends everything when the listener returns False."""

    def __init__(self, tokenizer: Any, start: int, on_text: OnText) -> None:
        self.tokenizer, self.start, self.on_text = tokenizer, start, on_text

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        text = self.tokenizer.decode(input_ids[0, self.start :], clean_up_tokenization_spaces=False)
        is_over = self.on_text(text) is False
        return torch.full((input_ids.shape[0],), is_over, dtype=torch.bool, device=input_ids.device)


class OwnSampling(LogitsProcessor):
    """Draws every row's next token from the row's own generator, whatever the batch and the global random state.

    Gumbel-max: argmax of log-probabilities / temperature + Gumbel noise is a sample from the softmax, so the greedy
    loop of `generate` does the drawing. The noise is made on the CPU: the same on every device.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits_BV = scores.float() / self.temperature
        if self.top_p < 1:
            logits_BV = nucleus(logits_BV, self.top_p)
        size = logits_BV.shape[-1]
        noise_BV = torch.stack([torch.rand(size, generator=g, dtype=torch.float64) for g in self.generators])
        noise_BV = -torch.log(-torch.log(noise_BV.clamp_min(1e-300)))
        return logits_BV + noise_BV.to(logits_BV)


def nucleus(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Bar all but the likeliest tokens that together reach the probability `top_p`; the likeliest always stays."""
    ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probability_BV = ordered_BV.softmax(-1)
    barred_BV = probability_BV.cumsum(-1) - probability_BV >= top_p
    return logits_BV.masked_fill(torch.zeros_like(barred_BV).scatter(-1, order_BV, barred_BV), -torch.inf)


def load_local(
    name: str, config: PlannerConfig, device: torch.device | str = "auto", dtype: torch.dtype | str = "auto"
) -> LocalPlanner:
    """Load a hub id or a folder. PlannerError says what is missing."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device)
    if dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    extra = quantization(config.quantize, device, dtype)
    try:
        model_type = AutoConfig.from_pretrained(name).model_type
        processor = load_processor(name, model_type)
        attention = choose_attention(config, device, dtype)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, **extra
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if unreachable(error):
            raise PlannerError(absent(f"planner {name}")) from error
        raise PlannerError(
            f"planner {name!r} cannot be loaded: {error}\nName a folder with a transformers image-text-to-text model, "
            "a hub id, mini, or a service (http(s)://host/v1#model, openai:model, gemini:model)"
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise PlannerError(f"planner {name!r}: its processor takes no pictures; a vision-language model is needed")
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise PlannerError(f"planner {name!r}: has no chat template; an instruction-tuned model is needed")
    # A model that brings its own prompt was trained for this work, in pixels; a stock Qwen3-VL answers in thousandths.
    own = cached_file(name, PROMPT_FILE, **_QUIET)
    known: Frame = "thousand" if own is None and model_type.startswith("qwen3") else "seen"
    placed = model if extra else model.to(device)
    return LocalPlanner(placed.eval(), processor, config, read_template(config, own), known)


def quantization(name: str, device: torch.device, dtype: torch.dtype | str) -> dict[str, Any]:
    """What `from_pretrained` needs for smaller weights. Raises ConfigError when the library or a GPU is missing."""
    if name == "none":
        return {}
    package = "bitsandbytes" if name == "nf4" else "torchao"
    if name != "int8" and device.type != "cuda":
        raise ConfigError(f"planner.quantize = {name}: needs a CUDA device; int8 runs anywhere")
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"planner.quantize = {name}: needs {package}; pip install 'replan[gpu]'")
    if name == "nf4":
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return {"quantization_config": BitsAndBytesConfig(**four), "device_map": {"": device}}
    library: Any = importlib.import_module("torchao.quantization")
    kind = library.Int8WeightOnlyConfig if name == "int8" else library.Float8DynamicActivationFloat8WeightConfig
    return {"quantization_config": TorchAoConfig(kind()), "device_map": {"": device}}


def choose_attention(config: PlannerConfig, device: torch.device, dtype: torch.dtype | str) -> str:
    """Flash-attention where it is installed and can run, SDPA otherwise, unless the settings insist."""
    if config.attention != "auto":
        return config.attention
    half = dtype in (torch.float16, torch.bfloat16)
    return "flash_attention_2" if device.type == "cuda" and half and is_flash_attn_2_available() else "sdpa"
