"""What is not imported costs nothing: modules that help and an edit must do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from replan.mini.report import items
from replan.mini.scenes import draw

# Parts of extras, other verbs' needs, and torch's heavier corners
NEVER = {
    "datasets", "pandas", "pyarrow", "matplotlib", "sklearn", "torchmetrics", "gradio", "fastapi", "uvicorn",
    "openai", "google.genai", "playwright", "pytest", "trl", "vllm", "torchao", "bitsandbytes", "gguf", "tensorboard",
    "torch._inductor.compile_fx", "torch.utils.tensorboard", "onnx", "IPython",
}  # fmt: skip
LIGHT = NEVER | {
    "torch", "numpy", "PIL", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "yaml",
    "httpx", "tenacity", "jinja2", "requests",
}  # fmt: skip
CODE = """
import sys
from replan.cli import main
sys.argv = ["replan", *sys.argv[1:]]
try:
    main()
finally:
    print("modules:", *sorted(sys.modules))
"""


def modules(*words: str) -> set[str]:
    """What a fresh `replan ...` has imported when it ends."""
    run = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("verb", ["plan", "edit", "bench"])
def test_help_imports_nothing_heavy(verb: str) -> None:
    found = modules(verb, "--help")
    assert "typer" in found
    assert found & LIGHT == set()
    assert len(found) < 500
    assert {name for name in found if name.startswith("replan.cli.")} <= {
        f"replan.cli.{name}" for name in (verb, "console", "failures", "options", "page")
    }  # no other verb


def test_an_edit_of_the_mini_models_imports_nothing_it_does_not_need(tmp_path: Path) -> None:
    item = items("dev", 1)[0]
    draw(item.scene).save(tmp_path / "in.png")
    found = modules("edit", str(tmp_path / "in.png"), item.instruction, "-o", str(tmp_path / "out.png"), "steps=2")
    assert "diffusers.pipelines.flux.pipeline_flux_kontext" in found
    assert found & NEVER == set()
    assert not [
        name for name in found if name.startswith(("replan.eval", "replan.demo", "replan.train", "replan.bench"))
    ]
    assert (tmp_path / "out.png").is_file()
