"""Trains the mini editor's autoencoder: a stock AutoencoderKL, 8 pixels a latent cell, 16 channels, on drawn scenes."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from replan.mini.pool import Transform
from replan.mini.scenes import LIGHTS, SHAPES, Scene, draw, random_scene
from replan.mini.training import TrainConfig, fit, seeded

logger = logging.getLogger(__name__)

LATENT_NOISE = 0.05  # relative to the latents' spread: the decoder must bear what the editor gets slightly wrong


def build_autoencoder() -> AutoencoderKL:
    shape: dict[str, Any] = {  # the library's own annotations allow one level only
        "block_out_channels": (16, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    model = AutoencoderKL(
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=96,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **shape,
    )
    for name, module in model.named_modules():
        if name.endswith("conv2"):  # every residual block starts as the identity: much faster at the start
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def pixels(seeds: list[int]) -> Tensor:
    """Pictures of random scenes, some of them not by day, as [B, 3, 96, 96] in [-1, 1]."""
    pictures = np.stack([np.asarray(draw(_scene(seed))) for seed in seeds])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _scene(seed: int) -> Scene:
    """A random scene; one in five not by day, and one in four full of what is rare: things in their second state."""
    rng = random.Random(seed)
    scene = random_scene(rng)
    if seed % 4 == 1:
        kinds = [kind for kind, shape in SHAPES.items() if shape.altered]
        things = (replace(thing, kind=rng.choice(kinds), altered=True) for thing in scene.things)
        scene = replace(scene, things=tuple(things))
    return replace(scene, light=sorted(LIGHTS)[seed // 5 % len(LIGHTS)] if seed % 5 == 0 else "day")


def train_autoencoder(folder: Path, config: TrainConfig, start: Path | None = None) -> AutoencoderKL:
    """Train (or go on training) and write the model to `folder/vae`, its latents scaled to unit variance.

    `start` is a finished model's folder to begin from.
    """
    with seeded(config.seed):
        model = AutoencoderKL.from_pretrained(start) if start else build_autoencoder()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def encode(images: Tensor) -> Tensor:
        return model.encode(images, return_dict=False)[0].mode()

    def decode(latents: Tensor) -> Tensor:
        return model.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType]

    fit_coder(model, encode, decode, config, folder / "vae-run")
    with torch.no_grad():
        latents = encode(pixels(list(range(-256, 0))))
    model.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    model.save_pretrained(folder / "vae")
    logger.info("latent spread %.3f", float(latents.std()))
    return model


def refine_decoder(start: Path, folder: Path, config: TrainConfig) -> AutoencoderKL:
    """Train the decoder of a finished autoencoder on (or go on with that) and write the model to `folder/vae`.

    Its latents stay as they are, so an editor that knows them needs no more training.
    """
    model = AutoencoderKL.from_pretrained(start)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model.encoder.requires_grad_(False)

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model.encode(images, return_dict=False)[0].mode()

    def decode(latents: Tensor) -> Tensor:
        return model.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType]

    fit_coder(model, encode, decode, config, folder / "decoder-run", first=config.seed << 24)
    model.save_pretrained(folder / "vae")
    return model


def fit_coder(
    model: nn.Module, encode: Transform, decode: Transform, config: TrainConfig, folder: Path, first: int = 0
) -> None:
    """Train what of `model` requires gradients to give scenes back, from the scenes of step `first` on."""

    def loss_at(step: int) -> Tensor:
        with config.precision():
            return reconstruction_loss(encode, decode, first + step, config.batch, config.device)

    def evaluate(_: nn.Module, step: int) -> None:
        logger.info("step %d  reconstruction %.2f dB", step, reconstruction_psnr(encode, decode, device=config.device))

    fit(model, loss_at, config, folder, evaluate=evaluate, evaluate_every=500)
    logger.info("reconstruction %.2f dB", reconstruction_psnr(encode, decode, device=config.device))


def reconstruction_loss(encode: Transform, decode: Transform, step: int, batch: int, device: str = "cpu") -> Tensor:
    """How far the scenes of one step are from their reconstructions; a pure function of step and model."""
    images = pixels(list(range(step * batch, (step + 1) * batch)))
    images = images.to(device, memory_format=torch.channels_last)
    latents = encode(images).float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step)).to(device)
    output = decode(latents + LATENT_NOISE * latents.detach().std() * noise).float()
    return F.l1_loss(output, images) + 2 * F.mse_loss(output, images) + 1e-5 * latents.square().mean()


@torch.no_grad()
def reconstruction_psnr(encode: Transform, decode: Transform, count: int = 64, device: str = "cpu") -> float:
    """Mean PSNR in dB over `count` scenes that training never sees (negative seeds)."""
    images = pixels(list(range(-count, 0))).to(device)
    error = ((decode(encode(images)).clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())
