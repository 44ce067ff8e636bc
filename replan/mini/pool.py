"""The pool that both mini editors learn from: scenes with a few edits each, encoded once, and wordings for them.

Prompts are of two kinds: full instructions ("make the left cup red"), and what a hint says ("make this red"), which in
training always speaks of everything in the picture. No combination that is held out occurs (see `changes.held_out`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replan.mini.changes import (
    LIGHT,
    UNDER_LIGHT,
    Change,
    apply_changes,
    held_out,
    light_in,
    random_addition,
    random_change,
    spread,
)
from replan.mini.instructions import KEEP_REST, make_item
from replan.mini.scenes import Scene, draw, random_odd_scene, random_scene

logger = logging.getLogger(__name__)

Transform = Callable[[Tensor], Tensor]  # pixels [B, 3, H, W] to unscaled latents [B, C, h, w], or back
Pool = tuple[Tensor, Tensor]  # tokens of the scenes' pictures: sources, targets
CHANNELS = 16
EDITS = 4  # targets per scene
LIGHT_SHARE = 0.15
# Of recolour, replace, remove and state: what is hard to learn occurs more often than in the items of the benchmark.
SHARES = (0.24, 0.44, 0.10, 0.5)


@dataclass(frozen=True, slots=True)
class PoolEdit:
    """A training edit: the scene, what changes, under which light, and whether everything is meant."""

    scene: Scene
    changes: tuple[Change, ...]
    light: str
    everything: bool

    @property
    def target(self) -> Scene:
        return replace(apply_changes(self.scene, self.changes), light=self.light)

    @property
    def unseen(self) -> bool:
        """Whether it holds a combination that training must never meet."""
        told = (change.combination(self.scene) for change in self.changes)
        return any(map(held_out, told)) or (self.light != "day" and held_out(light_in(self.light, self.scene.place)))


def pool_edit(scene_seed: int, edit: int) -> PoolEdit:
    """Edit 0 .. EDITS-1 of a scene, about everything or about one or two things; a pure function."""
    rng = random.Random(scene_seed * EDITS + edit)
    scene = random_scene(random.Random(scene_seed), fewest=1 if scene_seed % 4 == 0 else 3)
    if scene_seed % 8 == 3:
        scene = random_odd_scene(random.Random(scene_seed))
    while True:
        found = _any_edit(rng, scene, everything=edit % 2 == 0)
        if not found.unseen:
            return found


def _any_edit(rng: random.Random, scene: Scene, everything: bool) -> PoolEdit:
    light = rng.choice(sorted(LIGHT)) if rng.random() < LIGHT_SHARE else "day"
    if light != "day" and rng.random() < 0.3:
        return PoolEdit(scene, (), light, everything)
    index = rng.randrange(len(scene.things))
    first = random_addition(rng, scene) if rng.random() < 0.2 else random_change(rng, scene, index, SHARES)
    if everything:
        return PoolEdit(scene, spread(first, scene), light, True)
    others = [i for i in range(len(scene.things)) if i != index]
    if others and rng.random() < 0.15:
        return PoolEdit(scene, (first, random_change(rng, scene, rng.choice(others), SHARES)), light, False)
    return PoolEdit(scene, (first,), light, False)


def pool_prompt(edit: PoolEdit, rng: random.Random) -> str:
    """A wording for an edit of the pool: as a hint says it, or as an instruction."""
    if not edit.changes:
        lit = rng.choice((LIGHT[edit.light][0], *LIGHT[edit.light]))
        return KEEP_THIS + UNDER_LIGHT[edit.light] if edit.everything and rng.random() < 0.3 else lit
    if edit.everything:
        hint = edit.changes[0].hint + UNDER_LIGHT[edit.light]
        return hint.replace("this", "everything") if rng.random() < 0.15 else hint
    return make_item(rng, edit.scene, edit.changes, edit.light).instruction


KEEP_THIS = "keep this unchanged"
KEEP_PROMPTS = (KEEP_REST, KEEP_REST, KEEP_THIS, "keep the image unchanged", "keep everything unchanged")


def all_texts(count: int = 20_000) -> list[str]:
    rng = random.Random(1)
    texts = list(KEEP_PROMPTS) * 50
    return texts + [pool_prompt(pool_edit(rng.randrange(1 << 30), rng.randrange(EDITS)), rng) for _ in range(count)]


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] latents to [B, H/2 * W/2, 4 C] tokens, in Flux's order."""
    count, channels, height, width = latents.shape
    x = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(count, height // 2 * (width // 2), channels * 4)


def _scene_tokens(encode: Transform, seed: int) -> Tensor:
    """A scene's picture and its EDITS targets as float16 tokens [1 + EDITS, 36, 64]."""
    pictures = [draw(pool_edit(seed, 0).scene), *(draw(pool_edit(seed, edit).target) for edit in range(EDITS))]
    images = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pack(encode(images)).half()


def _is_current(kept: dict[str, Tensor], encode: Transform, scenes: int) -> bool:
    """Whether kept tokens are those of this autoencoder, world and number of scenes, by a few of them."""
    if len(kept["sources"]) != scenes:
        return False
    for seed in {0, scenes // 2, scenes - 1}:
        stored = torch.cat([kept["sources"][seed][None], kept["targets"][seed]]).float()
        if not torch.allclose(
            _scene_tokens(encode, seed).float(), stored, atol=0.05
        ):  # rounding of float16 and kernels
            return False
    return True


@torch.no_grad()
def encode_pool(encode: Transform, scenes: int, file: Path) -> Pool:
    """Latents as float16 tokens: sources [scenes, 36, 64], targets [scenes, EDITS, 36, 64], kept in `file`.

    `encode` takes pixels [B, 3, H, W] to latents [B, C, h, w] of unit variance. A file of another autoencoder, another
    version of the scenes or another number of them is made anew.
    """
    if not file.exists() or not _is_current(load_file(file), encode, scenes):
        file.parent.mkdir(parents=True, exist_ok=True)
        sources, targets = [], []
        for seed in range(scenes):
            tokens = _scene_tokens(encode, seed)
            sources.append(tokens[0])
            targets.append(tokens[1:])
            if seed % 2000 == 0:
                logger.info("encoded %d of %d scenes", seed, scenes)
        save_file({"sources": torch.stack(sources), "targets": torch.stack(targets)}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    pool = load_file(file)
    return pool["sources"], pool["targets"]


def pool_batch(pool: Pool, rng: random.Random, count: int) -> tuple[list[int], Tensor, Tensor, list[str]]:
    """Scene seeds, source and target tokens [count, P, C] and prompts; some of them ask to keep everything."""
    sources, targets = pool
    picks = [(rng.randrange(len(sources)), rng.randrange(EDITS), rng.random() < 0.08) for _ in range(count)]
    source = torch.stack([sources[s] for s, _, _ in picks]).float()
    target = torch.stack([sources[s] if keep else targets[s, e] for s, e, keep in picks]).float()
    prompts = [rng.choice(KEEP_PROMPTS) if keep else pool_prompt(pool_edit(s, e), rng) for s, e, keep in picks]
    return [s for s, _, _ in picks], source, target, prompts
