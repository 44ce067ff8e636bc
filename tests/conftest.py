"""Tiny models and the browser, made once per test run."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in the browser come last: its driver keeps an event loop running, in which asyncio.run() would refuse."""
    items.sort(key=lambda item: "browser" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install replan[dev]")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("REPLAN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        yield chromium
        chromium.close()
