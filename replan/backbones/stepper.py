"""One velocity for all backbones: sorts tokens, decides what a step computes and what it takes from earlier steps.

A backbone gives one function, the forward of its transformer over the tokens of a `Query`. Everything else is here:
the two branches of classifier-free guidance, region masks, and the caches between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replan.attention import Prepared, bytes_of, executor_of, prepare
from replan.backbones.base import Conditioning, timeless_reference
from replan.denoise import guide
from replan.errors import ConfigError
from replan.mask import RegionMask, TokenOrder, sort_tokens
from replan.processors import Processors, Step
from replan.speed import EXACT, Kind, plan_steps


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """The tokens of one forward.

    hidden   image tokens [B, Q, C]: noise first, then references where they are queried
    text     [B, T, D]
    noise    how many of the image tokens are noise
    text_T   the model's own place of each text token, and
    image_Q  the same for image tokens among [noise | refs]; None = all of them, in the model's own order
    step     what attention does; None = the stock model
    """

    hidden: Tensor
    text: Tensor
    noise: int
    text_T: Tensor | None = None
    image_Q: Tensor | None = None
    step: Step | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        """Attention kwargs of the transformer."""
        return {} if self.step is None else {"attention_mask": self.step}


KINDS: Mapping[str, tuple[Kind, ...]] = {
    "none": ("full",),
    "reference": ("full", "cached"),
    "background": ("full", "cached", "region"),
}
Forward = Callable[[Query, Tensor, Conditioning], Tensor]  # (query, sigma [], cond) -> [B, Q or more, C]


@dataclass(frozen=True, slots=True)
class Engine:
    """A transformer, its forward, and where and how its attention runs."""

    transformer: Any
    forward: Forward
    executor: str
    device: torch.device


class Branch:
    """v of one prompt. `order` is None for the stock model; `lender` is the branch whose reference cache it shares."""

    def __init__(
        self, engine: Engine, cond: Conditioning, name: str, order: TokenOrder | None, lender: Branch | None = None
    ) -> None:
        self._engine, self._cond, self._name = engine, cond, name
        self.order = None if order is None else order.to(engine.device)
        self.prepared: dict[tuple[RegionMask, Kind], Prepared] = {}  # masks by identity: they do not compare equal
        self._reference, self._text = cond.tensors["reference"], cond.tensors["text"]
        if self.order is not None:
            self._processors = Processors(engine.transformer, None if lender is None else lender._processors)
            self._reference = self._reference[:, self.order.ref_R]
            self._text = self._text[:, self.order.text_T]
            self._joint_S = self.order.joint_S.cpu()
            self._image_S = self.order.joint_S[len(self.order.text_T) :] - len(self.order.text_T)

    def __call__(self, x: Tensor, sigma: Tensor, kind: Kind, *, keep: bool) -> Tensor:
        """[B, P, C]; zeros where a region step did not look. `keep`: leave keys and values to later steps."""
        order, batch, tokens = self.order, len(x), x.shape[1]
        count = tokens if order is None or kind != "region" else order.active
        hidden = x if order is None else x[:, order.noise_P[:count]]
        if kind == "full":
            hidden = torch.cat([hidden, self._reference.expand(batch, -1, -1)], dim=1)
        text = self._text.expand(batch, -1, -1)
        query, context = Query(hidden, text, count), nullcontext()
        if order is not None:
            step, context = self._step(sigma, kind, count, keep=keep), self._processors.installed()
            query = Query(hidden, text, count, order.text_T, self._image_S[: hidden.shape[1]], step)
        with self._engine.transformer.cache_context(self._name), context:
            v = self._engine.forward(query, sigma, self._cond)[:, :count]
        if order is None:
            return v
        full = v.new_zeros(batch, tokens, v.shape[2])
        full[:, order.noise_P[:count]] = v
        return full

    def _step(self, sigma: Tensor, kind: Kind, count: int, *, keep: bool) -> Step:
        order, speed = self.order, self._cond.speed
        assert order is not None
        text, tokens = len(order.text_T), len(order.noise_P)
        total = text + tokens + len(order.ref_R)
        mask = self._cond.mask(float(sigma))
        if mask is not None and (mask, kind) not in self.prepared:
            rows = total if kind == "full" else text + count
            prepared = prepare(mask.take(self._joint_S), self._engine.executor, self._engine.device, rows)
            self.prepared[mask, kind] = prepared
        return Step(
            mask=None if mask is None else self.prepared[mask, kind],
            background=(text + order.active, text + tokens)
            if keep and speed.cache == "background" and kind != "region"
            else None,
            reference=(text + tokens, total) if keep and speed.cache != "none" and kind == "full" else None,
            reuse=(kind == "region", kind != "full"),
            shared=bool(speed.isolate_reference) and len(self._reference) == len(self._text) == 1,
        )


class Stepper:
    """v(x, sigma) with classifier-free guidance inside, following the kinds of step that cond.speed plans.

    It keeps state from one step to the next. A call at a noise level that does not follow the last one, with another
    batch or with gradients is a full step, so no answer ever rests on another picture's state.
    """

    def __init__(self, engine: Engine, cond: Conditioning, *, rescale: bool) -> None:
        self._cond, self._rescale = cond, rescale
        mask = cond.masks[0][1] if cond.masks else None
        order = None if mask is None else sort_tokens(cond.layout, mask, cond.speed.halo)
        cached = order is not None and order.active > 0 and cond.speed.cache != "none"
        exact = cached and bool(cond.speed.isolate_reference) and timeless_reference(engine.transformer)
        self._shares_reference = exact
        self._positive = Branch(engine, cond, "cond", order)
        self._negative: Branch | None = None
        if cond.negative is not None:
            against = None
            if cached and order is not None:
                text_T = torch.arange(cond.negative.layout.text_length, dtype=torch.int32)
                against = TokenOrder(text_T, order.noise_P, order.ref_R, order.active)
            lender = self._positive if exact else None
            self._negative = Branch(engine, cond.negative, "uncond", against, lender)
        self._levels = cond.sigmas.tolist()
        steps = len(self._levels) - 1
        speed = cond.speed if cached else EXACT
        self.kinds: tuple[Kind, ...] = plan_steps(speed, steps, exact_reference=exact)
        self._allowed = KINDS[speed.cache]
        self.taken: list[Kind] = []
        self._last, self._batch = -1, 0

    @property
    def _branches(self) -> list[Branch]:
        return [self._positive] if self._negative is None else [self._positive, self._negative]

    @property
    def active(self) -> int | None:
        """Noise tokens in regions and their halo; None without regions."""
        return None if self._positive.order is None else self._positive.order.active

    @property
    def executors(self) -> set[str]:
        """What carried out the masks so far."""
        return {executor_of(mask) for branch in self._branches for mask in branch.prepared.values()}

    @property
    def plan_bytes(self) -> int:
        """Bytes on the device that the plan takes: the order of the tokens and the masks; not the caches."""
        order = self._positive.order
        found = 0 if order is None else sum(place.nbytes for place in (order.text_T, order.noise_P, order.ref_R))
        return found + sum(bytes_of(mask) for branch in self._branches for mask in branch.prepared.values())

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma)
        step = self._levels.index(level) if level in self._levels[:-1] else -1
        follows = step == self._last + 1 and len(x) == self._batch and not torch.is_grad_enabled()
        kind = self.kinds[step] if step > 0 and follows else "full"
        if step == 0:
            self.taken = []
        v = self.step(x, sigma, kind)
        self._last, self._batch = step if step >= 0 else len(self._levels), len(x)
        return v

    def step(self, x: Tensor, sigma: Tensor, kind: Kind) -> Tensor:
        """v(x, sigma) by a step of this kind. Raises ConfigError for a kind that cond.speed does not allow, and
        BackboneError when a step reuses what no step has computed."""
        if kind not in self._allowed:
            raise ConfigError(
                f"a {kind} step: with speed.cache = {self._cond.speed.cache} only {', '.join(self._allowed)}"
            )
        keep = not torch.is_grad_enabled()
        self.taken.append(kind)

        def positive(x: Tensor, sigma: Tensor) -> Tensor:
            return self._positive(x, sigma, kind, keep=keep)

        def negative(x: Tensor, sigma: Tensor) -> Tensor:
            assert self._negative is not None
            # the positive branch has just computed the very same reference
            lent = keep and kind == "full" and self._shares_reference
            return self._negative(x, sigma, "cached" if lent else kind, keep=keep)

        if self._negative is None:
            v = positive(x, sigma)
        else:
            v = guide(positive, negative, self._cond.scale, self._rescale)(x, sigma)
        return self._on_path(x, sigma, v)

    def _on_path(self, x: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        """The background's velocity, where it follows the source: straight to the reference, which it reaches at 0."""
        order, layout = self._positive.order, self._cond.layout
        if self._cond.speed.cache != "background" or order is None or order.active == 0:
            return v
        first = layout.noise_slice.stop
        place = layout.ref_slices[layout.edited_ref]
        source = self._cond.tensors["reference"][:, place.start - first : place.stop - first]
        path = (x.float() - source.float()) / sigma.to(x.device).float()
        outside_P = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        outside_P[order.noise_P[: order.active]] = False
        return torch.where(outside_P[:, None], path.to(v.dtype), v)
