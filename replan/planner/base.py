"""What every planner shares: the protocol, the settings, the prompt, and the way from an answer to a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from replan.errors import ConfigError, PlanError, PlannerError
from replan.plan import AnswerError, default_template, examples_in, parse
from replan.types import EditRequest, Plan, Size

if TYPE_CHECKING:
    import torch

Frame: TypeAlias = Literal["auto", "seen", "original", "thousand"]
Attention: TypeAlias = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Cache: TypeAlias = Literal["auto", "dynamic", "static"]
Quantize: TypeAlias = Literal["none", "int8", "fp8", "nf4"]
Outcome: TypeAlias = Plan | PlanError | PlannerError  # PlanError: the answer was bad; PlannerError: the machinery broke

PROMPT_FILE = "replan_prompt.txt"  # in a model's folder: the prompt that this model was trained with


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """Settings of all planners; the defaults stand here and nowhere else.

    frame: what the boxes of an answer are measured in. `seen`: pixels of the picture as the model saw it, resized
    (Qwen2.5-VL); `thousand`: thousandths of each side (Qwen3-VL, Gemini); `original`: taken as pixels of the source,
    the first release's convention; `auto`: what the model is known for, `seen` otherwise.
    """

    max_pixels: int = 1_204_224  # the planner's view; 1,536 tokens of 28x28 pixels, about what it was trained on
    max_new_tokens: int = 2048
    temperature: float = 0.0  # of a single plan; 0 is greedy
    candidate_temperature: float = 0.8  # of sampled candidates
    top_p: float = 1.0  # sampling keeps the likeliest tokens up to this probability
    frame: Frame = "auto"
    image_first: bool = True  # False: instructions, picture, request, as in the released planner's training
    template: str | None = None  # a prompt file; None: the one in the model's folder, else the package's
    batch_size: int = 8  # answers generated together, local models
    attention: Attention = "auto"  # local models; auto: flash-attention where it is installed and can run, else SDPA
    # Local models. static: keys and values in a buffer of fixed size, so that a GPU runs one compiled forward for every
    # token: minutes of compilation once, then 2 to 3 times the tokens per second. auto: static with --compile.
    cache: Cache = "auto"
    quantize: Quantize = "none"  # local models: int8 and fp8 by torchao, nf4 by bitsandbytes; all but int8 on CUDA only
    timeout: float = 120.0  # seconds to wait for a remote answer
    retries: int = 5  # further tries after a remote 408, 409, 429, 5xx, lost connection or timeout
    concurrency: int = 8  # remote requests under way at once
    multiple: int = 28  # remote pictures get sides of this multiple, so that Qwen2.5-VL servers leave them as they are

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "concurrency", "multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"planner.{name} {getattr(self, name)}: must be at least 1")
        if self.max_pixels < self.multiple**2:
            raise ConfigError(f"planner.max_pixels {self.max_pixels}: must be at least {self.multiple}²")
        for name in ("temperature", "candidate_temperature", "timeout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"planner.{name} {getattr(self, name)}: must be finite and not negative")
        if self.candidate_temperature == 0 or self.timeout == 0 or self.retries < 0:
            raise ConfigError("planner: candidate_temperature and timeout must exceed 0, retries must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"planner.top_p {self.top_p}: must lie in (0, 1]")
        choices = {"frame": Frame, "attention": Attention, "cache": Cache, "quantize": Quantize}
        for name, known in ((name, get_args(kind)) for name, kind in choices.items()):
            if getattr(self, name) not in known:
                raise ConfigError(f"planner.{name} {getattr(self, name)!r}: must be one of {', '.join(known)}")


class Planner(Protocol):
    """A picture and an instruction to a plan in the frame of the source picture."""

    def __call__(self, request: EditRequest) -> Plan:
        """One plan, greedy unless configured otherwise. Raises PlanError or PlannerError."""
        ...

    def plan_many(self, requests: Sequence[EditRequest], *, sampled: bool = False) -> list[Outcome]:
        """One outcome per request, in order; `sampled` draws each answer with the request's own seed."""
        ...


def load_planner(
    spec: str,
    config: PlannerConfig | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
) -> Planner:
    """A planner by name.

    mini: the small one in this package; a hub id or a folder: a local vision-language model; http(s)://host/v1#model,
    openai:model: chat completions; gemini:model: Gemini. Keys of remote services are read from the environment here.
    `device` auto is cuda, mps or cpu, whichever is there; `dtype` auto is bfloat16 on cuda, else float32.
    """
    config = PlannerConfig() if config is None else config
    if spec.startswith(("http://", "https://", "openai:")):
        from replan.planner.remote import chat_planner

        return chat_planner(spec, config)
    if spec.startswith("gemini:"):
        from replan.planner.remote import gemini_planner

        return gemini_planner(spec, config)
    if spec == "mini":
        from importlib.resources import files

        spec = str(files("replan").joinpath("mini", "weights", "planner"))
    from replan.planner.local import load_local

    return load_local(spec, config, device, dtype)


def candidates(planner: Planner, request: EditRequest, count: int) -> list[Outcome]:
    """`count` sampled outcomes with seeds request.seed, request.seed + 1, and so on."""
    return planner.plan_many([replace(request, seed=request.seed + k) for k in range(count)], sampled=True)


def read_template(config: PlannerConfig, own: str | None = None) -> str:
    """The prompt template: the configured file, else the model's `own` file, else the package's."""
    path = config.template or own
    if path is None:
        return default_template()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"planner.template {path}: cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"planner.template {path}: is empty")
    return text


def prompt_parts(template: str, instruction: str, frame: Size) -> tuple[str, str]:
    """What a template says before the instruction, and the rest from the instruction on.

    `{instruction}`, `{width}` and `{height}` are filled in, once each; other braces stay as they are. A template
    without `{instruction}` is followed by a line break and the instruction.
    """
    if "{instruction}" not in template:
        template += "\n{instruction}"
    template = template.replace("{width}", str(frame.width)).replace("{height}", str(frame.height))
    before, _, after = template.partition("{instruction}")
    return before, instruction + after.rstrip("\n")


def message(template: str, instruction: str, frame: Size, image_first: bool) -> list[dict[str, Any]]:
    """The content of the one user turn: a picture part and one or two text parts, in the asked order."""
    before, after = prompt_parts(template, instruction, frame)
    image: dict[str, Any] = {"type": "image"}
    if image_first:
        return [image, {"type": "text", "text": before + after}]
    return [{"type": "text", "text": before}, image, {"type": "text", "text": after}]


def frame_of(config: PlannerConfig, known: Frame, seen: Size, source: Size) -> Size:
    """The size that a model's box numbers refer to; `known` is the model's own convention, used by `auto`."""
    frame = known if config.frame == "auto" else config.frame
    return {"thousand": Size(1000, 1000), "original": source}.get(frame, seen)


def read_answer(answer: str, frame: Size, source: Size, template: str, cut: str | None) -> Plan | AnswerError:
    """An answer as a plan in the frame of the source, or why it is none. `cut` says that and where it was cut off."""
    try:
        plan = parse(answer, frame, examples_in(template))
    except AnswerError as error:
        return error if cut is None else AnswerError(f"{error} ({cut})", answer)
    return replace(plan.to(source), notes=plan.notes if cut is None else (*plan.notes, cut))
