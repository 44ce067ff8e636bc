"""Trains the mini editor: the stock Flux Kontext classes, small, as an ordinary instruction editor.

No region mask is used here, as none was used for the real editors: what regions do at run time stays training-free.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from replan.mini.pool import CHANNELS, Pool, all_texts, encode_pool, pool_batch
from replan.mini.scenes import SIZE
from replan.mini.train_autoencoder import refine_decoder, train_autoencoder
from replan.mini.training import TrainConfig, fit, seeded

logger = logging.getLogger(__name__)

Tokenizers = tuple[CLIPTokenizer, T5Tokenizer]
GRID = SIZE.width // 16
TEXT_LENGTHS = (12, 16, 24, 32)
CLIP_LENGTH = 32
# Share of samples whose pooled vector says nothing, so that the text tokens carry the instruction.
EMPTY_POOLED = 0.5
CHANGED_WEIGHT = 4.0


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


def image_ids(frame: int) -> Tensor:
    """(frame, row, column) of every image token."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([torch.full_like(rows, frame), rows, columns], -1).reshape(-1, 3).float()


def flow_loss(
    predict: Callable[[Tensor, Tensor], Tensor], source: Tensor, target: Tensor, step: int, device: str = "cpu"
) -> Tensor:
    """Flow matching, v = noise - target, at random noise levels; tokens that change weigh more.

    `predict` gives v [B, P, C] of noisy tokens [B, P, C] and noise levels [B].
    """
    torch_rng = torch.Generator().manual_seed(step)
    noise = torch.randn(target.shape, generator=torch_rng).to(device)
    sigma = torch.sigmoid(0.8 + 1.3 * torch.randn(len(target), generator=torch_rng)).to(device)
    velocity = predict(torch.lerp(target, noise, sigma[:, None, None]), sigma)
    error = (velocity.float() - (noise - target)).square().mean(-1)
    changed = (target - source).square().mean(-1) > 0.02
    weight = 1 + CHANGED_WEIGHT * changed.float()
    return (weight * error).sum() / weight.sum()


class EditorLoss:
    """Flow matching on (source, prompt, target) triples; a pure function of the step."""

    def __init__(self, editor: Editor, tokenizers: Tokenizers, pool: Pool, config: TrainConfig) -> None:
        self._editor, (self._clip, self._t5), self._pool = editor, tokenizers, pool
        self._config = config
        self._image_ids = torch.cat([image_ids(0), image_ids(1)]).to(config.device)

    def __call__(self, step: int) -> Tensor:
        rng = random.Random((self._config.seed << 32) + step)
        _, source, target, prompts = pool_batch(self._pool, rng, self._config.batch)
        source, target = source.to(self._config.device), target.to(self._config.device)
        pooled_prompts = ["" if rng.random() < EMPTY_POOLED else prompt for prompt in prompts]
        text, pooled = self._encode(prompts, pooled_prompts, rng)

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            with self._config.precision():
                return self._editor.transformer(
                    hidden_states=torch.cat([x, source], 1),
                    encoder_hidden_states=text,
                    pooled_projections=pooled,
                    timestep=sigma,
                    img_ids=self._image_ids,
                    txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
                    return_dict=False,
                )[0][:, : x.shape[1]]

        return flow_loss(predict, source, target, step, self._config.device)

    def _encode(self, prompts: list[str], pooled_prompts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
        longest = max(len(ids) for ids in self._t5(prompts).input_ids)
        length = rng.choice([n for n in TEXT_LENGTHS if n >= min(longest, TEXT_LENGTHS[-1])])
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        device = self._config.device
        text = self._editor.text_encoder_2(self._t5(prompts, max_length=length, **options).input_ids.to(device))[0]
        ids = self._clip(pooled_prompts, max_length=CLIP_LENGTH, **options).input_ids.to(device)
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
    device = editor.transformer.device
    pipeline.to("cpu", torch.float16).save_pretrained(folder)
    (folder / "replan.yaml").write_text("config: edit/mini\n")  # so that `-b folder` edits with the mini's settings
    pipeline.to(device, torch.float32)


def train_editor(
    folder: Path,
    config: TrainConfig,
    vae_minutes: float = 15,
    scenes: int = 16_000,
    vae: Path | None = None,
    start: Path | None = None,
    decoder_minutes: float = 0,
) -> Editor:
    """Train (or go on training) autoencoder and editor and write the pipeline to `folder/editor`.

    `vae` is the folder of a finished autoencoder, from which its training begins; `start` that of a finished editor,
    whose latents stay as they are. `decoder_minutes` more go to the decoder alone.
    """
    found = _autoencoder(folder, config, vae_minutes, vae, start)
    if decoder_minutes:
        refining = TrainConfig(decoder_minutes, batch=8, lr=1.5e-3, ema=0.995, save_every=200, seed=config.seed + 1)
        refine_decoder(found, folder, replace(refining, device=config.device, bf16=config.bf16))
        found = folder / "vae"
    coder = AutoencoderKL.from_pretrained(found).eval()
    coder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    scale, shift = coder.config["scaling_factor"], coder.config["shift_factor"]

    def encode(images: Tensor) -> Tensor:
        return (coder.encode(images, return_dict=False)[0].mode() - shift) * scale

    pool = encode_pool(encode, scenes, folder / "latents.safetensors")
    with seeded(config.seed):
        editor, tokenizers = _load(start) if start else _build()
    logger.info("editor: %.2f M parameters", sum(p.numel() for p in editor.parameters()) / 1e6)

    def evaluate(model: nn.Module, step: int) -> None:
        save_editor(editor, coder, tokenizers, folder / "editor")
        logger.info("step %d  saved", step)

    if config.compiled:
        editor.transformer.compile(dynamic=False)
    loss = EditorLoss(editor, tokenizers, pool, config)
    fit(editor, loss, config, folder / "editor-run", evaluate=evaluate, evaluate_every=1000)
    save_editor(editor, coder, tokenizers, folder / "editor")
    return editor


def _autoencoder(folder: Path, config: TrainConfig, minutes: float, vae: Path | None, start: Path | None) -> Path:
    """The folder of the run's autoencoder, trained if need be."""
    if start:
        return start / "vae"
    if not (folder / "vae").exists():
        coding = TrainConfig(minutes, batch=8, lr=1e-3 if vae else 2e-3, ema=0.995, save_every=300)
        train_autoencoder(folder, replace(coding, device=config.device, bf16=config.bf16), vae)
    return folder / "vae"


def _build() -> tuple[Editor, Tokenizers]:
    texts = all_texts()
    tokenizers = build_clip_tokenizer(texts), build_t5_tokenizer(texts)
    return Editor(len(tokenizers[0]), len(tokenizers[1])), tokenizers


def _load(start: Path) -> tuple[Editor, Tokenizers]:
    """The trained parts of a finished editor."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(start)
    tokenizers: Tokenizers = pipeline.tokenizer, pipeline.tokenizer_2
    editor = Editor(len(tokenizers[0]), len(tokenizers[1]))
    for part in ("text_encoder", "text_encoder_2", "transformer"):
        getattr(editor, part).load_state_dict(getattr(pipeline, part).state_dict())
    return editor, tokenizers
