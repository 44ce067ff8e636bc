"""The loop against the stock scheduler, guidance against its formula, cancelling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from replan.denoise import Cancelled, guide, sample

SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0])


def field(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * x) * (1 + sigma.to(x.dtype))


def start(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_stock_scheduler(dtype: torch.dtype) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=list(np.linspace(1, 0.2, 5)))
    expected = start(dtype)
    for index, time in enumerate(scheduler.timesteps):
        v = field(expected, scheduler.sigmas[index])
        expected = scheduler.step(v, time, expected, return_dict=False)[0]
    got = sample(field, start(dtype), scheduler.sigmas)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rescale", [False, True])
def test_guidance(rescale: bool) -> None:
    def away(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.cos(x)

    x, sigma = start(), torch.tensor(0.5)
    positive, negative = field(x, sigma), away(x, sigma)
    expected = 4 * positive - 3 * negative
    got = guide(field, away, 4.0, rescale)(x, sigma)
    if rescale:
        assert torch.allclose(got.norm(dim=-1), positive.norm(dim=-1), atol=1e-5)
        assert torch.allclose(torch.cosine_similarity(got, expected, dim=-1), torch.ones(2, 6), atol=1e-5)
    else:
        assert torch.allclose(got, expected, atol=1e-5)


def test_reports_every_step_and_the_estimate() -> None:
    seen: list[tuple[int, int]] = []
    estimates: list[torch.Tensor] = []

    def on_step(step: int, total: int, estimate: torch.Tensor) -> None:
        seen.append((step, total))
        estimates.append(estimate)

    end = sample(field, start(), SIGMAS, on_step)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.allclose(estimates[-1], end, atol=1e-6)  # the last step goes all the way to the clean latent
    assert torch.equal(end, sample(field, start(), SIGMAS))


def test_a_false_answer_cancels() -> None:
    steps: list[int] = []

    def on_step(step: int, total: int, estimate: torch.Tensor) -> bool:
        steps.append(step)
        return step < 2

    with pytest.raises(Cancelled, match="after step 2 of 4"):
        sample(field, start(), SIGMAS, on_step)
    assert steps == [1, 2]


def test_leaves_no_graph_and_no_trace_in_the_global_generator() -> None:
    weight = torch.ones(1, requires_grad=True)
    before = torch.random.get_rng_state()
    out = sample(lambda x, sigma: x * weight, start(), SIGMAS)
    assert not out.requires_grad
    assert torch.equal(before, torch.random.get_rng_state())
