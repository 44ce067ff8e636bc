"""The loop that trains every mini model: a budget in minutes, a cosine schedule, averaged weights, resumable."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long and how fast. `minutes` is the whole budget over all restarts; rates are peaks of a cosine schedule.

    `bf16` computes forward passes in bfloat16 where that is safe; weights stay in float32. `compiled` compiles the
    blocks of the model that takes the time; it needs a C++ compiler on a CPU.
    """

    minutes: float
    batch: int = 32
    lr: float = 1e-3
    muon_lr: float = 0.0
    warmup: int = 100
    ema: float = 0.998
    clip: float = 1.0
    save_every: int = 500
    log_every: int = 50
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    compiled: bool = False

    def precision(self) -> torch.autocast:
        """The context for a forward pass."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block weights are drawn from `seed`; the generator that everybody shares stays as it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden matrices (for Muon) and everything else: embeddings, norms, modulation, biases, outer projections."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = "blocks." in name or ".layers." in name or ".block." in name
        hidden = inner and parameter.ndim == 2 and "norm" not in name and "_mod." not in name
        (matrices if hidden else rest).append(parameter)
    return matrices, rest


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the hidden matrices and AdamW for the rest when `muon_lr` is set."""
    adamw = {"lr": config.lr, "betas": (0.9, 0.98), "weight_decay": 0.0}
    if not config.muon_lr:
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    matrices, rest = split_parameters(model)
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, **adamw),
    ]


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    config: TrainConfig,
    folder: Path,
    *,
    evaluate: Callable[[nn.Module, int], None] | None = None,
    evaluate_every: int = 0,
) -> nn.Module:
    """Train until the budget is spent; return the model holding its averaged weights.

    `loss_at(step)` gives the loss of one batch and must depend on nothing but the step and the model. State goes to
    `folder/state.pt` (atomically) every `save_every` steps; a second call goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.to(config.device)
    state_file = folder / "state.pt"
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optims = optimizers(model, config)
    peaks = [[group["lr"] for group in optim.param_groups] for optim in optims]
    step, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=config.device)
        model.load_state_dict(state["model"])
        average, step, spent = state["average"], state["step"], state["spent"]
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        logger.info("resumed at step %d, %.1f of %.1f minutes spent", step, spent / 60, config.minutes)

    def save() -> None:
        state = {"model": model.state_dict(), "average": average, "optims": [o.state_dict() for o in optims]}
        torch.save(state | {"step": step, "spent": spent}, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)

    recent: list[float] = []
    tick = time.monotonic()
    while spent < config.minutes * 60:
        rate = _rate(step, spent / (config.minutes * 60), config.warmup)
        for optim, groups in zip(optims, peaks, strict=True):
            for group, peak in zip(optim.param_groups, groups, strict=True):
                group["lr"] = peak * rate
            optim.zero_grad(set_to_none=True)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optim in optims:
            optim.step()
        step += 1
        _average(average, model.state_dict().items(), min(config.ema, step / (step + 10)))
        recent.append(loss.item())
        now = time.monotonic()
        spent, tick = spent + now - tick, now
        if step % config.log_every == 0:
            logger.info("step %d  %.1f min  loss %.4f", step, spent / 60, sum(recent) / len(recent))
            recent.clear()
        if step % config.save_every == 0:
            save()
        if evaluate and evaluate_every and step % evaluate_every == 0:
            with _averaged(model, average):
                evaluate(model, step)
            tick = time.monotonic()
    save()
    model.load_state_dict(average)
    return model.cpu().eval()


def _rate(step: int, progress: float, warmup: int) -> float:
    """Linear warm-up in steps, then a cosine over the budget down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def _average(average: dict[str, Tensor], current: Iterable[tuple[str, Tensor]], decay: float) -> None:
    for name, value in current:
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


class _averaged:
    """Within the block the model holds its averaged weights and is in evaluation mode."""

    def __init__(self, model: nn.Module, average: dict[str, Tensor]) -> None:
        self._model, self._average = model, average

    def __enter__(self) -> None:
        self._kept = {name: value.detach().clone() for name, value in self._model.state_dict().items()}
        self._model.load_state_dict(self._average)
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        self._model.load_state_dict(self._kept)
        self._model.train()
