"""Trains the second mini editor's autoencoder: a stock AutoencoderKLQwenImage, 8 pixels a latent cell, 16 channels.

The class is made for video. A single picture meets only the last of the three time steps of every kernel, so training
runs 2D convolutions with just those (`single_frame`), which gives the same numbers in half the time. Four pixels a cell
would be as cheap for the autoencoder, but cost the editor four times the tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage, QwenImageCausalConv3d
from torch import Tensor, nn

from replan.mini.train_autoencoder import fit_coder, pixels
from replan.mini.training import TrainConfig, seeded

logger = logging.getLogger(__name__)

CHANNELS = 16


def build_autoencoder() -> AutoencoderKLQwenImage:
    model = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],  # its length says how often height and width are halved
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    for name, module in model.named_modules():
        if isinstance(module, QwenImageCausalConv3d):
            with torch.no_grad():
                module.weight[:, :, :-1] = 0.0  # a picture never meets them; zeros pack well
        if name.endswith("conv2"):  # every residual block starts as the identity: much faster at the start
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return model


@contextmanager
def single_frame(model: AutoencoderKLQwenImage) -> Iterator[None]:
    """Within the block the causal 3D convolutions take one frame only, as 2D convolutions with their last time step."""
    convolutions = [module for module in model.modules() if isinstance(module, QwenImageCausalConv3d)]
    for module in convolutions:
        module.forward = partial(_convolve_frame, module)
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


def _convolve_frame(module: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """[B, C, 1, H, W] to [B, D, 1, H, W]; the causal padding in time is all zeros, so only the last step counts."""
    sides: Any = module._padding  # left, right, top, bottom, before, after
    padding = sides[2], sides[0]
    return F.conv2d(x[:, :, 0], module.weight[:, :, -1], module.bias, module.stride[1:], padding).unsqueeze(2)


def encode(model: AutoencoderKLQwenImage, images: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] to unscaled latents [B, C, H/8, W/8], as `model.encode(...).mode()` but without its cache."""
    return model.quant_conv(model.encoder(images.unsqueeze(2)))[:, :CHANNELS, 0]


def decode(model: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Unscaled latents to pixels, as `model.decode` but without its cache and not clamped."""
    return model.decoder(model.post_quant_conv(latents.unsqueeze(2)))[:, :, 0]


def train_autoencoder(folder: Path, config: TrainConfig, start: Path | None = None) -> AutoencoderKLQwenImage:
    """Train (or go on training) and write the model to `folder/vae`, its config holding each channel's mean and spread.

    A finished one is loaded as it is; `start` is the folder of another one to begin from.
    """
    if (folder / "vae").exists():
        return AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval()
    with seeded(config.seed):
        model = AutoencoderKLQwenImage.from_pretrained(start) if start else build_autoencoder()
    with single_frame(model):
        fit_coder(model, partial(encode, model), partial(decode, model), config, folder / "vae-run")
        with torch.no_grad():
            latents = encode(model, pixels(list(range(-64, 0)))).transpose(0, 1).flatten(1)
    logger.info("latent spread %.3f", float(latents.std()))
    model.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    model.save_pretrained(folder / "vae")
    return model


def refine_decoder(model: AutoencoderKLQwenImage, folder: Path, config: TrainConfig) -> AutoencoderKLQwenImage:
    """Train the decoder of a finished autoencoder on (or go on with that) and write the model to `folder/vae`.

    Its latents stay as they are, so an editor that knows them needs no more training.
    """
    model.requires_grad_(False)
    for part in (model.post_quant_conv, model.decoder):
        part.requires_grad_(True)

    def encode_fixed(images: Tensor) -> Tensor:
        with torch.no_grad():
            return encode(model, images)

    first = config.seed << 24
    with single_frame(model):
        fit_coder(model, encode_fixed, partial(decode, model), config, folder / "decoder-run", first)
    model.save_pretrained(folder / "vae")
    return model
