"""Executors agree; processors equal the stock ones without a mask, obey one with it, and are put back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from replan.attention import (
    BLOCK,
    CASCADE_FROM,
    FlexMask,
    attend,
    block_mask,
    bucket,
    executor_of,
    prepare,
)
from replan.errors import BackboneError, ConfigError
from replan.mask import MaskConfig, RegionMask, TokenLayout, build_mask
from replan.processors import FluxRegionProcessor, QwenRegionProcessor, region_attention
from replan.types import Box, Grid, Size

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LAYOUT = TokenLayout(vision=0, main=6, hints=(5, 4), noise=Grid(6, 6), refs=(Grid(6, 6),), hint_pads=(0, 1))
QWEN = TokenLayout(vision=4, main=6, hints=(5, 4), noise=Grid(6, 6), refs=(Grid(6, 6),), hint_pads=(0, 1))
BOXES = [Box(0, 0, 40, 40), Box(30, 30, 96, 70)]
SIZE = Size(96, 96)
PLAIN = MaskConfig(expand=0.0, isolate=0.0)


def mask_of(layout: TokenLayout, *, isolated: bool = True, config: MaskConfig = PLAIN) -> RegionMask:
    mask = build_mask(layout, BOXES, SIZE, config, isolated=isolated)
    assert mask is not None
    return mask


def open_mask(length: int) -> RegionMask:
    return RegionMask(torch.ones(length, dtype=torch.int64), torch.ones(length, dtype=torch.int64))


def random_mask(length: int, seed: int) -> RegionMask:
    """Runs of random bits, so that full, partial and empty blocks all occur."""
    generator = torch.Generator().manual_seed(seed)
    runs = int(torch.randint(2, 14, (1,), generator=generator))
    cuts = torch.randint(0, length, (runs,), generator=generator).sort().values
    run_S = torch.bucketize(torch.arange(length), cuts)
    member = 1 << torch.randint(0, 5, (runs + 1,), generator=generator)
    reads = torch.randint(0, 32, (runs + 1,), generator=generator) | member
    return RegionMask(member[run_S], reads[run_S])


def shuffled(mask: RegionMask) -> RegionMask:
    return mask.take(torch.randperm(mask.length, generator=torch.Generator().manual_seed(0)))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- executors


@pytest.mark.parametrize("seed", range(8))
def test_block_lists_equal_those_of_the_dense_function(seed: int) -> None:
    mask = random_mask(6 * BLOCK, seed)
    ours = block_mask(mask, "cpu")

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (mask.reads_S[query] & mask.member_S[key]) != 0

    slow = create_block_mask(visible, None, None, mask.length, mask.length, device="cpu")
    assert torch.equal(ours.to_dense(), slow.to_dense())
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        ours_count, slow_count = getattr(ours, counts), getattr(slow, counts)
        assert torch.equal(ours_count, slow_count)
        for row, count in enumerate(ours_count[0, 0].tolist()):
            ours_row, slow_row = getattr(ours, indices)[0, 0, row], getattr(slow, indices)[0, 0, row]
            assert torch.equal(ours_row[:count], slow_row[:count])
            assert sorted(ours_row.tolist()) == list(range(6))


@pytest.mark.parametrize("length", [1, 127, 128, 300, 700])
def test_flex_equals_dense(length: int) -> None:
    query, key, value = (normal(2, length, 3, 16, seed=seed) for seed in range(3))
    mask = random_mask(length, length)
    dense = attend(query, key, value, mask, "dense")
    flex = attend(query, key, value, mask, "flex")
    assert dense.shape == flex.shape == query.shape
    assert (dense - flex).abs().max() <= 1e-5


@pytest.mark.gpu  # FlexAttention has no backward on a CPU
def test_gradients_agree_on_cuda() -> None:
    mask = mask_of(LAYOUT)
    grads = []
    for executor in ("dense", "flex"):
        query, key, value = (normal(1, LAYOUT.length, 2, 16, seed=seed).cuda().requires_grad_() for seed in range(3))
        attend(query, key, value, mask, executor).square().sum().backward()
        grads.append([tensor.grad for tensor in (query, key, value)])
    for dense, flex in zip(*grads, strict=True):
        assert (dense - flex).abs().max() <= 1e-5


def test_no_mask_and_open_mask_are_the_same() -> None:
    query, key, value = (normal(1, 40, 2, 8, seed=seed) for seed in range(3))
    assert torch.equal(attend(query, key, value, None), attend(query, key, value, open_mask(40), "dense"))


def test_one_compiled_kernel_serves_every_plan_of_a_bucket() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(flex_attention, dynamic=False, backend="aot_eager")
    query = normal(1, 2, 256, 16, seed=0)
    with torch.no_grad():
        for seed in range(50):
            prepared = prepare(random_mask(200 + seed, seed), "flex", "cpu")
            assert isinstance(prepared, FlexMask)
            compiled(query, query, query, block_mask=prepared.blocks)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compiled_kernel_agrees() -> None:
    compiled = torch.compile(flex_attention, dynamic=False)
    query, key, value = (normal(1, 2, 256, 32, seed=seed) for seed in range(3))
    mask = random_mask(256, 1)
    with torch.no_grad():
        out = compiled(query, key, value, block_mask=block_mask(mask, "cpu"))
        oracle = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense())
    assert (out - oracle).abs().max() <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("length", [300, 2304, 4400])
def test_flex_equals_dense_on_cuda(length: int) -> None:
    query, key, value = (normal(1, length, 4, 64, seed=seed).cuda() for seed in range(3))
    mask = random_mask(length, length)
    difference = attend(query, key, value, mask, "flex") - attend(query, key, value, mask, "dense")
    assert difference.abs().max() <= 1e-5


def test_executor_names() -> None:
    few, many = random_mask(CASCADE_FROM, 0), shuffled(random_mask(CASCADE_FROM, 0))
    assert executor_of(prepare(few, "auto", "cpu")) == "cascade"
    assert executor_of(prepare(many, "auto", "cpu")) == "dense"  # too many rectangles
    assert executor_of(prepare(random_mask(CASCADE_FROM - 1, 0), "auto", "cpu")) == "dense"
    for name in ("dense", "flex", "cascade"):
        assert executor_of(prepare(random_mask(40, 0), name, "cpu")) == name
    with pytest.raises(ConfigError, match="'flash': must be auto, dense, flex, cascade"):
        prepare(few, "flash", "cpu")
    with pytest.raises(ConfigError, match="no kernel for mps"):
        prepare(few, "cascade", "mps")


def test_bucket_rounds_up() -> None:
    assert [bucket(length) for length in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert bucket(17, 32) == 32


def test_a_mask_of_another_length_is_refused() -> None:
    query = normal(1, 30, 1, 16, seed=0)
    for executor in ("flex", "cascade"):
        with pytest.raises(BackboneError, match="mask of 40 x 40 tokens met 30 x 30"):
            attend(query, query, query, prepare(open_mask(40), executor, "cpu"))


def test_import_compiles_nothing_and_loads_no_diffusers() -> None:
    heavy = ("diffusers", "torch._inductor.compile_fx", "torch.nn.attention.flex_attention")
    code = f"import sys, replan.attention; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- transformers


def flux(layers: int = 2) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return model.eval().requires_grad_(False)


def qwen(layers: int = 2, *, zero_cond_t: bool = False) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    return model.eval().requires_grad_(False)


def flux_forward(
    model: Any, text: torch.Tensor, kwargs: dict[str, Any] | None = None, image: torch.Tensor | None = None
) -> torch.Tensor:
    """Velocity [1, noise + reference, 4]."""
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    ids = torch.cat([torch.cat([torch.full((36, 1), frame), grid], dim=1) for frame in (0.0, 1.0)])
    return model(
        hidden_states=normal(1, 72, 4, seed=1) if image is None else image,
        encoder_hidden_states=text,
        pooled_projections=normal(1, 8, seed=2),
        timestep=torch.tensor([0.7]),
        img_ids=ids,
        txt_ids=torch.zeros(text.shape[1], 3),
        guidance=torch.tensor([2.5]),
        joint_attention_kwargs=kwargs,
        return_dict=False,
    )[0]


def qwen_forward(
    model: Any, text: torch.Tensor, kwargs: dict[str, Any] | None = None, text_mask: torch.Tensor | None = None
) -> torch.Tensor:
    return model(
        hidden_states=normal(1, 72, 4, seed=1),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=text_mask,
        timestep=torch.tensor([0.7]),
        img_shapes=[[(1, 6, 6), (1, 6, 6)]],
        attention_kwargs=kwargs,
        return_dict=False,
    )[0]


Case = tuple[Callable[..., Any], Callable[..., torch.Tensor], TokenLayout]
FAMILIES = {
    "flux": (flux, flux_forward, LAYOUT),
    "qwen": (qwen, qwen_forward, QWEN),
    "qwen zero_cond_t": (lambda layers=2: qwen(layers, zero_cond_t=True), qwen_forward, QWEN),
}


@pytest.fixture(params=FAMILIES, ids=lambda name: name)
def family(request: pytest.FixtureRequest) -> Case:
    return FAMILIES[request.param]


def text_of(layout: TokenLayout) -> torch.Tensor:
    return normal(1, layout.text_length, 12, seed=5)


def test_without_a_mask_it_is_the_stock_model(family: Case) -> None:
    make, forward, layout = family
    model, text = make(), text_of(layout)
    stock = forward(model, text)
    with region_attention(model) as attention:
        assert torch.equal(forward(model, text, attention(None)), stock)
        assert torch.equal(forward(model, text, attention(open_mask(layout.length))), stock)


def test_stock_flux_takes_the_dense_mask_as_it_is() -> None:
    model, text, mask = flux(), text_of(LAYOUT), mask_of(LAYOUT)
    stock = flux_forward(model, text, {"attention_mask": mask.dense()})
    assert (stock - flux_forward(model, text)).abs().max() > 1e-4, "the mask must matter"
    with region_attention(model, "dense") as attention:
        assert torch.equal(flux_forward(model, text, attention(mask)), stock)


def test_flex_equals_dense_through_the_whole_model(family: Case) -> None:
    make, forward, layout = family
    model, text, mask = make(), text_of(layout), mask_of(layout)
    plain = forward(model, text)
    with region_attention(model, "dense") as attention:
        dense = forward(model, text, attention(mask))
    with region_attention(model, "flex") as attention:
        flex = forward(model, text, attention(mask))
    assert (dense - flex).abs().max() <= 1e-5
    assert (dense - plain).abs().max() > 1e-4


@pytest.mark.parametrize("executor", ["dense", "flex"])
def test_background_ignores_a_hint_after_one_block(executor: str) -> None:
    model = flux(layers=1)
    model.single_transformer_blocks = torch.nn.ModuleList()
    text, mask = text_of(LAYOUT), mask_of(LAYOUT)
    changed = text.clone()
    changed[:, LAYOUT.hint_slices[0]] += 1.0
    with region_attention(model, executor) as attention:
        before, after = (flux_forward(model, each, attention(mask))[0, :36] for each in (text, changed))
    moved = (before - after).abs().amax(dim=1).reshape(6, 6) > 0
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[:3, :3] = True  # 40 of 96 pixels touch 3 of 6 cells
    assert torch.equal(moved, inside)


def test_qwen_background_ignores_a_hint_after_one_block() -> None:
    model, text, mask = qwen(layers=1), text_of(QWEN), mask_of(QWEN)
    changed = text.clone()
    changed[:, QWEN.hint_slices[1].start] += 1.0
    with region_attention(model) as attention:
        before, after = (qwen_forward(model, each, attention(mask))[0, :36] for each in (text, changed))
    moved = (before - after).abs().amax(dim=1).reshape(6, 6) > 0
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[1:5, 1:6] = True
    assert torch.equal(moved, inside)


def test_padding_of_a_hint_is_seen_by_nobody(family: Case) -> None:
    make, forward, layout = family
    model, text, mask = make(), text_of(layout), mask_of(layout)
    changed = text.clone()
    changed[:, layout.hint_slices[1].stop - 1] += 3.0
    with region_attention(model) as attention:
        assert torch.equal(forward(model, text, attention(mask)), forward(model, changed, attention(mask)))


def test_qwen_text_padding_joins_a_dense_mask() -> None:
    model, text, mask = qwen(), text_of(QWEN), mask_of(QWEN)
    text_mask = torch.ones(1, QWEN.text_length, dtype=torch.bool)
    text_mask[:, 5] = False
    stock = qwen_forward(model, text, text_mask=text_mask)
    with region_attention(model, "dense") as attention:
        assert torch.equal(qwen_forward(model, text, attention(None), text_mask), stock)
        joined = qwen_forward(model, text, attention(mask), text_mask)
        hidden = qwen_forward(model, text, attention(mask.hide(slice(5, 6))))
    assert (joined - hidden).abs().max() <= 1e-6
    with region_attention(model, "flex") as attention, pytest.raises(BackboneError, match="hide the padding"):
        qwen_forward(model, text, attention(mask), text_mask)


def test_the_stock_processors_come_back_also_after_an_error(family: Case) -> None:
    make, _, _ = family
    model = make()
    before = model.attn_processors

    def fail() -> None:
        ours = model.attn_processors.values()
        assert all(isinstance(each, FluxRegionProcessor | QwenRegionProcessor) for each in ours)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), region_attention(model):
        fail()
    after = model.attn_processors
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_contexts_nest_and_keep_the_chosen_backend() -> None:
    model, text = flux(), text_of(LAYOUT)
    for processor in model.attn_processors.values():
        processor._attention_backend = "_native_math"
    stock = flux_forward(model, text)
    with region_attention(model), region_attention(model) as attention:
        assert {each._attention_backend for each in model.attn_processors.values()} == {"_native_math"}
        assert torch.equal(flux_forward(model, text, attention(None)), stock)


def test_a_foreign_processor_is_refused_and_left_alone() -> None:
    class Foreign:
        pass

    model = flux()
    foreign = Foreign()
    model.transformer_blocks[1].attn.set_processor(foreign)
    with (
        pytest.raises(BackboneError, match=r"transformer_blocks\.1\.attn\.processor: Foreign"),
        region_attention(model),
    ):
        pass
    assert model.transformer_blocks[1].attn.processor is foreign


def test_an_unknown_executor_is_refused_before_anything_is_swapped() -> None:
    model = flux()
    with pytest.raises(ConfigError, match="auto, dense, flex, cascade"), region_attention(model, "flash"):
        pass
    assert not any(isinstance(each, FluxRegionProcessor) for each in model.attn_processors.values())


@torch.no_grad()
def test_lora_and_offload_hooks(family: Case) -> None:
    from peft import LoraConfig

    make, forward, layout = family
    model, text, mask = make(), text_of(layout), mask_of(layout)
    plain = forward(model, text)
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "add_k_proj", "to_add_out"]
    )
    model.add_adapter(config)
    stock = forward(model, text)
    assert (stock - plain).abs().max() > 1e-4
    with region_attention(model, "dense") as attention:
        assert torch.equal(forward(model, text, attention(None)), stock)
        dense = forward(model, text, attention(mask))
    with region_attention(model, "flex") as attention:
        assert (forward(model, text, attention(mask)) - dense).abs().max() <= 1e-5
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    for executor in ("dense", "flex"):
        with region_attention(model, executor, "cpu") as attention:
            assert (forward(model, text, attention(mask)) - dense).abs().max() <= 1e-5


def test_a_hidden_hint_has_no_gradient_through_the_model(family: Case) -> None:
    make, forward, layout = family
    model, mask = make(layers=1), mask_of(layout, config=MaskConfig(expand=0.0, isolate=0.0, mutual=False))
    if isinstance(model, FluxTransformer2DModel):
        model.single_transformer_blocks = torch.nn.ModuleList()
    text = text_of(layout).requires_grad_()
    with region_attention(model) as attention:
        corner = forward(model, text, attention(mask))[0, 35]  # the last noise cell lies in no box
    (gradient,) = torch.autograd.grad(corner.square().sum(), text)
    for span in layout.hint_slices:
        assert gradient[0, span].abs().max() == 0.0
    assert gradient[0, layout.main_slice].abs().max() > 0.0
