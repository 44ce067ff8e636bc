"""Load and memory: offload, tiling, smaller weights, and a planner that takes turns with the editor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeBackbone, FakePlanner, picture
from PIL import Image

import replan.edit
import replan.planner
from replan.backbones import EditConfig, Runtime, load_backbone
from replan.backbones.runtime import move
from replan.config import load
from replan.edit import Editor
from replan.errors import BackboneError, ConfigError
from replan.planner import PlannerConfig
from replan.types import Box, EditRequest, Plan, Region, Size

CPU = Runtime(device="cpu")
CONFIG = load(EditConfig, "edit/mini", ["steps=2", "max_area=1536"])
PLAN = Plan("", "keep it", (Region(Box(4, 4, 20, 20), "make it red"),), Size(48, 32))
REQUEST = EditRequest(picture(48, 32), "x", 3, PLAN)


def edited(folder: Path, runtime: Runtime) -> np.ndarray:
    image: Image.Image = Editor(None, load_backbone(str(folder), runtime), CONFIG)(REQUEST).image
    return np.asarray(image).astype(int)


def test_runtimes_that_cannot_be(flux_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be moved"):
        Runtime(offload="stages", quantize="bnb-int8")
    with pytest.raises(ConfigError, match=r"quantize = 'int3': must be one of .*gguf file"):
        Runtime(quantize="int3")
    with pytest.raises(ConfigError, match="offload = stages: needs an accelerator"):
        load_backbone(str(flux_folder), replace(CPU, offload="stages"))
    pytest.importorskip("gguf")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_backbone(str(flux_folder), replace(CPU, quantize=str(tmp_path / "no.gguf")))
    (tmp_path / "bad.gguf").write_bytes(b"x")
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(flux_folder), replace(CPU, quantize=str(tmp_path / "bad.gguf")))


def test_tiling_is_off_unless_asked_for(flux_folder: Path) -> None:
    tiled: Any = load_backbone(str(flux_folder), replace(CPU, vae_tiling=True))
    plain: Any = load_backbone(str(flux_folder), CPU)
    assert (tiled.pipe.vae.use_tiling, plain.pipe.vae.use_tiling) == (True, False)


def test_compiled_blocks_may_take_many_forms() -> None:
    """torch gives up after 8, and a full graph that may not be made is an error in the middle of an edit."""
    import torch._dynamo

    from replan.backbones.runtime import GRAPHS, _compile

    asked: dict[str, Any] = {}
    with torch._dynamo.config.patch(recompile_limit=8):  # what it was is put back, which monkeypatch cannot do here
        _compile(type("Transformer", (), {"compile_repeated_blocks": lambda self, **how: asked.update(how)})())
        assert (torch._dynamo.config.recompile_limit, asked) == (GRAPHS, {"fullgraph": True})


class Moves:
    """Weights that say where they were sent."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def to(self, device: Any) -> None:
        self.log.append(f"{self.name} to {torch.device(device).type}")


@pytest.mark.parametrize("offload", ["none", "stages", "group"])
def test_planner_and_editor_take_turns(monkeypatch: pytest.MonkeyPatch, offload: str) -> None:
    log: list[str] = []

    def load_planner(*_: Any) -> FakePlanner:
        log.append("planner loads")
        planner: Any = FakePlanner()
        planner.model = Moves("planner", log)
        return planner

    def load_editor(*_: Any) -> FakeBackbone:
        log.append("editor loads")
        backbone: Any = FakeBackbone(lambda request: log.append("editor works"))
        backbone.pipe = Moves("editor", log)
        return backbone

    monkeypatch.setattr(replan.edit, "_load_planner", load_planner)
    monkeypatch.setattr(replan.edit, "load_backbone", load_editor)
    monkeypatch.setattr(Runtime, "torch_device", lambda self: torch.device("meta"))
    editor = Editor.load("mini", "mini", config=CONFIG, runtime=Runtime(offload=offload))
    request = EditRequest(picture(), "red")
    editor(request)
    first, log[:] = log[:], []
    editor(request)
    if offload == "none":
        assert (first, log) == (["planner loads", "editor loads", "editor works"], ["editor works"])
    elif offload == "stages":
        assert first[:4] == ["planner loads", "planner to cpu", "editor loads", "editor works"]
        assert log[:5] == ["editor to cpu", "planner to meta", "planner to cpu", "editor to meta", "editor works"]
    else:
        assert not [line for line in first + log if line.startswith("editor to")]
        assert first[:4] == ["planner loads", "planner to cpu", "editor loads", "editor works"]
        assert log[:3] == ["planner to meta", "planner to cpu", "editor works"]


def test_compiling_gives_the_planner_a_cache_of_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(replan.planner, "load_planner", lambda spec, config, *_: seen.append(config.cache))
    for compiles in (False, True):
        _ = Editor.load("mini", "mini", runtime=replace(CPU, compile=compiles)).planner
    given = PlannerConfig(cache="dynamic")
    _ = Editor.load("mini", "mini", runtime=replace(CPU, compile=True), planner_config=given).planner
    assert seen == ["auto", "static", "dynamic"]


def test_a_gguf_transformer(flux_folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    full: Any = load_backbone(str(flux_folder), CPU)
    file = tmp_path / "transformer.gguf"
    writer = gguf.GGUFWriter(str(file), "flux")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in full.pipe.transformer.state_dict().items():
        values = tensor.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    got = edited(flux_folder, replace(CPU, quantize=str(file)))
    difference = np.abs(got - edited(flux_folder, CPU))
    assert 0 < difference.max() < 60  # eight bits a weight: near, and not the same


def test_int8_weights(flux_folder: Path) -> None:
    pytest.importorskip("torchao")
    backbone: Any = load_backbone(str(flux_folder), replace(CPU, quantize="int8"))
    weight = backbone.pipe.transformer.transformer_blocks[0].attn.to_q.weight
    assert "Int8" in type(weight).__name__ or "AffineQuantized" in type(weight).__name__
    assert np.abs(edited(flux_folder, replace(CPU, quantize="int8")) - edited(flux_folder, CPU)).max() < 60


def test_what_has_weights_moves(flux_folder: Path) -> None:
    backbone: Any = load_backbone(str(flux_folder), CPU)
    move(backbone, "meta")
    assert {p.device.type for p in backbone.pipe.transformer.parameters()} == {"meta"}
    move(object(), "meta")  # a remote planner has none


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["stages", "model", "sequential", "group"])
def test_offload_changes_nothing_on_a_gpu(flux_folder: Path, offload: str) -> None:
    runtime = Runtime(device="cuda", dtype="float32")
    assert torch.cuda.is_available(), "gpu tests need CUDA"
    here, there = edited(flux_folder, runtime), edited(flux_folder, replace(runtime, offload=offload))
    assert np.abs(here - there).max() <= 1
