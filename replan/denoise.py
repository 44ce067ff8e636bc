"""The only denoising loop. Callables in, tensors out; it knows no backbone.

A velocity is `v(x, sigma)`: the flow from data to noise at noise level sigma, for latents x [B, P, C]. A clean picture
is sigma = 0, pure noise sigma = 1, and x(sigma) = (1 - sigma) * data + sigma * noise, so that data = x - sigma * v.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from replan.errors import ReplanError

Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int, Tensor], bool | None]


class Cancelled(ReplanError):
    """The caller's on_step returned False."""


@torch.no_grad()
def sample(velocity: Velocity, latent: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Euler from sigmas[0] to sigmas[-1]. latent [B, P, C]; sigmas [steps + 1], descending, float32, on the CPU.

    `on_step(step, total, estimate)` is called after each step with the present estimate of the clean latent;
    when it returns False (None goes on), Cancelled is raised.
    """
    total = len(sigmas) - 1
    near = sigmas.to(latent.device)  # the step is done with device scalars, as the stock schedulers do it
    for step in range(total):
        v = velocity(latent, sigmas[step])
        estimate = latent - near[step] * v if on_step is not None else None
        latent = euler_step(latent, v, near[step], near[step + 1])
        if on_step is not None and estimate is not None and on_step(step + 1, total, estimate) is False:
            raise Cancelled(f"stopped after step {step + 1} of {total}")
    return latent


def euler_step(latent: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One step, summed in float32 and cast back to the velocity's type: the rule of the stock flow-match scheduler."""
    return (latent.float() + (sigma_next - sigma) * v).to(v.dtype)


def guide(positive: Velocity, negative: Velocity, scale: float, rescale: bool) -> Velocity:
    """Classifier-free guidance: negative + scale * (positive - negative).

    With `rescale`, each token of the result is brought to the length that it has in the positive velocity.
    """

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v, away = positive(x, sigma), negative(x, sigma)
        guided = away + scale * (v - away)
        if not rescale:
            return guided
        return guided * (torch.norm(v, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))

    return velocity
