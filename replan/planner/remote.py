"""Remote planners: OpenAI-compatible chat completions (vLLM, OpenAI and many more) and Gemini."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from replan.chat import ChatError, Patient, Question, Refused, Service, open_service
from replan.errors import ConfigError, PlannerError
from replan.images import ImageLimits, check_size, fit_area, to_rgb
from replan.planner.base import Frame, Outcome, PlannerConfig, frame_of, message, read_answer, read_template
from replan.types import EditRequest, Plan, Size

BACKOFF = 1.0  # seconds before the first retry
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is given up at once


class RemotePlanner:
    """Plans with a service; safe for calls from several threads."""

    def __init__(self, service: Service, model: str, config: PlannerConfig, known_frame: Frame) -> None:
        # An answer costs money and minutes: a garbled one is told at once, and every retry is worth a warning.
        self.patient = Patient(
            service, config.retries, BACKOFF, longest_wait=LONGEST_WAIT, retry_garbled=False, level=logging.WARNING
        )
        self.model = model
        self.config = config
        self.template = read_template(config)
        self.known_frame: Frame = known_frame

    def __call__(self, request: EditRequest) -> Plan:
        """One plan. Raises PlanError for a bad answer, PlannerError when the service failed."""
        outcome = self._plan(request, self.config.temperature)
        if isinstance(outcome, Plan):
            return outcome
        raise outcome

    def plan_many(self, requests: Sequence[EditRequest], *, sampled: bool = False) -> list[Outcome]:
        """One outcome per request, in order, with at most `concurrency` requests under way."""
        temperature = self.config.candidate_temperature if sampled else self.config.temperature
        pool = ThreadPoolExecutor(max_workers=max(1, min(self.config.concurrency, len(requests))))
        try:
            return list(pool.map(lambda request: self._plan(request, temperature), requests))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nothing new is sent

    def _plan(self, request: EditRequest, temperature: float) -> Outcome:
        source = Size(*request.image.size)
        check_size(source, ImageLimits(min_side=1))
        # Sides of the server's own multiple and below its limit: what it sees is what we sent.
        seen = fit_area(source, self.config.max_pixels, self.config.multiple)
        frame = frame_of(self.config, self.known_frame, seen, source)
        png = io.BytesIO()
        to_rgb(request.image).resize(seen).save(png, format="PNG", compress_level=1)
        content = message(self.template, request.instruction, frame, self.config.image_first)
        parts = [png.getvalue() if part["type"] == "image" else part["text"] for part in content]
        drawn = {"top_p": self.config.top_p, "seed": request.seed} if temperature > 0 else {}
        try:
            reply = self.patient.ask(Question(parts, self.config.max_new_tokens, temperature, **drawn))
        except (ChatError, Refused) as error:
            failure = PlannerError(f"planner {self.model}: {error}")
            failure.__cause__ = error  # as `raise from` would: the failure is returned
            return failure
        if not reply.text.strip():
            why = "all tokens were spent before it; raise planner.max_new_tokens" if reply.is_cut else "it is empty"
            return PlannerError(f"planner {self.model}: the service sent no answer: {why}")
        cut = f"the answer was cut off at {self.config.max_new_tokens} tokens" if reply.is_cut else None
        return read_answer(reply.text, frame, source, self.template, cut)


def chat_planner(spec: str, config: PlannerConfig) -> RemotePlanner:
    """`openai:model` with OPENAI_API_KEY, or `http(s)://host/v1#model` with REPLAN_API_KEY if the server wants one."""
    service, model = _open(spec, config)
    return RemotePlanner(service, model, config, "thousand" if "qwen3" in model.lower() else "seen")


def gemini_planner(spec: str, config: PlannerConfig) -> RemotePlanner:
    """`gemini:model` with GEMINI_API_KEY or GOOGLE_API_KEY."""
    service, model = _open(spec, config)
    return RemotePlanner(service, model, config, "thousand")


def _open(spec: str, config: PlannerConfig) -> tuple[Service, str]:
    try:
        return open_service(spec, config.timeout)
    except (ConfigError, ChatError) as error:
        raise PlannerError(f"planner {spec!r}: {error}") from error
