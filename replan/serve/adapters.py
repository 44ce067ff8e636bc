"""The editor in the shapes of two older services, for their clients: thin, and with the manners of our own.

`POST /v1/images/generations`  the first RePlan's edit server: a planner's answer in, base64 PNG out
`POST /edit`, `/edit-upload`   the editing services of related projects: a prompt in, base64 PNG out, no input echoed
"""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi import Form, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from replan import plan as plans
from replan.errors import PlanError
from replan.serve import wire
from replan.serve.app import Service
from replan.serve.editing import picture
from replan.serve.limits import Limits, Problem, invalid
from replan.types import Box, Plan, Region, Size

Edit = Callable[[Request, wire.EditCall], Awaitable[wire.EditReply]]
_OLD_ROLES = (
    (r"main prompt", "main"), (r"image prompt", "vision"), (r"hint ([0-9]{1,3})", r"hint \1"),
    (r"noise bbox ([0-9]{1,3})", r"noise region \1"), (r"image bbox ([0-9]{1,3})", r"ref region \1"),
    (r"bbox ([0-9]{1,3})", r"region \1"),
    (r"noise background", "noise background"), (r"image background", "ref background"), (r"background", "background"),
)  # fmt: skip
# What a caller of an older shape calls a field or a setting of ours.
_OF_ANSWER = {"image": "image_base64", "plan": "response", "settings": "attention_rules"}
# The fields that give a setting of ours; the first that a call has counts.
_STEPS, _GUIDANCE = ("num_inference_steps", "num_inference_step"), ("guidance_scale", "text_guidance_scale")
UNUSED = "Accepted and without effect"
EXAMPLE_ANSWER = (
    "<think>the left cup is meant</think><gen_image>keep the rest</gen_image>"
    '<region>[{"bbox_2d": [2, 2, 9, 12], "hint": "a red cup"}]</region>'
)


class Generation(BaseModel):
    """Fields of the first RePlan's edit server, with its defaults. Seeds were random there; here a call has one."""

    model_config = ConfigDict(
        extra="forbid",
        hide_input_in_errors=True,
        json_schema_extra={
            "examples": [{"image_base64": wire.EXAMPLE_PNG, "instruction": "make it red", "response": EXAMPLE_ANSWER}]
        },
    )

    image_base64: wire.Picture
    instruction: str = Field(max_length=4000)
    response: str = Field(max_length=100_000, description="The planner's answer, word for word.")
    delete_main_prompt: bool = False
    replace_global_prompt: bool = False
    custom_global_prompt_text: str | None = Field(default=None, max_length=4000)
    expand_value: float = Field(default=0.15, ge=0, allow_inf_nan=False)
    expand_mode: Literal["ratio", "pixels"] = "ratio"
    attention_rules: dict[str, bool] | None = Field(
        default=None, max_length=10_000, description='{"Hint 1, BBox 1": true}; absent = false.'
    )
    bboxes_attend_to_each_other: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)


class _Wanted(BaseModel):
    """What the related editing services and their clients name, models taken together. Sizes follow the picture."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    prompt: str = Field(min_length=1, max_length=4000)
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Null draws one; the reply names it.")
    num_inference_steps: int | None = Field(default=None, ge=1)
    num_inference_step: int | None = Field(default=None, ge=1, description="The same, as some clients write it.")
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    text_guidance_scale: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Taken where there is no guidance_scale."
    )
    negative_prompt: str | None = Field(default=None, max_length=4000, description="Blank: none.")
    num_images_per_prompt: int | None = Field(default=None, description="1 or nothing: one picture per call.")
    width: int | None = Field(default=None, ge=1, description=f"{UNUSED}: the size follows the picture.")
    height: int | None = Field(default=None, ge=1, description=f"{UNUSED}: the size follows the picture.")
    image_guidance_scale: float | None = Field(default=None, description=f"{UNUSED}.")
    enhance_prompt: bool | None = Field(default=None, description=f"{UNUSED}: the planner does this here.")

    @field_validator("num_images_per_prompt")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise PydanticCustomError("one_picture", "must be 1: one picture per call")
        return value

    def first(self, fields: Sequence[str]) -> str:
        """The first of some fields that this call has; the first of all when it has none."""
        return next((field for field in fields if getattr(self, field) is not None), fields[0])


class Wanted(_Wanted):
    """`POST /edit`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": wire.EXAMPLE_PNG, "prompt": "make it red", "seed": 7}]}
    )

    image: wire.Picture


class WantedUpload(_Wanted):
    """`POST /edit-upload`."""

    image_file: UploadFile


