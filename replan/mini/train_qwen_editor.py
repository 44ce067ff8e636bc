"""Trains the second mini editor: the stock Qwen-Image-Edit classes, small, as an ordinary instruction editor.

As in `train_editor` no region mask is used, and the prompts are the same. What is different is the family: the prompt
is read by a Qwen2.5-VL that sees the picture, inside the pipeline's own template; there is no pooled vector; some
prompts are left out, for guidance against an empty one. The text encoder is trained along with the transformer.
"""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AddedToken, DynamicCache, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from replan.mini.pool import Pool, all_texts, encode_pool, pool_batch, pool_edit
from replan.mini.scenes import SIZE, draw
from replan.mini.train_editor import GRID, flow_loss
from replan.mini.train_planner import FRAMES, MERGE, SPECIALS, patches
from replan.mini.train_qwen_autoencoder import CHANNELS, encode, refine_decoder, single_frame, train_autoencoder
from replan.mini.training import TrainConfig, fit, seeded

logger = logging.getLogger(__name__)

PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
PATCH = 16  # with 2 x 2 patches merged, one token of the text encoder sees one cell of the scenes' grid
SEEN = SIZE.width // (PATCH * MERGE) * (SIZE.height // (PATCH * MERGE))
TEXT_WIDTH = 128
NO_PROMPT = " "  # what guidance pushes away from; configs/edit/mini_qwen.yaml says the same
NO_PROMPT_SHARE = 0.1
LENGTH_STEP = 16  # prompts are padded to a multiple, so that few lengths get compiled
PIXELS = {"shortest_edge": SIZE.width * SIZE.height, "longest_edge": SIZE.width * SIZE.height}
PROCESSOR = {
    "processor_class": "Qwen2VLProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "size": PIXELS,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}


def template() -> tuple[str, int]:
    """The stock pipeline's prompt template, and how many of its first tokens the pipeline drops."""
    nothing: dict[str, Any] = dict.fromkeys(PARTS)
    pipeline = QwenImageEditPipeline(**nothing)
    return pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx


def build_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """A Qwen2Tokenizer for which every word of `texts` and of the template is one token; other text falls to letters.

    The template's head then has as many tokens as with the real vocabulary, which the pipeline counts on.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    shell = Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}).backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = shell.normalizer, shell.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=letters, show_progress=False)
    words = [part for part in re.split(r"<\|\w+\|>|{}", template()[0]) if part]
    tokenizer.train_from_iterator([*texts, *words], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]  # the annotation knows only the older form, "a b"
    vocabulary = {**model["vocab"], SPECIALS[0]: len(model["vocab"])}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    made.add_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return made


def _token(tokenizer: Qwen2Tokenizer, name: str) -> int:
    found: Any = tokenizer.convert_tokens_to_ids(name)
    return found


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    from transformers import Qwen2_5_VLConfig

    ids = {name: _token(tokenizer, name) for name in SPECIALS}
    text = {
        "vocab_size": -(-len(tokenizer) // 32) * 32,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": TEXT_WIDTH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "window_size": SIZE.width,  # one window: the whole picture
        "fullatt_block_indexes": [0, 1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


class Editor(nn.Module):
    """The jointly trained parts of the pipeline under one roof."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=48,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 20, 20),
        )
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and ("_mod." in name or name in ("norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)  # adaLN-zero: every block starts as the identity
                nn.init.zeros_(module.bias)


class PromptReader:
    """What the stock pipeline's `encode_prompt` gives, for a batch of prompts and pictures of the mini world.

    Causal attention lets the template's head, equal for all prompts and dropped afterwards, be run once a batch.
    """

    def __init__(self, encoder: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> None:
        text, drop = template()
        before, self._tail = text.split("{}")
        ids = tokenizer(before).input_ids
        start = _token(tokenizer, "<|vision_start|>")
        if ids.index(start) != drop:
            raise ValueError(f"the template's head has {ids.index(start)} tokens, the pipeline drops {drop}")
        self._encoder, self._tokenizer, self._drop = encoder, tokenizer, drop
        self._image = _token(tokenizer, "<|image_pad|>")
        self._head = torch.tensor(ids[:drop])
        self._opening = [token for part in ids[drop:] for token in [part] * (SEEN if part == self._image else 1)]
        self._grid = torch.tensor([[1, SIZE.height // PATCH, SIZE.width // PATCH]])

    def __call__(self, prompts: list[str], pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """Text states [B, L, D] and which of them are no padding [B, L]; `pictures` are uint8, [B, H, W, 3]."""
        device = self._encoder.device
        ids, real = (found.to(device) for found in self._tokens(prompts))
        model, embed = self._encoder.model, self._encoder.get_input_embeddings()
        grid = self._grid.expand(len(prompts), -1).to(device)
        seen = model.visual(patches(pictures, PATCH).to(device), grid_thw=grid).pooler_output
        tokens = embed(ids).masked_scatter(ids.eq(self._image)[..., None], seen)
        # positions are left to the model, as the stock pipeline does: without token types it counts them through
        cache = DynamicCache(config=model.language_model.config)
        model.language_model(inputs_embeds=embed(self._head.to(device))[None], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        return model.language_model(inputs_embeds=tokens, past_key_values=cache).last_hidden_state, real

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] after the head, padded at the end, and which of them are real."""
        rows = [self._opening + ids for ids in self._tokenizer([prompt + self._tail for prompt in prompts]).input_ids]
        longest = -(-max(map(len, rows)) // LENGTH_STEP) * LENGTH_STEP
        ids = torch.tensor([row + [self._tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(longest) < lengths[:, None]


class EditorLoss:
    """Flow matching on (source, prompt, target) triples; a pure function of the step."""

    def __init__(self, editor: Editor, tokenizer: Qwen2Tokenizer, pool: Pool, config: TrainConfig) -> None:
        self._editor, self._pool, self._config = editor, pool, config
        self._read = PromptReader(editor.text_encoder, tokenizer)

    def __call__(self, step: int) -> Tensor:
        rng = random.Random((self._config.seed << 32) + step)
        scenes, source, target, prompts = pool_batch(self._pool, rng, self._config.batch)
        source, target = source.to(self._config.device), target.to(self._config.device)
        prompts = [NO_PROMPT if rng.random() < NO_PROMPT_SHARE else prompt for prompt in prompts]
        pictures = np.stack([np.asarray(draw(pool_edit(seed, 0).scene)) for seed in scenes])
        text, real = self._read(prompts, pictures)

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            with self._config.precision():
                return self._editor.transformer(
                    hidden_states=torch.cat([x, source], 1),
                    encoder_hidden_states=text,
                    encoder_hidden_states_mask=real,
                    timestep=sigma,
                    img_shapes=[[(1, GRID, GRID)] * 2] * len(x),
                    return_dict=False,
                )[0][:, : x.shape[1]]

        return flow_loss(predict, source, target, step, self._config.device)


def save_editor(editor: Editor, vae: AutoencoderKLQwenImage, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write a QwenImageEditPipeline folder in the hub's format (weights in float16)."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    no_processor: Any = None
    pipeline = QwenImageEditPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=editor.text_encoder,
        tokenizer=tokenizer,
        processor=no_processor,
        transformer=editor.transformer,
    )
    device = editor.transformer.device
    pipeline.to("cpu", torch.float16).save_pretrained(folder)
    pipeline.to(device, torch.float32)
    _save_processor(tokenizer, folder)
    (folder / "replan.yaml").write_text("config: edit/mini_qwen\n")  # so that `-b folder` edits with these settings


def _save_processor(tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """The processor by its files: its class cannot be built without torchvision, because of its half for videos."""
    processor = folder / "processor"
    tokenizer.save_pretrained(processor)
    for file, kind in (("preprocessor", "image"), ("video_preprocessor", "video")):
        names = {"image": "Qwen2VLImageProcessor", "video": "Qwen2VLVideoProcessor"}
        values = {f"{kind}_processor_type": names[kind], **PROCESSOR}
        (processor / f"{file}_config.json").write_text(json.dumps(values, indent=2) + "\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _run_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """The run's own, so that a run that goes on speaks as it began."""
    if not folder.exists():
        build_tokenizer(all_texts()).save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def train_editor(
    folder: Path,
    config: TrainConfig,
    vae_minutes: float = 20,
    scenes: int = 16_000,
    vae: Path | None = None,
    start: Path | None = None,
    decoder_minutes: float = 0,
) -> Editor:
    """Train (or go on training) autoencoder and editor and write the pipeline to `folder/editor`.

    `vae` is the folder of a finished autoencoder, from which its training begins; `start` that of a finished editor,
    whose latents stay as they are. `decoder_minutes` more go to the decoder alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    coder = _autoencoder(folder, config, vae_minutes, vae, start)
    if decoder_minutes:
        refining = TrainConfig(decoder_minutes, batch=8, lr=1.5e-3, ema=0.995, save_every=200, seed=config.seed + 1)
        coder = refine_decoder(coder, folder, replace(refining, device=config.device, bf16=config.bf16))
    mean, std = (torch.tensor(coder.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    with single_frame(coder):
        pool = encode_pool(lambda images: (encode(coder, images) - mean) / std, scenes, folder / "latents.safetensors")
    tokenizer = Qwen2Tokenizer.from_pretrained(start / "tokenizer") if start else _run_tokenizer(folder / "tokenizer")
    with seeded(config.seed):
        editor = Editor(tokenizer)
    if start:
        _load(editor, start)
    logger.info("editor: %.2f M parameters", sum(p.numel() for p in editor.parameters()) / 1e6)
    save = partial(save_editor, editor, coder, tokenizer, folder / "editor")

    def evaluate(_: nn.Module, step: int) -> None:
        save()
        logger.info("step %d  saved", step)

    if config.compiled:
        editor.transformer.compile(dynamic=False)
    loss = EditorLoss(editor, tokenizer, pool, config)
    fit(editor, loss, config, folder / "editor-run", evaluate=evaluate, evaluate_every=1000)
    save()
    return editor


def _autoencoder(
    folder: Path, config: TrainConfig, minutes: float, vae: Path | None, start: Path | None
) -> AutoencoderKLQwenImage:
    """The run's autoencoder, trained if need be."""
    if start:
        return AutoencoderKLQwenImage.from_pretrained(start / "vae").eval()
    coding = TrainConfig(minutes, batch=8, lr=1e-3 if vae else 2e-3, ema=0.995, save_every=300)
    return train_autoencoder(folder, replace(coding, device=config.device, bf16=config.bf16), vae)


def _load(editor: Editor, start: Path) -> None:
    """The weights of a finished editor."""
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(start / "text_encoder")
    transformer = QwenImageTransformer2DModel.from_pretrained(start / "transformer")
    editor.text_encoder.load_state_dict(encoder.state_dict())
    editor.transformer.load_state_dict(transformer.state_dict())
