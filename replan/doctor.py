"""What is here, what would run, and what to type to mend the rest. Reads only; never downloads, never loads weights."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import replan
from replan import config, memory, record
from replan.errors import ConfigError

State = Literal["ok", "absent", "broken"]
_GIB = 2**30
_GATED = ("flux-kontext",)
_SECRETS = {
    "OPENAI_API_KEY": "not set; needed by planners at OpenAI",
    "REPLAN_API_KEY": "not set; needed by servers of your own that ask for a key",
    "GEMINI_API_KEY": "not set; needed by Gemini planners",
    "HF_TOKEN": "not set; gated weights need it or `hf auth login`",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `absent` limits what can be done; `broken`: not even the mini models run. `fix` is what to type."""

    group: str
    name: str
    state: State
    found: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """Weights that a verb can name. `memory`: GiB in bfloat16, all resident; `offloaded`: one part at a time."""

    name: str
    weights: str
    marker: str
    memory: float
    offloaded: float
    gated: bool = False


def examine() -> list[Check]:
    """Every check, in the order in which a reader wants them."""
    torch = _torch()
    checks = [*_machine(), *_packages()]
    if isinstance(torch, Check):
        return [*checks, torch]
    checks += [*_device(torch), *_attention(torch), *_extras(), *_configs()]
    return [*checks, *_models(torch), *_memory(torch), *_remote()]


def healthy(checks: list[Check]) -> bool:
    """Whether at least the mini models run."""
    return all(check.state != "broken" for check in checks)


def _machine() -> Iterator[Check]:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11)
    yield Check(
        "system",
        "python",
        "ok" if fine else "broken",
        f"{version} at {sys.executable}",
        _unless(fine, "use Python 3.11 or newer"),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ram()
    yield Check(
        "system", "machine", "ok", f"{platform.system()} {platform.machine()}, {cores} cores, {_gib(memory)} memory"
    )
    revision = record.git_revision()
    yield Check(
        "system",
        "replan",
        "ok",
        f"{replan.__version__}{f' ({revision[:10]})' if revision else ''} at {Path(replan.__file__).parent}",
    )


def _packages() -> Iterator[Check]:
    """Each dependency that our own metadata names, against the range it names."""
    if installed("replan") is None:
        yield Check("packages", "replan", "broken", "runs, but is not installed", "pip install -e .")
    for name, specifier in requirements(None):
        version = installed(name)
        if version is None:
            yield Check("packages", name, "broken", "missing", f"pip install '{name}{specifier}'")
        elif not _allowed(version, specifier):
            yield Check("packages", name, "broken", f"{version}, needs {specifier}", f"pip install '{name}{specifier}'")
        else:
            yield Check("packages", name, "ok", version)


def _torch() -> Any:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("device", "torch", "broken", f"cannot be imported: {error}", "pip install torch")
    return torch


def _device(torch: Any) -> Iterator[Check]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            kind = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16, use --dtype float16"
            yield Check("device", f"cuda:{index}", "ok", f"{name}, {_gib(free)} of {_gib(total)} free, {kind}")
    elif torch.backends.mps.is_available():
        yield Check("device", "mps", "ok", f"Apple GPU, shares {_gib(ram())}")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA finds no GPU"
        fix = "install a CUDA build of torch (see pytorch.org) if this machine has an NVIDIA GPU"
        yield Check("device", "accelerator", "absent", f"none ({why}); runs on the CPU", fix)
    yield Check("device", "cpu", "ok", f"{torch.get_num_threads()} threads")


def _attention(torch: Any) -> Iterator[Check]:
    yield Check("attention", "sdpa", "ok", "the reference; runs everywhere")
    if torch.backends.mps.is_available():
        yield Check("attention", "cascade", "absent", "has no kernel for an Apple GPU; sdpa does the same work")
    else:
        yield Check("attention", "cascade", "ok", "region masks as plain attention calls, for long sequences")
    if not torch.cuda.is_available():
        yield Check("attention", "flex", "absent", "is for CUDA; here cascade and sdpa do the same work")
    elif importlib.util.find_spec("triton") is None:
        yield Check(
            "attention", "flex", "absent", "needs triton to compile; cascade does the same work", "pip install triton"
        )
    else:
        yield Check("attention", "flex", "ok", "block-sparse region mask, compiled at the first edit")
    flash = installed("flash-attn")
    if flash:
        yield Check("attention", "flash-attn", "ok", f"{flash}, used by the planner on CUDA")
    else:
        fix = "pip install flash-attn --no-build-isolation" if torch.cuda.is_available() else None
        yield Check("attention", "flash-attn", "absent", "the planner uses sdpa", fix)


def _extras() -> Iterator[Check]:
    for extra in metadata_extras():
        names = list(dict.fromkeys(name for name, _ in requirements(extra)))  # extras of extras may name one twice
        missing = [name for name in names if installed(name) is None]
        if missing:
            where = "in an environment of its own: " if extra == "verl" else ""
            fix = f"{where}pip install 'replan[{extra}]'"
            yield Check("extras", extra, "absent", f"missing: {', '.join(missing)}", fix)
        else:
            yield Check("extras", extra, "ok", ", ".join(names))


def _configs() -> Iterator[Check]:
    names = config.config_names()
    folders = sorted({name.partition("/")[0] for name in names})
    try:
        config.config_path("edit/mini")
    except ConfigError as error:
        yield Check("configs", "configs", "broken", str(error), "pip install --force-reinstall replan")
    else:
        yield Check("configs", "configs", "ok", f"{len(names)} files: {', '.join(folders)}")


def models() -> tuple[Model, ...]:
    """The weights that can be named, with what they need: the size of the published files and some room to work in."""
    from replan.backbones import BACKBONES, find
    from replan.cli.options import RELEASED_PLANNER

    mini = Path(replan.__file__).parent / "mini" / "weights" / "planner"
    planners = (
        Model("planner mini", str(mini), "config.json", 0.1, 0.1),
        Model(f"planner {RELEASED_PLANNER.partition('/')[2]}", RELEASED_PLANNER, "config.json", *_planner_need()),
    )
    backbones = []
    for row in BACKBONES:
        weights = find(row.name)[1]
        if row.name in memory.FOOTPRINTS:
            need, gated = _editor_need(memory.FOOTPRINTS[row.name]), row.name in _GATED
            backbones.append(Model(f"backbone {row.name}", weights, "model_index.json", *need, gated))
        elif not row.weights:  # ours, a few megabytes
            backbones.append(Model(f"backbone {row.name}", weights, "model_index.json", 0.2, 0.2))
    return (*planners, *backbones)


def _planner_need() -> tuple[float, float]:
    need = (2.0 * memory.PLANNER + memory.PLANNING + memory.CONTEXT) / _GIB
    return need, need


def _editor_need(editor: memory.Footprint) -> tuple[float, float]:
    """GiB of an editor alone: all resident, and one part at a time."""
    whole, offloaded = (
        memory.peak(editor, memory.Setting("", offload), reuse=False, planner=False) for offload in ("none", "model")
    )
    return whole / _GIB, offloaded / _GIB


def _memory(torch: Any) -> Iterator[Check]:
    """The fastest setting that fits, for usual cards and for what is free here; computed, see replan.memory."""
    for editor in (memory.FLUX, memory.QWEN):
        yield Check("memory", editor.name, "ok", memory.formula(editor))
    for name, card, advice in memory.table():
        yield _advice(f"{name}, {card} GiB", advice)
    if torch.cuda.is_available():
        free = max(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        for editor in (memory.FLUX, memory.QWEN):
            yield _advice(f"{editor.name}, here", memory.advise(editor, free))


def _advice(name: str, advice: memory.Advice | None) -> Check:
    if advice is None:
        return Check("memory", name, "absent", "nothing fits; plan elsewhere (--planner URL) or use a larger card")
    return Check("memory", name, "ok", f"{advice.words} (peak {advice.peak / _GIB:.1f} GiB)")


def _models(torch: Any) -> Iterator[Check]:
    free = _room(torch)
    for model in models():
        here = _present(model)
        fit = _fit(model, free, torch)
        if Path(model.weights).is_absolute():
            state: State = "ok" if here else "broken"
            yield Check(
                "models",
                model.name,
                state,
                fit if here else f"no weights at {model.weights}",
                _unless(here, "pip install --force-reinstall replan"),
            )
        elif here:
            state = "absent" if fit.startswith("needs") else "ok"
            yield Check("models", model.name, state, f"downloaded; {fit}")
        else:
            login = "accept the licence on its page, then `hf auth login`; " if model.gated else ""
            yield Check("models", model.name, "absent", f"not downloaded; {fit}", f"{login}hf download {model.weights}")


def _fit(model: Model, free: int, torch: Any) -> str:
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    scale = 1 if accelerated else 2  # a CPU runs float32
    if model.memory * scale * _GIB <= free:
        return "would run"
    if accelerated and model.offloaded * _GIB <= free:
        return "would run with --offload model"
    if torch.cuda.is_available() and free >= 4 * _GIB and ram() >= model.memory * _GIB:
        return "would run with --offload sequential (slow), or try --quantize nf4"
    place = "on the accelerator" if accelerated else "in memory"
    return f"needs about {model.memory * scale:.0f} GiB {place}, {_gib(free)} are free"


def _present(model: Model) -> bool:
    if Path(model.weights).is_absolute():
        return (Path(model.weights) / model.marker).is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.weights, model.marker), str)