def add_adapters(service: Service, edit: Edit) -> None:
    """Add the routes to an editor's app."""
    app, limits = service.app, service.limits

    @app.post("/v1/images/generations", tags=["other shapes"], summary="Edit by a planner's answer")
    async def generations(request: Request, call: Generation) -> dict[str, Any]:
        """The first RePlan's edit server."""
        with _in_words_of(_OF_ANSWER):
            reply = await edit(request, await asyncio.to_thread(by_answer, call, limits))  # it decodes the picture
        return {"data": [{"final_image_base64": reply.image}]}

    async def wanted(request: Request, call: Wanted) -> dict[str, Any]:
        start = time.monotonic()
        about = service.engine.describe()
        guided, bare = about.get("config", {}).get("true_cfg") is not None, about.get("planner") is None
        guidance = call.first(_GUIDANCE)
        words = {"instruction": "prompt", "steps": call.first(_STEPS), "guidance": guidance, "true_cfg": guidance}
        with _in_words_of(words | {"negative_prompt": "negative_prompt"}):
            reply = await edit(request, by_prompt(call, guided=guided, bare=bare))
        return {
            "success": True,
            "task_id": reply.id,
            "edited_image": reply.image,
            "seed": reply.seed,
            "original_prompt": call.prompt,
            "enhanced_prompt": reply.plan["prompt"] if reply.plan and reply.plan.get("prompt") else call.prompt,
            "gpu_id": 0,
            "processing_time": round(time.monotonic() - start, 4),
            "error": None,
        }

    @app.post("/edit", tags=["other shapes"], summary="Edit by a prompt, JSON")
    async def edit_json(request: Request, call: Wanted) -> dict[str, Any]:
        """The related services' shape, without the echo of the picture that was sent."""
        return await wanted(request, call)

    @app.post("/edit-upload", tags=["other shapes"], summary="Edit by a prompt, multipart")
    async def edit_upload(request: Request, form: Annotated[WantedUpload, Form()]) -> dict[str, Any]:
        """The same with the picture as a file."""
        content = await form.image_file.read()
        if not content:
            raise invalid("image_file", "is empty")
        image = base64.b64encode(content).decode("ascii")
        call = Wanted(image=image, **form.model_dump(exclude={"image_file"}))
        with _in_words_of({"image": "image_file"}):
            return await wanted(request, call)


@contextmanager
def _in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Problems inside name the field that the caller sent; ours of settings begin with the setting at fault."""
    try:
        yield
    except Problem as problem:
        setting = problem.message.partition(" ")[0].rstrip(":") if problem.field == "settings" else ""
        problem.field = names.get(setting) or names.get(problem.field or "", problem.field)
        raise


def by_prompt(call: Wanted, *, guided: bool, bare: bool) -> wire.EditCall:
    """Our call. Guidance is the true CFG scale with backbones that run with one; `bare` where nobody plans."""
    settings = {
        "steps": getattr(call, call.first(_STEPS)),
        "true_cfg" if guided else "guidance": getattr(call, call.first(_GUIDANCE)),
        "negative_prompt": (call.negative_prompt or "").strip() or None,
    }
    return wire.EditCall(
        image=call.image,
        instruction=call.prompt,
        seed=secrets.randbelow(2**31) if call.seed is None else call.seed,
        baseline=True if bare else None,
        settings={name: value for name, value in settings.items() if value is not None},
    )


def by_answer(call: Generation, limits: Limits) -> wire.EditCall:
    """Our call, with the answer parsed. Raises Problem that names the field."""
    size = Size(*picture(call.image_base64, "image_base64", limits).size)
    try:
        plan = plans.parse(call.response, size)
    except PlanError as error:
        raise invalid("response", error) from error
    if call.replace_global_prompt:
        plan = _replaced(plan, prompt=call.custom_global_prompt_text or plans.KEEP)
    if call.expand_mode == "pixels":
        by = int(call.expand_value)
        grown = (Box(r.box.left - by, r.box.top - by, r.box.right + by, r.box.bottom + by) for r in plan.regions)
        pairs = zip(plan.regions, grown, strict=True)
        plan = _replaced(plan, regions=tuple(Region(box.clip(size), r.hint, r.point) for r, box in pairs))
    settings: dict[str, Any] = {
        "mask.expand": 0.0 if call.expand_mode == "pixels" else call.expand_value,
        "mask.mutual": call.bboxes_attend_to_each_other,
        "mask.hide_main": call.delete_main_prompt,
    }
    if call.attention_rules is not None:
        settings["mask.rules"] = [{"until": 1.0, "rows": rows(call.attention_rules)}]
    return wire.EditCall(
        image=call.image_base64, instruction=call.instruction, seed=call.seed, plan=plans.to_json(plan),
        settings=settings,
    )  # fmt: skip


def rows(rules: dict[str, bool]) -> list[str]:
    """{"reader, read": bool} as lines of a rules file; whatever is not there is not read. Raises Problem."""
    reads: dict[str, list[str]] = {}
    for pair, allowed in rules.items():
        reader, comma, read = pair.replace("|", ",").partition(",")
        if not comma:
            raise invalid("attention_rules", f"{pair!r}: write 'reader, read', for example 'Hint 1, BBox 1'")
        names = (_role(reader), _role(read))
        if allowed:
            reads.setdefault(names[0], []).append(names[1])
    return [f"{reader}: {', '.join('+' + name for name in found)}" for reader, found in reads.items()]


def _role(name: str) -> str:
    for pattern, ours in _OLD_ROLES:
        match = re.fullmatch(pattern, name.strip(), re.IGNORECASE)
        if match:
            return match.expand(ours)
    raise Problem(422, "invalid", f"{name.strip()!r}: no part of the sequence is called so", "attention_rules")


def _replaced(plan: Plan, **changes: Any) -> Plan:
    from dataclasses import replace

    return replace(plan, **changes, raw="")
