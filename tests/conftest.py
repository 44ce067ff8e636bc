"""Tiny models, made once per test run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxKontextPipeline; a token covers 4 pixels."""
    import tiny

    return tiny.flux_kontext(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QwenImageEditPipeline; a token covers 8 pixels."""
    import tiny
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline

    return tiny.qwen_image_edit(tmp_path_factory.mktemp("qwen"), QwenImageEditPipeline)


@pytest.fixture(scope="session", params=[False, True], ids=["2509", "2511"])
def plus_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A QwenImageEditPlusPipeline, without and with zero_cond_t."""
    import tiny
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import QwenImageEditPlusPipeline

    return tiny.qwen_image_edit(tmp_path_factory.mktemp("plus"), QwenImageEditPlusPipeline, zero_cond_t=request.param)


def pytest_configure() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and children would inherit that: tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
