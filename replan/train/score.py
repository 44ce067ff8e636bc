"""From a planner's answer to its reward: read, gate, edit, judge. Asynchronous; the same for every engine.

malformed plan, plan that the editor refuses    the policy's fault: scored
editor, judge or network out of order           our fault: no reward at all (`Scored.value is None`)
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from replan.errors import ConfigError, PlanError, ReplanError
from replan.judge import DIMENSIONS, Case
from replan.plan import parse
from replan.train.detection import detection_reward, read_objects
from replan.train.reward import RewardConfig, TextScore, edit_reward, format_reward, is_open, score_text
from replan.types import Edit, EditRequest, Failure, Plan, Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from replan.judge import Judge
    from replan.train.data import Row

log = logging.getLogger(__name__)
T = TypeVar("T")

EditFunction = Callable[[EditRequest], Edit]

JUDGED = ("target", "effect", "consistency")  # quality takes no part in the reward
_KEPT = 64  # judged plans that stay at hand: rollouts of one group often agree


@dataclass(frozen=True, slots=True)
class Scored:
    """What became of a rollout. `value` is None when our machinery failed; then, and only then, `failure` is set."""

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    plan: Plan | None = None
    picture: Image | None = None
    ratings: Mapping[str, int] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """A rendered plan with its ratings, or what failed."""

    picture: Image | None = None
    ratings: Mapping[str, int] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    failure: Failure | None = None
    refused: str = ""  # the plan's own fault


class Scorer:
    """Scores rollouts with at most `workers` edits and judgements under way at once.

    All answers to one item are rendered with one seed, so that rollouts of a group differ by their plans alone; equal
    plans for one item are rendered once.
    """

    def __init__(
        self,
        config: RewardConfig,
        edit: EditFunction | None = None,
        judge: Judge | None = None,
        seed: int = 0,
        workers: int = 8,
    ) -> None:
        if config.kind == "edit" and (edit is None or judge is None):
            raise ConfigError("reward.kind = edit: needs an editor and a judge (services.editor, services.judge)")
        self.config, self.edit, self.judge, self.seed = config, edit, judge, seed
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="score")
        self._works = False  # editor and judge have answered once
        self._judged: OrderedDict[tuple[Any, ...], asyncio.Task[Judged]] = OrderedDict()

    async def score(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Scored]:
        """One outcome per answer, in order."""
        return list(await asyncio.gather(*map(self.score_one, rows, answers)))

    async def score_one(self, row: Row, answer: str) -> Scored:
        """The reward of one answer to one row."""
        if self.config.kind == "detection":
            found = detection_reward(answer, _objects(row))
            return Scored(found.value, found.parts)
        text = score_text(answer, row.task.examples, self.config)
        plan = _plan(row, answer)
        if self.config.kind == "format":
            told = format_reward(text, self.config, row.task.answer)
            return Scored(told.value, {**told.parts, "valid": float(_is_valid(text, plan))}, plan=plan)
        judged = Judged()
        if plan is not None and is_open(text, self.config):
            judged = await self._judge_once(row, plan)
            if judged.failure is not None:
                return Scored(None, failure=judged.failure, plan=plan)
        told = edit_reward(text, judged.ratings, self.config)
        parts = {**told.parts, "valid": float(_is_valid(text, plan)), "refused": float(bool(judged.refused))}
        return Scored(told.value, parts, None, plan, judged.picture, judged.ratings, judged.reasons)

    async def _judge_once(self, row: Row, plan: Plan) -> Judged:
        """Render and judge a plan, or wait for the same plan under way. A failure is forgotten at once."""
        loop = asyncio.get_running_loop()
        key = (id(loop), row.task.id, row.task.instruction, plan.prompt, plan.regions)
        if key not in self._judged:
            self._judged[key] = asyncio.ensure_future(self._render_and_judge(row, plan))
            done = [old for old, task in self._judged.items() if task.done()]
            for old in done[: max(0, len(self._judged) - _KEPT)]:
                del self._judged[old]
        judged = await asyncio.shield(self._judged[key])
        if judged.failure is not None:
            self._judged.pop(key, None)
        return judged

    async def _render_and_judge(self, row: Row, plan: Plan) -> Judged:
        edit, judge = self.edit, self.judge
        if edit is None or judge is None:
            raise ConfigError("reward.kind = edit: needs an editor and a judge")
        rate = judge.rate
        quiet = replace(plan, notes=())  # what parsing put right was scored; the editor need not log it again
        request = EditRequest(row.image(), row.task.instruction, self.seed + row.task.id, quiet)
        made = await self._try("editor", lambda: edit(request))
        if isinstance(made, PlanError):
            return Judged(refused=str(made))
        if isinstance(made, Failure):
            return Judged(failure=made)
        case = _case(row, made.image)
        found = await asyncio.gather(*(self._try("judge", lambda d=d: rate(case, DIMENSIONS[d])) for d in JUDGED))
        for outcome in found:
            if isinstance(outcome, PlanError):
                return Judged(failure=Failure("judge", str(outcome)))
            if isinstance(outcome, Failure):
                return Judged(failure=outcome)
        self._works = True
        ratings = {name: rating.score for name, rating in zip(JUDGED, found, strict=True)}  # type: ignore[union-attr]
        reasons = {name: rating.reason for name, rating in zip(JUDGED, found, strict=True)}  # type: ignore[union-attr]
        return Judged(made.image, ratings, reasons)

    async def _try(self, stage: str, call: Callable[[], T]) -> T | PlanError | Failure:
        """Run in a thread; errors become values. Before anything ever worked, a ConfigError is the user's to mend."""
        import httpx

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except ConfigError as error:
            if not self._works:
                raise
            return Failure(stage, f"{type(error).__name__}: {error}")
        except PlanError as error:
            return error
        except (ReplanError, OSError, httpx.HTTPError) as error:
            log.debug("%s failed", stage, exc_info=True)
            return Failure(stage, f"{type(error).__name__}: {error}")
        except RuntimeError as error:  # an editor in this process on a full device; everything else is a bug
            if type(error).__name__ != "OutOfMemoryError":
                raise
            return Failure(stage, "the device is out of memory")

    def close(self) -> None:
        """Start nothing new."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _plan(row: Row, answer: str) -> Plan | None:
    """The answer's plan in pixels of the row's picture; None when it holds none that can be used."""
    try:
        plan = parse(answer, row.task.frame, row.task.examples.boxes)
    except PlanError:
        return None
    return plan.to(_size(row.png))


def _is_valid(text: TextScore, plan: Plan | None) -> bool:
    """A well-formed answer of whose regions none is dropped. Boxes may be put in order or clipped to the picture."""
    return text.format == 1.0 and plan is not None and text.count == len(plan.regions)


def _size(png: bytes) -> Size:
    from PIL import Image as Images

    with Images.open(io.BytesIO(png)) as image:
        return Size(*image.size)


def _case(row: Row, picture: Image) -> Case:
    return Case(
        row.task.id,
        row.task.instruction,
        row.task.expression,
        row.image,
        lambda: picture,
        hashlib.sha256(row.png).hexdigest(),
        hashlib.sha256(picture.tobytes()).hexdigest(),
        row.task.extra,
    )


def _objects(row: Row) -> list[dict[str, Any]]:
    """The known objects of a detection row."""
    try:
        return read_objects(row.task.answer)
    except ValueError as error:
        raise ConfigError(f"row {row.index}: its answer is {error}; build the data with kind=detection") from error
