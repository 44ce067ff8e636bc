"""Trains the mini editor: the stock Flux Kontext classes, small, as an ordinary instruction editor.

No region mask is used here, as none was used for the real editors: what regions do at run time stays training-free.
Prompts are of two kinds: full instructions ("make the left cup red"), and what a hint says ("make this red"), which in
training always speaks of everything in the picture.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from replan.mini.instructions import KEEP_REST, Change, apply_changes, make_item, random_change
from replan.mini.scenes import SIZE, Scene, draw, random_scene
from replan.mini.train_autoencoder import Transform, train_autoencoder
from replan.mini.training import TrainConfig, fit

logger = logging.getLogger(__name__)

Tokenizers = tuple[CLIPTokenizer, T5Tokenizer]
Pool = tuple[Tensor, Tensor]  # tokens of the scenes' pictures: sources, targets
CHANNELS = 16
GRID = SIZE.width // 16
EDITS = 4  # targets per scene in the pool of encoded pictures
TEXT_LENGTHS = (12, 16, 20, 24)
CLIP_LENGTH = 32
# Share of samples whose pooled vector says nothing, so that the text tokens carry the instruction.
EMPTY_POOLED = 0.5
CHANGED_WEIGHT = 4.0


def pool_edit(scene_seed: int, edit: int) -> tuple[Scene, tuple[Change, ...], bool]:
    """Scene, changes and whether everything is meant, for edit 0 .. EDITS-1 of a scene; a pure function."""
    rng = random.Random(scene_seed * EDITS + edit)
    scene = random_scene(random.Random(scene_seed), fewest=1 if scene_seed % 4 == 0 else 3)
    first = random_change(rng, scene, rng.randrange(len(scene.things)))
    if edit % 2 == 0:
        return scene, tuple(replace(first, index=i) for i in range(len(scene.things))), True
    others = [i for i in range(len(scene.things)) if i != first.index]
    if others and rng.random() < 0.15:
        return scene, (first, random_change(rng, scene, rng.choice(others))), False
    return scene, (first,), False


def pool_prompt(scene_seed: int, edit: int, rng: random.Random) -> str:
    """A wording for an edit of the pool."""
    scene, changes, everything = pool_edit(scene_seed, edit)
    if everything:
        hint = changes[0].hint
        return hint.replace("this", "everything") if rng.random() < 0.15 else hint
    return make_item(rng, scene, changes).instruction


KEEP_PROMPTS = (KEEP_REST, KEEP_REST, "keep this unchanged", "keep the image unchanged", "keep everything unchanged")


def all_texts(count: int = 20_000) -> list[str]:
    rng = random.Random(1)
    texts = list(KEEP_PROMPTS) * 50
    return texts + [pool_prompt(rng.randrange(1 << 30), rng.randrange(EDITS), rng) for _ in range(count)]


def build_clip_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """A CLIPTokenizer whose merges make every word of `texts` one token; other words fall to letters."""
    shell = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = shell._tokenizer.normalizer, shell._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]  # the annotation knows only the older form, "a b"
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=CLIP_LENGTH)


def build_t5_tokenizer(texts: list[str]) -> T5Tokenizer:
    """A T5Tokenizer with one piece per word of `texts`, and single letters for everything else."""
    words = {word.rstrip(".,") for text in texts for word in text.split()}
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -3.0) for word in sorted(words)]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[])


class Editor(nn.Module):
    """The trained parts of the pipeline under one roof."""

    def __init__(self, clip_vocabulary: int, t5_vocabulary: int) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip_vocabulary,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=CLIP_LENGTH,
                projection_dim=64,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=t5_vocabulary,
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=32,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=4,
            attention_head_dim=48,
            num_attention_heads=4,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            guidance_embeds=False,
            axes_dims_rope=(8, 20, 20),
        )
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and ((name.endswith("proj_out") and "." not in name) or "norm" in name):
                nn.init.zeros_(module.weight)  # adaLN-zero: every block starts as the identity
                nn.init.zeros_(module.bias)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] latents to [B, H/2 * W/2, 4 C] tokens, in Flux's order."""
    count, channels, height, width = latents.shape
    x = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(count, height // 2 * (width // 2), channels * 4)


def image_ids(frame: int) -> Tensor:
    """(frame, row, column) of every image token."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([torch.full_like(rows, frame), rows, columns], -1).reshape(-1, 3).float()


@torch.no_grad()
def encode_pool(encode: Transform, scenes: int, file: Path) -> Pool:
    """Latents as float16 tokens: sources [scenes, 36, 64], targets [scenes, EDITS, 36, 64], kept in `file`.

    `encode` takes pixels [B, 3, H, W] to latents [B, C, h, w] of unit variance.
    """
    if not file.exists():
        sources, targets = [], []
        for seed in range(scenes):
            pictures = [draw(pool_edit(seed, 0)[0])]
            for edit in range(EDITS):
                scene, changes, _ = pool_edit(seed, edit)
                pictures.append(draw(apply_changes(scene, changes)))
            images = (
                torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
            )
            tokens = pack(encode(images)).half()
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
    prompts = [rng.choice(KEEP_PROMPTS) if keep else pool_prompt(s, e, rng) for s, e, keep in picks]
    return [s for s, _, _ in picks], source, target, prompts


def flow_loss(predict: Callable[[Tensor, Tensor], Tensor], source: Tensor, target: Tensor, step: int) -> Tensor:
    """Flow matching, v = noise - target, at random noise levels; tokens that change weigh more.

    `predict` gives v [B, P, C] of noisy tokens [B, P, C] and noise levels [B].
    """
    torch_rng = torch.Generator().manual_seed(step)
    noise = torch.randn(target.shape, generator=torch_rng)
    sigma = torch.sigmoid(0.8 + 1.3 * torch.randn(len(target), generator=torch_rng))
    velocity = predict(torch.lerp(target, noise, sigma[:, None, None]), sigma)
    error = (velocity.float() - (noise - target)).square().mean(-1)
    changed = (target - source).square().mean(-1) > 0.02
    weight = 1 + CHANGED_WEIGHT * changed.float()
    return (weight * error).sum() / weight.sum()


class EditorLoss:
    """Flow matching on (source, prompt, target) triples; a pure function of the step."""

    def __init__(self, editor: Editor, tokenizers: Tokenizers, pool: Pool, batch: int) -> None:
        self._editor, (self._clip, self._t5), self._pool = editor, tokenizers, pool
        self._batch = batch
        self._image_ids = torch.cat([image_ids(0), image_ids(1)])

    def __call__(self, step: int) -> Tensor:
        rng = random.Random(step)
        _, source, target, prompts = pool_batch(self._pool, rng, self._batch)
        pooled_prompts = ["" if rng.random() < EMPTY_POOLED else prompt for prompt in prompts]
        text, pooled = self._encode(prompts, pooled_prompts, rng)

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            return self._editor.transformer(
                hidden_states=torch.cat([x, source], 1),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=sigma,
                img_ids=self._image_ids,
                txt_ids=torch.zeros(text.shape[1], 3),
                return_dict=False,
            )[0][:, : x.shape[1]]

        return flow_loss(predict, source, target, step)

    def _encode(self, prompts: list[str], pooled_prompts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
        longest = max(len(ids) for ids in self._t5(prompts).input_ids)
        length = rng.choice([n for n in TEXT_LENGTHS if n >= min(longest, TEXT_LENGTHS[-1])])
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        text = self._editor.text_encoder_2(self._t5(prompts, max_length=length, **options).input_ids)[0]
        ids = self._clip(pooled_prompts, max_length=CLIP_LENGTH, **options).input_ids
        return text, self._editor.text_encoder(ids).pooler_output


def save_editor(editor: Editor, vae: AutoencoderKL, tokenizers: Tokenizers, folder: Path) -> None:
    """Write a FluxKontextPipeline folder in the hub's format (weights in float16)."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxKontextPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=editor.text_encoder,
        tokenizer=tokenizers[0],
        text_encoder_2=editor.text_encoder_2,
        tokenizer_2=tokenizers[1],
        transformer=editor.transformer,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    (folder / "replan.yaml").write_text("config: edit/mini\n")  # so that `-b folder` edits with the mini's settings
    pipeline.to(torch.float32)


def train_editor(folder: Path, config: TrainConfig, vae_minutes: float = 15, scenes: int = 8_000) -> Editor:
    """Train (or go on training) autoencoder and editor and write the pipeline to `folder/editor`."""
    if not (folder / "vae").exists():
        train_autoencoder(folder, TrainConfig(vae_minutes, batch=8, lr=2e-3, ema=0.995, save_every=300))
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    scale, shift = vae.config["scaling_factor"], vae.config["shift_factor"]

    def encode(images: Tensor) -> Tensor:
        return (vae.encode(images, return_dict=False)[0].mode() - shift) * scale

    pool = encode_pool(encode, scenes, folder / "latents.safetensors")
    texts = all_texts()
    tokenizers = build_clip_tokenizer(texts), build_t5_tokenizer(texts)
    torch.manual_seed(config.seed)
    editor = Editor(len(tokenizers[0]), len(tokenizers[1]))
    logger.info("editor: %.2f M parameters", sum(p.numel() for p in editor.parameters()) / 1e6)

    def evaluate(model: nn.Module, step: int) -> None:
        save_editor(editor, vae, tokenizers, folder / "editor")
        logger.info("step %d  saved", step)

    loss = EditorLoss(editor, tokenizers, pool, config.batch)
    fit(editor, loss, config, folder / "editor-run", evaluate=evaluate, evaluate_every=1000)
    save_editor(editor, vae, tokenizers, folder / "editor")
    return editor


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=85)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_editor(arguments.folder, TrainConfig(arguments.minutes, batch=32, lr=1.5e-3, muon_lr=1.5e-3, save_every=500))
