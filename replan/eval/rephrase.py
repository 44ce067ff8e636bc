"""Global rephrase: a language model rewrites the instruction without seeing the picture, then the stock editor runs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from replan.chat import ChatError, Patient, Question, Refused, is_service, open_service
from replan.errors import PlannerError

if TYPE_CHECKING:
    from replan.backbones.runtime import Runtime

Rewriter = Callable[[str], str]
MAX_TOKENS = 1024
RETRIES, TIMEOUT = 5, 120.0


@cache
def template() -> str:
    """The prompt that ships with the package."""
    return resources.files("replan").joinpath("prompts", "rephrase.txt").read_text(encoding="utf-8")


def prompt_hash() -> str:
    """First 16 digits of the prompt's SHA-256."""
    return hashlib.sha256(template().encode()).hexdigest()[:16]


def load_rewriter(spec: str, runtime: Runtime) -> Rewriter:
    """A service (see replan.chat.open_service), or a local model's hub id or folder, loaded at the first call.

    The rewriter raises PlannerError when the model fails. Raises ConfigError for a service without model or key.
    """
    if is_service(spec):
        return _remote(spec)
    local: list[Any] = []
    lock = threading.Lock()

    def rewrite(text: str) -> str:
        with lock:
            if not local:
                local.append(_load_local(spec, runtime))
            return read_rewrite(local[0](_prompt(text)))

    return rewrite


def _remote(spec: str) -> Rewriter:
    """A rewriter behind a service; an outage is the planner's, never an unusable plan or a score."""
    try:
        service, model = open_service(spec, TIMEOUT)
    except ChatError as error:
        raise PlannerError(f"rewriter {spec!r}: {error}") from error
    patient = Patient(service, RETRIES)

    def rewrite(text: str) -> str:
        try:
            return read_rewrite(patient.ask(Question([_prompt(text)], MAX_TOKENS)).text)
        except (ChatError, Refused) as error:
            raise PlannerError(f"rewriter {model}: {error}") from error

    return rewrite


def read_rewrite(answer: str) -> str:
    """The instruction in an answer, without quotes and white space around it. Raises PlannerError when it is empty."""
    text = answer.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`":
        text = text[1:-1].strip()
    if not text:
        raise PlannerError("the rewriter's answer was empty")
    return text


def _prompt(instruction: str) -> str:
    return template().rstrip("\n").replace("{instruction}", instruction)


def _load_local(name: str, runtime: Runtime) -> Callable[[str], str]:
    """A transformers chat model, vision-language ones included; greedy, so that a text always becomes the same one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=runtime.torch_dtype())
        except ValueError:  # a model of text alone
            model = AutoModelForCausalLM.from_pretrained(name, dtype=runtime.torch_dtype())
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise PlannerError(f"rewriter {name!r} cannot be loaded: {error}") from error
    model.to(runtime.torch_device()).eval()

    @torch.inference_mode()
    def answer(prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        tokens_BT = model.generate(
            **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        return tokenizer.decode(tokens_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer
