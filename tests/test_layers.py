"""The shape of the package: imports point down, ceilings hold, importing it does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "replan"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top down. A module imports from its own line and from lines below it.
LAYERS = (
    ("__main__",),
    (
        *("cli", "run_replan", "demo", "mini.train_autoencoder", "mini.train_editor", "mini.train_planner"),
        *("mini.train_qwen_autoencoder", "mini.train_qwen_editor"),
    ),
    (
        *("eval", "train", "think", "serve", "batch", "doctor", "memory", "bench"),
        *("mini.training", "mini.table", "mini.report", "mini.ways", "mini.sheet"),
    ),
    ("record",),
    ("edit",),
    ("backbones",),
    ("processors", "planner", "judge"),
    ("attention", "cascade"),
    (
        *("chat", "draw", "background", "mask", "denoise", "plan", "regions", "rules", "presets", "speed", "images"),
        *("config", "hub", "mini"),
    ),
    ("types", "errors"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
NO_TORCH = (
    "types",
    "errors",
    "config",
    "plan",
    "regions",
    "rules",
    "images",
    "planner",
    "backbones",
    "cli",
    "run_replan",
)
# `doctor` asks the command line for the name of the released planner when it runs, not when it is imported
UPWARD = {("doctor", "cli")}


def module(path: Path) -> str:
    """The dotted name of a file under replan, such as `mini.scenes`; empty for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def placed(name: str) -> str | None:
    """The longest part of a dotted name that has a place in LAYERS."""
    while name and name not in LEVEL:
        name = name.rpartition(".")[0]
    return name or None


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name under replan, line) of every import of replan in a file, lazy ones and those for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("replan."):
                yield name.removeprefix("replan."), node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = placed(module(path))
    if path == PACKAGE / "__init__.py":
        return
    assert own, f"{path}: give {module(path)} a place in LAYERS"
    for name, line in imports(path):
        other = placed(name)
        if other is None:  # a name of replan/__init__.py, such as __version__
            first = PACKAGE / name.partition(".")[0]
            assert not first.is_dir(), f"{path}:{line}: give {name} a place in LAYERS"
            assert not first.with_suffix(".py").is_file(), f"{path}:{line}: give {name} a place in LAYERS"
            continue
        assert LEVEL[other] >= LEVEL[own] or (own, other) in UPWARD, f"{path}:{line}: {own} must not import {name}"


def test_the_judge_never_imports_the_editor() -> None:
    for path in PACKAGE.glob("judge/**/*.py"):
        assert "edit" not in {placed(name) for name, _ in imports(path)}, path


def test_file_names() -> None:
    banned = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
    assert [path for path in FILES if path.stem in banned or path.parent.name in banned] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ceilings(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES, f"{path}: more than {FILE_LINES} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where = f"{path}:{node.lineno} {node.name}"
        assert _lines(node) <= FUNCTION_LINES, f"{where}: {_lines(node)} lines"
        if placed(module(path)) == "cli":  # a verb's parameters are its options: typer reads them from the signature
            continue
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        assert count <= PARAMETERS, f"{where}: {count} parameters"


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_errors_are_caught_by_name(path: Path) -> None:
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or (
            isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
        )
        reason = "#" in lines[node.lineno - 1] or any(isinstance(inner, ast.Raise) for inner in node.body)
        assert not broad or reason, (
            f"{path}:{node.lineno}: a broad except needs its reason beside it, or must raise again"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_at_import(path: Path) -> None:
    """Module level holds definitions, constants and imports; calls that change the process do not belong there."""
    forbidden = (
        "manual_seed",
        "set_default_device",
        "basicConfig",
        "setdefault",
        "putenv",
        "init_process_group",
        "set_num_threads",
    )
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            assert name not in forbidden, f"{path}:{node.lineno}: {name} at import"


def _fresh(code: str) -> str:
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_import_replan_does_nothing() -> None:
    code = """
import os, random, signal, sys, threading, warnings
def state():
    handler = signal.getsignal(signal.SIGINT)
    return dict(os.environ), random.getstate(), sys.path[:], handler, warnings.filters[:], os.getcwd()
before = state()
import replan
assert before == state()
assert threading.active_count() == 1
heavy = {"torch", "numpy", "PIL", "diffusers", "transformers", "typer", "pydantic", "yaml"} & set(sys.modules)
assert not heavy, heavy
print(sorted(name for name in sys.modules if name.startswith("replan")))
"""
    assert _fresh(code) == "['replan']"


@pytest.mark.parametrize("name", NO_TORCH)
def test_light_modules_load_no_torch(name: str) -> None:
    code = f"import replan.{name}, sys; print({{'torch', 'diffusers', 'transformers'}} & set(sys.modules))"
    assert _fresh(code) == "set()"


def test_public_names() -> None:
    code = "import replan; [getattr(replan, name) for name in replan.__all__]; print(replan.Editor.__name__)"
    assert _fresh(code) == "Editor"
