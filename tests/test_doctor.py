"""The doctor on machines of every kind, made up with fakes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replan import config, doctor
from replan.doctor import Check, Model, examine, healthy

GIB = 2**30


def machine(cuda: int = 0, free: float = 0.0, mps: bool = False) -> Any:
    """A torch with `cuda` GPUs of `free` GiB."""
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: cuda > 0,
            device_count=lambda: cuda,
            mem_get_info=lambda index: (int(free * GIB), 80 * GIB),
            get_device_name=lambda index: "a GPU",
            is_bf16_supported=lambda: True,
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        version=SimpleNamespace(cuda=None),
        get_num_threads=lambda: 2,
    )


def named(checks: Any, name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_this_machine() -> None:
    checks = examine()
    assert named(checks, "python").state == "ok"
    assert named(checks, "sdpa").state == "ok"
    assert named(checks, "configs").state == "ok"
    assert {check.group for check in checks} >= {"system", "device", "attention", "models", "remote"}
    for check in checks:
        assert config.load(Check, config.dump(check)) == check
        assert check.state == "ok" or check.found


@pytest.mark.parametrize(
    ("torch", "ram", "expected"),
    [
        (machine(), 8, "needs about 67 GiB in memory, 8.0 GiB are free"),
        (machine(), 100, "would run"),
        (machine(cuda=1, free=80), 8, "would run"),
        (machine(cuda=2, free=30), 8, "would run with --offload model"),
        (machine(cuda=1, free=8), 64, "would run with --offload sequential (slow), or try --quantize nf4"),
        (machine(cuda=1, free=8), 8, "needs about 34 GiB on the accelerator, 8.0 GiB are free"),
        (machine(mps=True), 64, "would run"),
    ],
)
def test_what_would_run(monkeypatch: pytest.MonkeyPatch, torch: Any, ram: float, expected: str) -> None:
    monkeypatch.setattr(doctor, "ram", lambda: int(ram * GIB))
    monkeypatch.setattr(doctor, "free_ram", lambda: int(ram * GIB))
    assert named(doctor._models(torch), "backbone flux-kontext").found == f"not downloaded; {expected}"


def test_what_fits_into_which_card() -> None:
    checks = list(doctor._memory(machine()))
    assert named(checks, "flux-kontext, 48 GiB").found.startswith("--offload stages (peak ")
    assert named(checks, "qwen-image-edit, 16 GiB").found.startswith(
        "--offload model --quantize nf4 planner.quantize=nf4"
    )
    assert "14.7 x 8832 x 3072 x 2 B" in named(checks, "flux-kontext").found
    here = named(doctor._memory(machine(cuda=1, free=140)), "flux-kontext, here")
    assert (here.state, here.found.split(" (peak")[0]) == ("ok", "(none)")
    assert named(doctor._memory(machine(cuda=1, free=2)), "flux-kontext, here").state == "absent"


def test_weights_that_are_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    here, gone = Model("planner mini", str(tmp_path), "config.json", 0, 0), Model("x", str(tmp_path), "no", 0, 0)
    monkeypatch.setattr(doctor, "models", lambda: (here, gone))
    first, second = doctor._models(machine())
    assert (first.state, first.found) == ("ok", "would run")
    assert (second.state, second.fix) == ("broken", "pip install --force-reinstall replan")
    assert healthy([first])
    assert not healthy([first, second])


def test_gated_weights_say_how_to_get_them() -> None:
    fix = named(doctor._models(machine()), "backbone flux-kontext").fix
    assert fix is not None
    assert "hf auth login" in fix
    assert "hf download black-forest-labs/FLUX.1-Kontext-dev" in fix


def test_devices() -> None:
    assert named(doctor._device(machine()), "accelerator").state == "absent"
    two = list(doctor._device(machine(cuda=2, free=10)))
    assert [check.name for check in two] == ["cuda:0", "cuda:1", "cpu"]
    assert "a GPU, 10.0 GiB of 80.0 GiB free, bfloat16" in two[0].found
    assert named(doctor._device(machine(mps=True)), "mps").state == "ok"


def test_packages_against_our_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "requirements", lambda extra: [("torch", ">=2.11"), ("numpy", ">=1.26"), ("rich", ">=14")]
    )
    versions = {"replan": "0.1.0", "torch": "2.13.0+cpu", "numpy": "1.0"}
    monkeypatch.setattr(doctor, "installed", versions.get)
    torch, numpy, rich = doctor._packages()
    assert (torch.state, numpy.state, rich.state) == ("ok", "broken", "broken")
    assert numpy.fix == "pip install 'numpy>=1.26'"


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "metadata_extras", lambda: ["remote"])
    monkeypatch.setattr(doctor, "requirements", lambda extra: [("openai", ""), ("google-genai", "")])
    monkeypatch.setattr(doctor, "installed", {"openai": "2"}.get)
    (check,) = doctor._extras()
    assert (check.state, check.found, check.fix) == ("absent", "missing: google-genai", "pip install 'replan[remote]'")


def test_secrets_are_named_but_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    checks = list(doctor._remote())
    assert named(checks, "OPENAI_API_KEY").found == "set"
    assert "sk-very-secret" not in repr(checks)


def test_a_broken_torch_is_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Check("device", "torch", "broken", "cannot be imported: no libc", "pip install torch")
    monkeypatch.setattr(doctor, "_torch", lambda: broken)
    checks = examine()
    assert checks[-1] == broken
    assert not healthy(checks)
