"""Which settings fit into an accelerator's memory: computed from parameter counts, never measured here. Pure Python.

    peak = context + max over the stages of an edit of (weights resident in it + what it works with)

    weights      parameters x bytes of one: bfloat16 2, fp8 and int8 1, nf4 0.5 and a float32 scale for every 64
    a step       activations: a * N * D * 2 bytes, N tokens of width D in bfloat16
    reuse        keys and values of noise and reference in every layer: 2 * L * P * D * 2 bytes (speed: fast)
    decoding     the VAE's largest intermediate results at 1024 x 1024
    planning     keys and values of 2 * 28 * 512 * 2 bytes a token, and the picture's way through the vision tower

`a` and the decoder's need are the peaks of the live tensors when the real classes run on meta tensors, without any
workspace of their kernels; the context is assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30
CARDS = (16, 24, 48, 80, 141)
USABLE = 0.95  # of a card's memory; the rest goes to other programs and to gaps between blocks
CONTEXT = 0.8 * GIB  # assumed: CUDA's own memory and the kernels' workspace
BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Parameters of an editor's parts, and what a 1024 x 1024 edit with two hints makes them work on.

    The second encoder is never quantised; `leaf` is the largest single layer in parameters.
    """

    name: str
    transformer: int
    encoder: int
    second_encoder: int
    vae: int
    layers: int
    width: int
    tokens: int
    image_tokens: int
    activations: float
    decoding: float
    leaf: int

    def weights(self, bytes_each: float) -> float:
        """All parts; the VAE and the second encoder stay in bfloat16."""
        return (self.transformer + self.encoder) * bytes_each + 2.0 * (self.second_encoder + self.vae)

    @property
    def working(self) -> float:
        """Bytes that one denoising step needs beside the weights."""
        return self.activations * self.tokens * self.width * 2.0

    @property
    def reuse(self) -> float:
        """Bytes of the keys and values that the fast preset keeps."""
        return 2.0 * self.layers * self.image_tokens * self.width * 2.0


FLUX = Footprint(
    "flux-kontext", 11_901_408_320, 4_762_310_656, 123_060_480, 83_819_683,
    layers=57, width=3072, tokens=512 + 2 * 64 + 8192, image_tokens=8192, activations=14.7, decoding=1.45e9,
    leaf=131_596_288,
)  # fmt: skip
QWEN = Footprint(
    "qwen-image-edit", 20_430_401_088, 8_292_166_656, 0, 126_892_531,
    layers=60, width=3072, tokens=1400 + 2 * 64 + 8192, image_tokens=8192, activations=11.6, decoding=3.37e9,
    leaf=544_997_376,
)  # fmt: skip
FOOTPRINTS = {"flux-kontext": FLUX, "qwen-image-edit": QWEN, "qwen-image-edit-plus": QWEN}
PLANNER = 8_292_166_656  # parameters of the released planner
PLANNING = 2 * 28 * 512 * 2.0 * (1536 + 512 + 2048) + 0.5e9  # the last term is assumed


@dataclass(frozen=True, slots=True)
class Setting:
    """How to run: `options` is what to type. `planner` and `editor` name the kind of their weights."""

    options: str
    offload: str
    editor: str = "bf16"
    planner: str = "bf16"


# The fastest first; each gives up something for memory. Weights as published come before smaller ones.
SETTINGS = (
    Setting("(none)", "none"),
    Setting("--offload stages", "stages"),
    Setting("--offload model", "model"),
    Setting("--offload stages --quantize fp8", "stages", "fp8"),
    Setting("--offload model --quantize fp8", "model", "fp8"),
    Setting("--offload stages --quantize nf4 planner.quantize=nf4", "stages", "nf4", "nf4"),
    Setting("--offload model --quantize nf4 planner.quantize=nf4", "model", "nf4", "nf4"),
    Setting("--offload group planner.quantize=nf4", "group", planner="nf4"),
)


def peak(editor: Footprint, setting: Setting, *, reuse: bool, planner: bool = True) -> float:
    """Bytes at the worst moment of an edit; `planner` False: it runs elsewhere."""
    each = BYTES[setting.editor]
    step = editor.working + (editor.reuse if reuse else 0.0)
    parts = (
        editor.encoder * each + editor.second_encoder * 2.0,
        editor.transformer * each + step,
        editor.vae * 2.0 + editor.decoding,
    )
    work = max(step, editor.decoding)
    planning = PLANNER * BYTES[setting.planner] + PLANNING if planner else 0.0
    match setting.offload:
        case "none":
            resident = planning - PLANNING if planner else 0.0
            return CONTEXT + editor.weights(each) + resident + max(work, PLANNING if planner else 0.0)
        case "stages":
            return CONTEXT + max(planning, editor.weights(each) + work)
        case "model":
            return CONTEXT + max(planning, *parts)
        case _:  # group: one layer computes while the next one comes
            return CONTEXT + max(planning, work + 2 * 2.0 * editor.leaf)


@dataclass(frozen=True, slots=True)
class Advice:
    """What to type for a card; None when nothing fits."""

    setting: Setting
    reuse: bool
    peak: float

    @property
    def words(self) -> str:
        return self.setting.options if self.reuse else f"{self.setting.options}, speed=exact only"


def advise(editor: Footprint, memory: float) -> Advice | None:
    """The fastest setting whose peak fits into `memory` bytes; with room for reuse between steps if there is any."""
    for setting in SETTINGS:
        for reuse in (True, False):
            needed = peak(editor, setting, reuse=reuse)
            if needed <= USABLE * memory:
                return Advice(setting, reuse, needed)
    return None


def table() -> Iterator[tuple[str, int, Advice | None]]:
    """(backbone, card in GiB, what to type) for every card; both Qwen editors are alike."""
    for editor in (FLUX, QWEN):
        for card in CARDS:
            yield editor.name, card, advise(editor, card * GIB)


def formula(editor: Footprint) -> str:
    """The numbers behind an editor's rows."""
    parts = [f"transformer {_gib(2.0 * editor.transformer)}", f"text encoder {_gib(2.0 * editor.encoder)}"]
    if editor.second_encoder:
        parts.append(f"second encoder {_gib(2.0 * editor.second_encoder)}")
    parts += [f"VAE {_gib(2.0 * editor.vae)}", f"planner {_gib(2.0 * PLANNER)}"]
    parts.append(f"step {editor.activations} x {editor.tokens} x {editor.width} x 2 B = {_gib(editor.working)}")
    keys = f"2 x {editor.layers} x {editor.image_tokens} x {editor.width} x 2 B = {_gib(editor.reuse)}"
    return (
        ", ".join(parts) + f", reuse {keys}, decoding {_gib(editor.decoding)}, context {_gib(CONTEXT)} (assumed), GiB"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
