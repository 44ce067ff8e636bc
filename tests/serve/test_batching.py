"""Micro-batching with real weights: fewer forwards, the same pictures up to rounding, and the answer says so."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import numpy as np
import pytest
from servants import setup, until

from replan import Editor, EditRequest
from replan.edit import BESIDE
from replan.mini.report import items
from replan.mini.scenes import draw
from replan.serve.client import ClientConfig, EditClient
from replan.serve.editing import EditEngine
from replan.serve.editor import editor_service
from replan.serve.limits import Limits
from replan.serve.run import running
from replan.types import Box, Edit, Plan, Region, Size

PLAN = Plan("", "keep the rest", (Region(Box(0, 0, 40, 40), "a red cup"),), Size(96, 96))
SEEDS = range(8)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_group_of_seeds(batch: int):
    made = replace(setup("steps=2"), planner=None)
    limits = Limits(batch=batch)
    image = draw(items("dev", 1)[0].scene)
    editor = Editor.load("mini", None, config=made.config)

    async def ask(url: str) -> list[Edit]:
        client = EditClient(url, ClientConfig(timeout=60))
        edits = await asyncio.gather(*(client.acall(EditRequest(image, "", seed, PLAN)) for seed in SEEDS))
        await client.aclose()
        return edits

    with running(editor_service(EditEngine(made, limits), limits)) as url:
        until(lambda: httpx.get(url + "/ready").status_code == 200, 400)
        edits = asyncio.run(ask(url))
    shared = [edit for edit in edits if BESIDE in edit.notes]
    assert bool(shared) == (batch > 1)
    for seed, edit in zip(SEEDS, edits, strict=True):
        alone = editor(EditRequest(image, "", seed, PLAN)).image
        if BESIDE in edit.notes:
            assert np.abs(np.asarray(edit.image, int) - np.asarray(alone, int)).max() <= 2
        else:
            assert edit.image.tobytes() == alone.tobytes()
