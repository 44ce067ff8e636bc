"""Replicas on Ray Serve: the same app, and a killed replica costs a retry, not a result."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from servants import setup, until

from replan.edit import Editor
from replan.serve import wire
from replan.serve.client import ClientConfig, EditClient
from replan.serve.cluster import Cluster, running
from replan.serve.limits import Limits
from replan.serve.run import free_port
from replan.types import Box, EditRequest, Plan, Region, Size

pytest.importorskip("ray", reason="ray is not installed: pip install replan[serve]")
pytestmark = pytest.mark.slow  # Ray and two replicas take a minute to start
PLAN = Plan("", "keep the rest", (Region(Box(0, 0, 40, 40), "a red cup"),), Size(96, 96))
LONG = {"steps": 40}  # many steps, so that a replica can be killed in the middle
PATIENT = ClientConfig(timeout=120, backoff=0.1, longest_wait=1)


def load_test() -> ModuleType:
    """The load test's way to find the replicas' processes."""
    path = Path(__file__).parents[2] / "scripts" / "load_test.py"
    spec = importlib.util.spec_from_file_location("load_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["load_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from dataclasses import replace

    made = replace(setup("steps=2"), planner=None)
    with running(made, Limits(queue=3), Cluster(2, port=free_port("127.0.0.1"), gpus=0, cpus=0.5)) as address:
        yield address


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    """With as many threads as Ray gives a replica of half a CPU: the last bits hang on their number."""
    from dataclasses import replace

    import torch

    made, threads = setup("steps=2"), torch.get_num_threads()
    torch.set_num_threads(1)
    yield Editor.load("mini", None, config=replace(made.config, **LONG))
    torch.set_num_threads(threads)


def asked(seed: int) -> EditRequest:
    from replan.mini.report import items
    from replan.mini.scenes import draw

    return EditRequest(draw(items("dev", 1)[0].scene), "", seed, PLAN)


def test_the_same_app_and_a_killed_replica_costs_a_retry(url: str, editor: Editor):
    pids = load_test().replicas
    assert httpx.get(url + "/ready").json() == {"ready": True}
    assert httpx.get(url + "/status").json()["active_workers"] == 2
    first = set(pids(os.getpid()))
    assert len(first) == 2

    async def killed() -> list[bytes]:
        client = EditClient(url, PATIENT, LONG)
        tasks = [asyncio.create_task(client.acall(asked(seed))) for seed in (1, 2, 3, 4)]  # two in each replica
        await asyncio.to_thread(until, lambda: "replan_inside 4.0" in httpx.get(url + "/metrics").text)
        await asyncio.sleep(0.5)
        os.kill(min(first), signal.SIGKILL)
        edits = await asyncio.gather(*tasks)
        await client.aclose()
        return [edit.image.tobytes() for edit in edits]

    assert asyncio.run(killed()) == [editor(asked(seed)).image.tobytes() for seed in (1, 2, 3, 4)]
    until(lambda: len(set(pids(os.getpid())) - first) == 1, 200)  # Ray starts another


def test_what_is_too_much_is_refused_and_the_rest_answered_once(url: str):
    async def crowd() -> list[httpx.Response]:
        call = {"image": wire.encode(asked(0).image), "plan": wire_plan(), "settings": {"steps": 20}}
        async with httpx.AsyncClient(timeout=120) as client:
            return await asyncio.gather(
                *(client.post(url + "/v1/edits", json=call | {"seed": seed}) for seed in range(12))
            )

    responses = asyncio.run(crowd())
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429}
    assert 2 <= statuses.count(200) <= 7  # 3 in the queue, 2 in each replica
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "busy"
    answered = [response.json()["seed"] for response in responses if response.status_code == 200]
    assert len(set(answered)) == len(answered)


def test_mistakes_and_timeouts_come_through(url: str):
    call = {"image": wire.encode(asked(0).image), "plan": wire_plan()}
    bad = httpx.post(url + "/v1/edits", json=call | {"settings": {"stepps": 2}})
    assert (bad.status_code, bad.json()["error"]["field"]) == (422, "settings")
    late = httpx.post(url + "/v1/edits", json=call | {"settings": {"steps": 100}, "timeout": 0.1}, timeout=60)
    assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout")
    assert httpx.post(url + "/v1/edits", json=call, timeout=60).status_code == 200


def test_a_client_that_hangs_up_leaves_its_place(url: str):
    async def hang_up() -> None:
        client = EditClient(url, PATIENT, {"steps": 100})
        task = asyncio.create_task(client.acall(asked(1)))
        await asyncio.to_thread(until, lambda: "replan_inside 1.0" in httpx.get(url + "/metrics").text)
        task.cancel()
        await asyncio.wait([task])
        await client.aclose()

    asyncio.run(hang_up())
    until(lambda: "replan_inside 0.0" in httpx.get(url + "/metrics").text)


def wire_plan() -> dict:
    from replan import plan as plans

    return plans.to_json(PLAN)
