"""Trains the mini planner: a small Qwen3-VL that reads a scene and an instruction and answers in the plan grammar.

Several questions about one picture are packed into one sequence, as the turns of one conversation, so that the picture
is encoded once for all of them.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration

from replan.mini.instructions import random_item
from replan.mini.scenes import SIZE, draw, random_odd_scene, random_scene
from replan.mini.training import TrainConfig, fit, seeded
from replan.types import Plan

logger = logging.getLogger(__name__)

PATCH, MERGE, FRAMES = 8, 2, 2
IMAGE_TOKENS = SIZE.width * SIZE.height // (PATCH * MERGE) ** 2
DECISION = " Look for"  # from here to the end of the reasoning the planner decides who is meant
DECISION_WEIGHT = 5.0  # few tokens, and everything hangs on them
TURNS = 2  # instructions per picture; more would mostly be answered from the turns before
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PIECES = (
    "<think>",
    "</think>",
    "<gen_image>",
    "</gen_image>",
    "<region>",
    "</region>",
    '{"bbox_2d": [',
    '], "hint": "',
    '"}',
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def answer(plan: Plan) -> str:
    """The plan as the planner says it."""
    regions = [{"bbox_2d": list(r.box.as_tuple()), "hint": r.hint} for r in plan.regions]
    return f"<think>{plan.reasoning}</think><gen_image>{plan.prompt}</gen_image><region>{json.dumps(regions)}</region>"


def train_tokenizer(vocabulary: int = 768) -> Tokenizer:
    """A byte-level BPE: every word and number of the mini world is one token, and any other text still encodes."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        rng = random.Random(0)
        for _ in range(20_000):
            item = random_item(rng)
            yield item.instruction
            yield answer(item.plan)

    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in PIECES])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in PIECES])
    return tokenizer


def _token(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    if found is None:
        raise ValueError(f"the tokenizer has no {piece}; delete the run's tokenizer.json")
    return found


def build_planner(tokenizer: Tokenizer) -> PreTrainedModel:
    from transformers import Qwen3VLConfig

    ids = {name: _token(tokenizer, name) for name in SPECIALS}
    text = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 32) * 32,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 48,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [12, 6, 6],
            "mrope_interleaved": True,
        },
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 192,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "num_position_embeddings": (SIZE.width // PATCH) * (SIZE.height // PATCH),
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)


def patches(pictures: np.ndarray, patch: int = PATCH) -> Tensor:
    """[B, H, W, 3] uint8 to the image processor's [B * patches, 3 * frames * patch * patch], scaled to [-1, 1]."""
    count, height, width, _ = pictures.shape
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    rows, columns = height // (patch * MERGE), width // (patch * MERGE)
    x = x.reshape(count, 3, rows, MERGE, patch, columns, MERGE, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.reshape(-1, 3, 1, patch, patch).expand(-1, 3, FRAMES, patch, patch)
    return x.reshape(-1, 3 * FRAMES * patch * patch)


class Conversations:
    """Makes packed training sequences: one picture, `TURNS` instructions, answers as labels."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self._image, self._pad = _token(tokenizer, "<|image_pad|>"), _token(tokenizer, "<|endoftext|>")
        self._head = self._encode("<|im_start|>user\n<|vision_start|>")
        self._head += [self._image] * IMAGE_TOKENS + self._encode("<|vision_end|>")

    def pack(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int], list[float]]:
        """Token ids, labels (-100: nothing is learnt) and weights of a conversation of (question, answer) turns."""
        ids, labels, weights = list[int](), list[int](), list[float]()
        for turn, (asked, answered) in enumerate(turns):
            head = self._head if turn == 0 else self._encode("\n<|im_start|>user\n")
            question = [*head, *self._encode(asked + "<|im_end|>\n<|im_start|>assistant\n")]
            ids += question
            labels += [-100] * len(question)
            weights += [0.0] * len(question)
            seen, look, rest = answered.partition(DECISION)
            decision, end, plan = (look + rest).partition("</think>")
            for text, weight in ((seen, 1.0), (decision, DECISION_WEIGHT), (end + plan + "<|im_end|>", 1.0)):
                part = self._encode(text)
                ids += part
                labels += part
                weights += [weight] * len(part)
        return ids, labels, weights

    def batch(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Model inputs, labels and weights for one conversation per seed, padded on the right."""
        pictures, packed = [], []
        for seed in seeds:
            rng = random.Random(seed)
            scene = random_odd_scene(rng) if rng.random() < 0.15 else random_scene(rng)
            pictures.append(np.asarray(draw(scene)))
            items = [random_item(rng, scene) for _ in range(TURNS)]
            packed.append(self.pack([(item.instruction, answer(item.plan)) for item in items]))
        length = max(len(ids) for ids, _, _ in packed)

        def padded(rows: Iterable[Sequence[float]], fill: float) -> Tensor:
            return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])

        ids = padded((ids for ids, _, _ in packed), self._pad)
        grid = [1, SIZE.height // PATCH, SIZE.width // PATCH]
        return {
            "input_ids": ids,
            "labels": padded((labels for _, labels, _ in packed), -100),
            "weights": padded((weights for _, _, weights in packed), 0.0),
            "pixel_values": patches(np.stack(pictures)),
            "image_grid_thw": torch.tensor([grid] * len(packed)),
            "mm_token_type_ids": (ids == self._image).int(),
        }


def planner_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Weighted cross-entropy of the answers' tokens; scores are computed for these only."""
    labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "weights")}
    states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    learnt = labels != -100
    each = F.cross_entropy(model.lm_head(states[learnt]).float(), labels[learnt], reduction="none")
    return (each * weights[learnt]).sum() / weights.sum()


def save_planner(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder in the hub's format, as a published Qwen3-VL has it (weights in float16)."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS[1:]),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    model.half().save_pretrained(folder)
    model.float()
    fast.save_pretrained(folder)
    pixels = SIZE.width * SIZE.height
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (folder / "replan_prompt.txt").write_text("{instruction}")


def train_planner(folder: Path, config: TrainConfig, start: Path | None = None) -> PreTrainedModel:
    """Train (or go on training) and write the finished model to `folder/planner`.

    `start` is the folder of a finished planner to begin with; with another seed it meets other scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "tokenizer.json"
    if not vocabulary.exists():
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json")) if start else train_tokenizer()
        tokenizer.save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    with seeded(config.seed):
        model = Qwen3VLForConditionalGeneration.from_pretrained(start).float() if start else build_planner(tokenizer)
    conversations = Conversations(tokenizer)

    def loss_at(step: int) -> Tensor:
        first = (config.seed << 32) + step * config.batch
        batch = conversations.batch(range(first, first + config.batch))
        with config.precision():
            return planner_loss(model, {name: value.to(config.device) for name, value in batch.items()})

    def evaluate(_: nn.Module, step: int) -> None:
        save_planner(model, tokenizer, folder / "planner")
        loss = _unseen_loss(model, conversations, config.device)
        logger.info("step %d  saved; loss on unseen scenes %.4f", step, loss)

    fit(model, loss_at, config, folder / "planner-run", evaluate=evaluate, evaluate_every=500)
    save_planner(model, tokenizer, folder / "planner")
    return model


@torch.no_grad()
def _unseen_loss(model: nn.Module, conversations: Conversations, device: str) -> float:
    batch = conversations.batch(range(-16, 0))
    return float(planner_loss(model, {name: value.to(device) for name, value in batch.items()}))
