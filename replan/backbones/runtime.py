"""Where and how a model runs: device, number type, offload, quantisation, compilation, LoRA; diffusers does it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replan.errors import BackboneError, ConfigError
from replan.hub import absent, unreachable

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLOADS = ("none", "stages", "model", "sequential", "group")
EXECUTORS = ("auto", "dense", "flex", "cascade")
QUANTIZERS = ("int8", "fp8", "nf4", "bnb-int8")
GGUF = ".gguf"
GRAPHS = 64  # compiled forms of a block: kinds of step, guidance, candidates, sizes of pictures; torch gives up after 8
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # of a model on the hub


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and how the models run.

    device    auto (cuda, else mps, else cpu), or one of them, or cuda:1
    dtype     auto (bfloat16 on an accelerator, float32 on a CPU) or its name
    offload   none; stages: planner and editor take turns on the accelerator; model: the editor's parts do so too;
              group: one layer at a time, fetched while the one before computes; sequential: the same without haste
    quantize  int8 (torchao); on CUDA also fp8 (torchao), nf4 and bnb-int8 (bitsandbytes); None = as stored;
              or a GGUF file of the transformer (a path, or `owner/name:file.gguf`)
    compile   compile the transformer's blocks, and the planner's forward with a cache of fixed size
    vae_tiling  encode and decode pictures above the VAE's own size in tiles: less memory, seams possible
    attention executor of region masks: auto, dense, flex or cascade
    lora      files, folders or hub ids (`owner/name` or `owner/name:file.safetensors`)
    """

    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    quantize: str | None = None
    compile: bool = False
    vae_tiling: bool = False
    attention: str = "auto"
    lora: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("device", self.device.partition(":")[0], DEVICES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("offload", self.offload, OFFLOADS)
        _one_of("attention", self.attention, EXECUTORS)
        if self.quantize is not None and not self.quantize.endswith(GGUF):
            _one_of("quantize", self.quantize, (*QUANTIZERS, "a .gguf file"))
        if self.quantize == "bnb-int8" and self.offload == "stages":
            raise ConfigError(
                "offload = stages: bitsandbytes' 8-bit weights cannot be moved; use quantize = int8 or nf4"
            )
        object.__setattr__(self, "lora", (self.lora,) if isinstance(self.lora, str) else tuple(self.lora or ()))

    def torch_device(self) -> torch.device:
        """The device meant. Raises ConfigError when this machine has none of the kind."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "mps" if _mps() else "cpu")
        device = torch.device(self.device)
        if (device.type == "cuda" and not torch.cuda.is_available()) or (device.type == "mps" and not _mps()):
            raise ConfigError(f"device = {self.device}: this machine or this torch has none; use auto or cpu")
        return device

    def torch_dtype(self) -> torch.dtype:
        """The number type meant."""
        import torch

        if self.dtype == "auto":
            return torch.float32 if self.torch_device().type == "cpu" else torch.bfloat16
        return getattr(torch, self.dtype)


def load_pipeline(kind: type[Any], weights: str, runtime: Runtime, encoders: Sequence[str], **parts: Any) -> Any:
    """A stock pipeline of class `kind` from a hub id or folder, set up as `runtime` says.

    `encoders` are the parts beside the transformer that quantisation covers; `parts` are ready-made components.
    Raises BackboneError when it cannot be loaded, ConfigError when `runtime` asks for what is not there.
    """
    device, dtype = runtime.torch_device(), runtime.torch_dtype()
    if runtime.offload in ("stages", "model", "sequential") and device.type == "cpu":
        raise ConfigError(f"offload = {runtime.offload}: needs an accelerator; on a CPU use none")
    for source in runtime.lora:
        _check_lora(source)
    extra: dict[str, Any] = dict(parts)
    if runtime.quantize is not None and runtime.quantize.endswith(GGUF):
        extra["transformer"] = _gguf(kind, weights, runtime.quantize, dtype)
    elif runtime.quantize is not None:
        if runtime.quantize != "int8" and device.type != "cuda":
            raise ConfigError(f"quantize = {runtime.quantize}: needs a CUDA device; int8 runs anywhere")
        extra["quantization_config"] = _quantization(runtime.quantize, ("transformer", *encoders), dtype)
    pipe = guard(f"model {weights}", lambda: kind.from_pretrained(weights, dtype=dtype, **extra))
    pipe.set_progress_bar_config(disable=True)
    _load_loras(pipe, runtime.lora)
    if runtime.vae_tiling:
        pipe.vae.enable_tiling()
    if runtime.compile:  # before the offload hooks, which wrap the compiled blocks
        _compile(pipe.transformer)
    _place(pipe, runtime.offload, device)
    return pipe


def _compile(transformer: Any) -> None:
    """Compile the blocks. A plan is data to them; what makes another graph is another number of tokens or pictures."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    transformer.compile_repeated_blocks(fullgraph=True)


def guard(what: str, load: Callable[[], Any]) -> Any:
    """Run `load`; whatever the libraries raise for missing or broken weights becomes a BackboneError."""
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        if unreachable(error):
            raise BackboneError(absent(what)) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BackboneError(f"{what}: cannot be loaded ({type(error).__name__}: {reason[0]})") from error


def _place(pipe: Any, offload: str, device: torch.device) -> None:
    import torch

    match offload:
        case "none" | "stages":
            pipe.to(device)
        case "model":
            pipe.enable_model_cpu_offload(device=device)
        case "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        case "group":
            pipe.enable_group_offload(
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=device.type == "cuda",  # the next layer comes while this one computes
                record_stream=device.type == "cuda",
            )


def move(model: Any, device: torch.device | str) -> None:
    """Bring a backbone or a local planner to `device`; what has no weights here stays. Freed memory is given back."""
    import torch

    target: Any = getattr(model, "pipe", None) or getattr(model, "model", None)
    if not hasattr(target, "to"):
        return
    target.to(device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gguf(kind: type[Any], weights: str, source: str, dtype: torch.dtype) -> Any:
    """The transformer out of a GGUF file, whose weights are unpacked layer by layer as they are used."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"quantize = {source}: needs gguf; pip install 'replan[gpu]'")
    import diffusers
    from diffusers.quantizers.quantization_config import GGUFQuantizationConfig

    folder, name = _lora_parts(source)
    if name is None:
        raise ConfigError(f"quantize = {source}: there is no such file; give a path, or owner/name:file.gguf")

    def load() -> Any:
        if Path(source).is_file():
            file = source
        else:
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(folder, name)
        part: Any = getattr(diffusers, kind.load_config(weights)["transformer"][1])
        how = GGUFQuantizationConfig(compute_dtype=dtype)
        return part.from_single_file(
            file, config=weights, subfolder="transformer", quantization_config=how, torch_dtype=dtype
        )

    return guard(f"transformer {source}", load)


def _load_loras(pipe: Any, loras: Sequence[str]) -> None:
    for number, source in enumerate(loras):
        folder, name = _lora_parts(source)
        extra = {"weight_name": name} if name else {}
        guard(
            f"LoRA {source}",
            lambda folder=folder, extra=extra, number=number: pipe.load_lora_weights(
                folder, adapter_name=f"lora{number}", **extra
            ),
        )
    if len(loras) > 1:
        pipe.set_adapters([f"lora{number}" for number in range(len(loras))])


def _check_lora(source: str) -> None:
    """Raise ConfigError for what is neither a file, a folder nor a hub id, before anything large is loaded."""
    folder, _ = _lora_parts(source)
    may_be_an_id = _ID.fullmatch(folder) and not folder.endswith(".safetensors")
    if not may_be_an_id and not Path(folder).exists():
        raise ConfigError(f"lora {source}: there is no such file or folder; or give a hub id, owner/name[:file]")


def _lora_parts(source: str) -> tuple[str, str | None]:
    """Folder or hub id, and the file inside it."""
    path = Path(source)
    if path.is_file():
        return str(path.parent), path.name
    if not path.exists() and ":" in source and not os.path.isabs(source):
        folder, _, name = source.partition(":")
        return folder, name
    return source, None


def _quantization(name: str, parts: Sequence[str], dtype: torch.dtype) -> Any:
    """diffusers' quantisation of the named parts. Raises ConfigError when the library is missing."""
    package = "bitsandbytes" if name in ("nf4", "bnb-int8") else "torchao"
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"quantize = {name}: needs {package}; pip install 'replan[gpu]'")
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    how: dict[str, Any]
    if package == "bitsandbytes":
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        how = four if name == "nf4" else {"load_in_8bit": True}
        backend = "bitsandbytes_4bit" if name == "nf4" else "bitsandbytes_8bit"
        return PipelineQuantizationConfig(quant_backend=backend, quant_kwargs=how, components_to_quantize=list(parts))
    import transformers
    from diffusers.quantizers import quantization_config as ours

    library: Any = importlib.import_module("torchao.quantization")
    kind = library.Int8WeightOnlyConfig if name == "int8" else library.Float8DynamicActivationFloat8WeightConfig
    # two classes of one name: the transformer takes diffusers', the text encoders take transformers'
    how = {part: (ours if part == "transformer" else transformers).TorchAoConfig(kind()) for part in parts}
    return PipelineQuantizationConfig(quant_mapping=how)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(known)}")


def _mps() -> bool:
    import torch

    return torch.backends.mps.is_available()
