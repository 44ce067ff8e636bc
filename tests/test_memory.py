"""The memory table: its numbers are those of the published shapes, and its advice keeps its word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from replan.bench.sizes import KONTEXT, QWEN_2511, Shape
from replan.memory import BYTES, CARDS, FLUX, GIB, QWEN, SETTINGS, USABLE, Footprint, Setting, advise, peak, table


@pytest.mark.parametrize(("shape", "editor"), [(KONTEXT, FLUX), (QWEN_2511, QWEN)], ids=["flux", "qwen"])
def test_transformers_have_as_many_parameters_as_we_say(shape: Shape, editor: Footprint) -> None:
    import diffusers

    kind: Any = getattr(
        diffusers, {"flux": "FluxTransformer2DModel", "qwen": "QwenImageTransformer2DModel"}[shape.family]
    )
    with torch.device("meta"):
        model = kind(**shape.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == editor.transformer
    assert (shape.layers, shape.width) == (editor.layers, editor.width)


def test_text_encoders_too() -> None:
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in T5EncoderModel(t5).parameters()) == FLUX.encoder


def test_against_published_figures() -> None:
    assert FLUX.transformer * BYTES["bf16"] == pytest.approx(23.8e9, rel=0.01)
    assert FLUX.transformer * BYTES["nf4"] == pytest.approx(6.7e9, rel=0.01)
    assert QWEN.transformer * BYTES["bf16"] == pytest.approx(40.9e9, rel=0.01)
    assert FLUX.reuse / 2 == pytest.approx(2.87e9, rel=0.01)  # of the reference alone


def test_every_setting_needs_less_than_a_faster_one_with_the_same_weights() -> None:
    for editor in (FLUX, QWEN):
        for kind in ("bf16", "fp8", "nf4"):
            chain = [
                peak(editor, Setting("", offload, kind, "nf4"), reuse=True) for offload in ("none", "stages", "model")
            ]
            assert chain == sorted(chain, reverse=True)
        assert peak(editor, SETTINGS[0], reuse=False) < peak(editor, SETTINGS[0], reuse=True)
        assert peak(editor, SETTINGS[0], reuse=True, planner=False) < peak(editor, SETTINGS[0], reuse=True)


def test_advice_fits_and_a_larger_card_never_gets_worse_advice() -> None:
    rows = list(table())
    assert len(rows) == 2 * len(CARDS)
    for editor in (FLUX, QWEN):
        ranks = []
        for name, card, advice in rows:
            if name == editor.name:
                assert advice is not None
                assert advice.peak <= USABLE * card * GIB
                ranks.append((SETTINGS.index(advice.setting), not advice.reuse))
        assert ranks == sorted(ranks, reverse=True)
        assert advise(editor, 2 * GIB) is None
