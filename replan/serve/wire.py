"""What travels: one schema, version 1. JSON, pictures as base64 PNG; unknown fields are refused.

A request of another version is refused with 422. Within a version fields are only added, each with a default.
Nothing here needs a web framework: clients use it too.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from replan.errors import ImageError
from replan.types import Size

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
ID = r"[A-Za-z0-9_.:-]{1,120}"
# A 16 x 16 grey square, so that every example can be sent as it stands.
EXAMPLE_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR4nGNsaGhgIAUwkaR6VMOohiGlAQDJTAGgLgFHggAAAABJRU5ErkJggg=="
)
EXAMPLE_PLAN = {
    "version": 1,
    "size": [16, 16],
    "prompt": "keep everything else unchanged",
    "regions": [{"box": [2, 2, 9, 12], "hint": "a red ceramic cup"}],
}


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


RequestId = Annotated[
    str | None,
    Field(
        pattern=f"^{ID}$",
        description="Names the call, also in logs. The same id with the same content, sent again, is the same work: "
        "it joins the one under way or gets the answer once more; another replica does it anew, with the same result.",
    ),
]
Picture = Annotated[str, Field(min_length=1, description="A picture file (PNG, JPEG, WebP, ...) in base64.")]
Timeout = Annotated[
    float | None, Field(gt=0, le=3600, description="Seconds after which the answer is of no use; at most the server's.")
]
Scale = Annotated[int, Field(ge=1, le=5, description="A score on its dimension's published scale.")]


class EditCall(Message):
    """`POST /v1/edits`: a picture and an instruction; with a plan nothing is planned."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"version": 1, "image": EXAMPLE_PNG, "instruction": "make the left cup red", "seed": 7},
                {
                    "version": 1,
                    "id": "step12-item3-rollout5",
                    "image": EXAMPLE_PNG,
                    "instruction": "make the left cup red",
                    "plan": EXAMPLE_PLAN,
                    "settings": {"steps": 20, "mask.expand": 0.15},
                    "timeout": 60,
                },
            ]
        }
    )

    version: Literal[1] = 1
    id: RequestId = None
    image: Picture
    extra_images: list[Picture] = Field(default=[], max_length=8, description="Further pictures to look at.")
    instruction: str = Field(default="", max_length=4000, description="May be empty when there is a plan.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Same seed, same picture.")
    plan: dict[str, Any] | None = Field(default=None, description="A plan file's content; see `replan plan`.")
    baseline: bool | None = Field(default=None, description="No plan and no regions; null: as the service was started.")
    strict: bool = Field(
        default=False, description="Refuse when planning fails, instead of editing by the bare instruction."
    )
    settings: dict[str, Any] = Field(
        default={}, max_length=32, description="Edit settings by dotted name, such as steps or mask.expand."
    )
    timeout: Timeout = None


class EditReply(Message):
    """A finished edit. The picture that was sent does not come back."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "version": 1, "id": "step12-item3-rollout5", "image": EXAMPLE_PNG, "seed": 0, "plan": EXAMPLE_PLAN,
                    "notes": [], "timings": {"condition": 0.02, "sample": 0.4, "decode": 0.03},
                    "model": "mini",
                }
            ]
        }
    )  # fmt: skip

    version: Literal[1] = 1
    id: str
    image: str = Field(description="PNG in base64.")
    seed: int
    plan: dict[str, Any] | None
    notes: list[str]
    timings: dict[str, float] = Field(description="Seconds per stage; `queue` is the wait before the first.")
    model: str


class JudgeCall(Message):
    """`POST /v1/verdicts`: an edit to judge, on some or all dimensions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "version": 1, "source": EXAMPLE_PNG, "result": EXAMPLE_PNG, "instruction": "make the left cup red",
                    "expression": "the left cup", "dimensions": ["target", "effect", "consistency"],
                }
            ]
        }
    )  # fmt: skip

    version: Literal[1] = 1
    id: RequestId = None
    case: int = Field(default=0, description="The item's number, for logs and for judges that know their items.")
    source: Picture
    result: Picture
    instruction: str = Field(max_length=4000)
    expression: str = Field(default="", max_length=4000, description="What the instruction refers to.")
    dimensions: list[Literal["target", "effect", "consistency", "quality"]] = Field(
        default=["target", "effect", "consistency", "quality"], min_length=1, max_length=4
    )
    extra: dict[str, Any] = Field(
        default={}, max_length=64, description="The row's extra_info; the mini judge needs it."
    )
    timeout: Timeout = None


class Scored(Message):
    """One dimension: a score, or why there is none. No score is never a zero."""

    score: Scale | None = None
    unscored: str | None = None
    reason: str = ""
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


class JudgeReply(Message):
    """One entry per dimension asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "version": 1, "id": "4f0c", "timings": {"queue": 0.0, "judge": 0.8},
                    "scores": {
                        "target": {"score": 5, "reason": "the left cup changed", "model": "mini-exact"},
                        "effect": {"unscored": "the answer was not JSON (3 tries)"},
                    },
                }
            ]
        }
    )  # fmt: skip

    version: Literal[1] = 1
    id: str
    scores: dict[str, Scored]
    timings: dict[str, float] = {}


class About(Message):
    """`GET /v1/about`: what answers here, and what it takes."""

    version: Literal[1] = 1
    replan: str
    service: Literal["editor", "judge"]
    model: dict[str, Any]
    limits: dict[str, Any]


class Trouble(Message):
    """Inside of every answer with a status of 400 or more."""

    type: Literal["invalid", "too_large", "conflict", "busy", "loading", "timeout", "unavailable", "failed", "unknown"]
    message: str
    field: str | None = Field(default=None, description="What in the request is at fault.")
    id: str | None = Field(default=None, description="The call's, where it was read and had one.")


class ErrorReply(Message):
    """Every answer with a status of 400 or more, but those of /live and /health, which keep their own shape."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {"type": "busy", "message": "16 requests are waiting", "field": None, "id": "4f0c"},
                    "detail": "16 requests are waiting",
                },
            ]
        }
    )

    error: Trouble
    detail: str = Field(description="The message once more, where clients of other services look for it.")


def encode(image: Image) -> str:
    """A picture as base64 PNG. Little compression: the pixels are the same and it is several times quicker."""
    content = io.BytesIO()
    image.save(content, format="PNG", compress_level=1)
    return base64.b64encode(content.getvalue()).decode("ascii")


def decode(text: str, most_pixels: int) -> Image:
    """A picture out of base64. Raises ImageError; the size is checked on the header, before anything is decoded."""
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    from replan.images import DECODE_ERRORS, FORMATS, ImageLimits, check_size, to_rgb

    head, comma, rest = text.partition(",")
    body = rest if comma and head.startswith("data:image/") else text  # data URLs are taken as well
    try:
        content = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"not base64: {error}") from error
    try:
        pil.init()
        image = pil.open(io.BytesIO(content), formats=[form for form in FORMATS if form in pil.OPEN])
        with image:
            check_size(Size(*image.size), ImageLimits(max_pixels=most_pixels))
            return to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not a picture in a format that is read ({', '.join(FORMATS)})") from error
    except pil.DecompressionBombError as error:
        raise ImageError("too large to open safely") from error
    except DECODE_ERRORS as error:
        raise ImageError(f"damaged or unreadable: {type(error).__name__}") from error
