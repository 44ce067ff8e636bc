"""Random tiny models of the very classes of the real editors, saved in the hub's folder format. No download."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

WORDS = ("make", "the", "a", "red", "blue", "green", "cup", "circle", "star", "keep", "image", "unchanged", "it", "to")


def flux_kontext(folder: Path, *, blocks: int = 2, guidance: bool = True) -> Path:
    """A FluxKontextPipeline; one token covers 2 ** blocks pixels each way. Returns the folder."""
    from diffusers import AutoencoderKL, FluxKontextPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(4,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=1, latent_channels=4, norm_num_groups=1,
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
        )  # fmt: skip
        clip_config = CLIPTextConfig(
            bos_token_id=0, eos_token_id=1, pad_token_id=1, vocab_size=len(_clip_vocabulary()), hidden_size=24,
            intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77,
        )  # fmt: skip
        clip = CLIPTextModel(clip_config)
        t5 = T5EncoderModel(
            T5Config(vocab_size=len(_t5_vocabulary()), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    pipe = FluxKontextPipeline(
        scheduler=_scheduler(max_shift=1.15, max_image_seq_len=4096, shift=3.0), vae=vae, text_encoder=clip,
        tokenizer=_clip_tokenizer(), text_encoder_2=t5, tokenizer_2=_t5_tokenizer(), transformer=transformer,
    )  # fmt: skip
    return _save(pipe, folder)


def lora(folder: Path, model: Path, pipeline: type[Any], **parts: Any) -> Path:
    """A random LoRA on the transformer's attention, saved by the pipeline's own method. Returns its folder."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline.from_pretrained(model, **parts)
    names = ["to_q", "to_k"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=names))
        for parameter in pipe.transformer.parameters():
            if parameter.requires_grad:  # peft's random start is far too gentle to be seen in a tiny model
                torch.nn.init.normal_(parameter, std=0.5)
    pipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


def _scheduler(**values: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, base_image_seq_len=256, **values)


def _save(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def _byte_letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _clip_vocabulary() -> dict[str, int]:
    letters = _byte_letters()
    return {t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)])}


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=77)


def _t5_vocabulary() -> list[tuple[str, float]]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [("▁", -3.0)]
    return pieces + [(c, -4.0) for c in map(chr, range(33, 127))]


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast(vocab=_t5_vocabulary(), extra_ids=0, model_max_length=512)


def qwen_image_edit(folder: Path, kind: type[Any], *, zero_cond_t: bool = False) -> Path:
    """A QwenImageEditPipeline or QwenImageEditPlusPipeline (`kind`); one token covers 8 pixels. Returns the folder."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _qwen_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _QWEN_SPECIAL}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6), zero_cond_t=zero_cond_t,
        )  # fmt: skip
        vae = AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.1, 1.3, 0.9],
        )  # fmt: skip
        text = {
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        }  # fmt: skip
        vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]},
                image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
            )
        )  # fmt: skip
    pipe = kind(
        scheduler=_scheduler(max_shift=0.9, max_image_seq_len=8192, shift=1.0, shift_terminal=0.02), vae=vae,
        text_encoder=encoder, tokenizer=tokenizer, processor=None, transformer=transformer,
    )  # fmt: skip
    return _save_qwen(pipe, tokenizer, folder)


_QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def _qwen_tokenizer() -> Any:
    """Byte-level BPE with every word of the real template as one token, so that its prefix has the real 64 tokens."""
    from diffusers import QwenImageEditPipeline
    from tokenizers.models import BPE
    from transformers import AddedToken, Qwen2Tokenizer

    vocabulary = {letter: number for number, letter in enumerate(_byte_letters())}
    merges: list[tuple[str, str]] = []
    pre_tokenizer = Qwen2Tokenizer(vocab=vocabulary).backend_tokenizer.pre_tokenizer
    parts = dict.fromkeys(["scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer"])
    template = QwenImageEditPipeline(**parts).prompt_template_encode
    for part in re.split(r"<\|\w+\|>|{}", template):
        for word, _ in pre_tokenizer.pre_tokenize_str(part):
            while len(found := BPE(vocab=vocabulary, merges=merges).tokenize(word)) > 1:
                merges.append((found[0].value, found[1].value))
                vocabulary.setdefault("".join(merges[-1]), len(vocabulary))
    tokenizer = Qwen2Tokenizer(vocab={**vocabulary, _QWEN_SPECIAL[0]: len(vocabulary)}, merges=merges)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in _QWEN_SPECIAL])
    return tokenizer


def _save_qwen(pipe: Any, tokenizer: Any, folder: Path) -> Path:
    """Save; the processor by its files, because its class cannot be built without torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pipe.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "processor")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    shutil.copy(
        folder / "processor" / "preprocessor_config.json", folder / "processor" / "video_preprocessor_config.json"
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