def _remote() -> Iterator[Check]:
    for name in _SECRETS:
        given = bool(os.environ.get(name))
        yield Check(
            "remote",
            name,
            "ok" if given else "absent",
            "set" if given else _SECRETS[name],
        )


def _room(torch: Any) -> int:
    if torch.cuda.is_available():
        return max(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    return free_ram()


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def metadata_extras() -> list[str]:
    """The names of replan's extras."""
    return metadata.metadata("replan").get_all("Provides-Extra") or [] if installed("replan") else []


def requirements(extra: str | None) -> list[tuple[str, str]]:
    """(name, version range) of what replan itself, or one of its extras, depends on."""
    from packaging.requirements import Requirement

    found = []
    for line in metadata.requires("replan") or [] if installed("replan") else []:
        requirement = Requirement(line)
        ours = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        wanted = ours if extra is None else not ours and requirement.marker.evaluate({"extra": extra})  # type: ignore[union-attr]
        if wanted and requirement.name != "replan":
            found.append((requirement.name, str(requirement.specifier)))
    return found


def ram() -> int:
    """Bytes of memory, 0 if unknown."""
    return _pages("SC_PHYS_PAGES")


def free_ram() -> int:
    """Bytes of memory that could be had now, 0 if unknown."""
    try:
        with open("/proc/meminfo") as file:
            lines: Mapping[str, str] = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return ram()


def _pages(name: str) -> int:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def _allowed(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _unless(fine: bool, fix: str) -> str | None:
    return None if fine else fix
