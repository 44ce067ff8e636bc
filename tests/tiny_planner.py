"""Random tiny models of the planners' real classes, saved in the hub's folder format. No download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROLS = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end")]
CONTROLS += [f"<|{name}|>" for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """Single bytes and Qwen's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS])
    ends: Any = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **ends)
    made.chat_template = CHAT
    return made


def planner(folder: Path, family: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """A random planner of `family` (qwen2_5_vl or qwen3_vl), laid out like a published one. Returns the folder."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(family, words)
    model.generation_config.update(
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, do_sample=True, temperature=1e-6
    )
    patch = model.config.vision_config.patch_size
    pixels = {"min_pixels": (2 * patch) ** 2, "max_pixels": (2 * patch) ** 2 * 64, "patch_size": patch}
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(**pixels).save_pretrained(folder)
    (folder / "replan_prompt.txt").write_text("Plan: {instruction}\n")
    return folder


def _model(family: str, words: Any) -> Any:
    token = words.convert_tokens_to_ids
    ids = {f"{part}_token_id": token(f"<|{part}_pad|>") for part in ("image", "video")}
    ids |= {f"vision_{end}_token_id": token(f"<|vision_{end}|>") for end in ("start", "end")}
    text: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "initializer_range": 0.3, "bos_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope}, vision_config=vision, tie_word_embeddings=True, **ids
        )
        return Qwen2_5_VLForConditionalGeneration(config).float()
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text |= {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen3VLForConditionalGeneration(config).float()


def teach(folder: Path, answer: str, prompt: str, image: Any) -> None:
    """Make a saved planner give `answer`, whatever it is asked: overfit on one example, with loss on the answer."""
    from replan.planner import PlannerConfig
    from replan.planner.local import load_local
    from replan.types import EditRequest

    teacher = load_local(str(folder), PlannerConfig(), "cpu", "float32")
    view = teacher.view(EditRequest(image, prompt))
    processor, model = teacher.processor, teacher.model
    inputs = processor(text=[view.text + answer + "<|im_end|>"], images=[[view.image]], return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, : -len(processor.tokenizer(answer + "<|im_end|>")["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(300):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            break
    else:
        raise AssertionError(f"not learnt: loss {loss.item():.4f}")
    model.eval().save_pretrained(folder)
