"""The judge over HTTP: the scores of the judge itself, and never a score where there was none."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from PIL import Image
from servants import until

from replan.errors import JudgeError, ServiceError
from replan.judge import DIMENSIONS, Case, Dimension, Rating, Unscored, load_judge
from replan.mini.rows import item_of, rows
from replan.mini.scenes import draw
from replan.serve import wire
from replan.serve.client import ClientConfig, JudgeClient
from replan.serve.judge import JudgeEngine, judge_service
from replan.serve.limits import Limits
from replan.serve.run import judge_app, running

QUICK = ClientConfig(timeout=10, retries=2, backoff=0.01, longest_wait=0.05)


def case(number: int = 0, result: str = "target") -> Case:
    row = list(rows("dev", number + 1))[number]
    extra = json.loads(row["extra_info"])
    item = item_of(extra)
    assert item is not None
    pictures = {"target": item.target, "source": item.scene}
    return Case(number, item.instruction, "", lambda: draw(item.scene), lambda: draw(pictures[result]), "a", "b", extra)


class Moody:
    """A judge whose mood is set by the test."""

    def __init__(self) -> None:
        self.mood = "fine"
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def describe(self) -> Mapping[str, Any]:
        return {"name": "moody-1", "model": "moody", "temperature": 0.0, "prompts": {"target": "p"}}

    def key(self, case: Case, dimension: Dimension) -> str | None:
        return "k"

    def estimate(self, case: Case, dimension: Dimension) -> tuple[int, int]:
        return 10, 5

    def rate(self, case: Case, dimension: Dimension) -> Rating:
        self.asked.append(dimension.name)
        assert self.gate.wait(20)
        if self.mood == "down":
            raise JudgeError("the judge at 10.0.0.7 does not answer")
        if self.mood == "dumb" and dimension.name == "effect":
            raise Unscored("no JSON", 7, 3)
        return Rating(5, "fine", "moody", 10, 5)

    def stop(self) -> None:
        self.gate.set()


@pytest.fixture(scope="module")
def mini() -> Iterator[JudgeClient]:
    with running(judge_app(load_judge("mini"))) as url, JudgeClient(url, QUICK) as judge:
        judge.wait_ready(20)
        yield judge


@pytest.fixture
def moody() -> Iterator[tuple[Moody, JudgeClient, str]]:
    judge = Moody()
    with running(judge_app(judge, Limits(queue=2), threads=1)) as url, JudgeClient(url, QUICK) as client:
        client.wait_ready(20)
        judge.asked.clear()
        yield judge, client, url


@pytest.mark.parametrize("result", ["target", "source"])
def test_the_scores_of_the_judge_itself(mini: JudgeClient, result: str):
    judge, asked = load_judge("mini"), case(1, result)
    for dimension in DIMENSIONS.values():
        assert mini.rate(asked, dimension) == judge.rate(asked, dimension)
    everything = {name: judge.rate(asked, dimension) for name, dimension in DIMENSIONS.items()}
    assert mini.rate_all(asked) == everything
    assert asyncio.run(mini.arate_all(asked, ("effect", "target"))) == {
        name: everything[name] for name in ("effect", "target")
    }


def test_what_it_says_of_itself(mini: JudgeClient, moody: tuple[Moody, JudgeClient, str]):
    assert dict(mini.describe()) == dict(load_judge("mini").describe())
    assert mini.key(case(), DIMENSIONS["target"]) is None  # exact and free, as the judge itself says
    judge, client, _ = moody
    assert client.describe() == judge.describe()
    keys = {client.key(case(number), DIMENSIONS[name]) for number in (0, 1) for name in ("target", "effect")}
    assert len(keys) == 4
    assert None not in keys


def test_a_case_without_a_usable_score_stays_without(mini: JudgeClient, moody: tuple[Moody, JudgeClient, str]):
    grey = Image.new("RGB", (96, 96), "grey")
    stranger = Case(0, "x", "", lambda: grey, lambda: grey, "", "")
    with pytest.raises(Unscored, match=r"mini\.seed"):
        mini.rate(stranger, DIMENSIONS["target"])
    judge, client, url = moody
    judge.mood = "dumb"
    ratings = client.rate_all(case(), ("target", "effect"))
    unscored = ratings["effect"]
    assert isinstance(ratings["target"], Rating)
    assert isinstance(unscored, Unscored)
    assert (str(unscored), unscored.tokens_in, unscored.tokens_out) == ("no JSON", 7, 3)
    raw = httpx.post(url + "/v1/verdicts", json=call(dimensions=["effect"])).json()
    assert "score" not in raw["scores"]["effect"]


def call(**changes: Any) -> dict[str, Any]:
    asked = case()
    fields = {"source": wire.encode(asked.source()), "result": wire.encode(asked.result()), "instruction": "x"}
    return fields | changes


def test_an_outage_is_no_score(moody: tuple[Moody, JudgeClient, str]):
    judge, client, url = moody
    judge.mood = "down"
    with pytest.raises(JudgeError, match="does not answer") as failed:
        client.rate(case(), DIMENSIONS["target"])
    assert isinstance(failed.value, ServiceError)
    assert not isinstance(failed.value, Unscored)
    assert judge.asked == ["target"] * 3  # tried again
    assert httpx.post(url + "/v1/verdicts", json=call()).status_code == 503
    judge.mood = "fine"
    assert client.rate(case(), DIMENSIONS["target"]).score == 5


def test_a_full_queue_and_a_timeout(moody: tuple[Moody, JudgeClient, str]):
    judge, client, url = moody
    judge.gate.clear()

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient() as http:
            tasks = [asyncio.create_task(http.post(url + "/v1/verdicts", json=call(), timeout=20)) for _ in range(3)]
            await asyncio.to_thread(until, lambda: httpx.get(url + "/status").json()["pending_tasks"] == 3)
            full = await http.post(url + "/v1/verdicts", json=call())
            assert full.status_code == 429
            assert "retry-after" in full.headers
            judge.gate.set()
            return await asyncio.gather(*tasks)

    assert [response.status_code for response in asyncio.run(crowd())] == [200, 200, 200]
    judge.gate.clear()
    judge.asked.clear()
    assert httpx.post(url + "/v1/verdicts", json=call(timeout=0.2), timeout=20).status_code == 504
    judge.gate.set()
    assert client.rate(case(), DIMENSIONS["quality"]).score == 5
    assert judge.asked == ["target", "quality"]  # after the timeout nothing more was asked for the first


@pytest.mark.parametrize(
    ("changes", "status", "field"),
    [
        ({"source": "AAAA"}, 422, "source"),
        ({"result": wire.encode(Image.new("RGB", (5000, 4000)))}, 413, "result"),
        ({"instruction": " "}, 422, "instruction"),
        ({"dimensions": []}, 422, "dimensions"),
        ({"dimensions": ["beauty"]}, 422, "dimensions.0"),
        ({"score": 5}, 422, "score"),
    ],
)
def test_a_bad_field_is_named(mini: JudgeClient, changes: dict, status: int, field: str):
    reply = httpx.post(mini.line.url + "/v1/verdicts", json=call(**changes), timeout=20)
    assert (reply.status_code, reply.json()["error"]["field"]) == (status, field)


def test_a_judge_that_is_down_at_the_start_is_waited_for():
    judge = Moody()
    judge.mood = "down"
    engine = JudgeEngine(judge, Limits())
    engine.local.again = 0.02
    with running(judge_service(engine, Limits())) as url:
        until(lambda: len(judge.asked) > 2)
        ready = httpx.get(url + "/ready")
        assert ready.status_code == 503
        assert "what is behind the service does not answer yet" in ready.json()["detail"]
        assert "10.0.0.7" not in ready.text
        assert "10.0.0.7" not in httpx.get(url + "/live").text
        assert "10.0.0.7" not in httpx.post(url + "/v1/verdicts", json=call()).text
        assert httpx.get(url + "/live").status_code == 200
        assert httpx.post(url + "/v1/verdicts", json=call()).status_code == 503
        judge.mood = "fine"
        until(lambda: httpx.get(url + "/ready").status_code == 200)


def test_the_schema_has_examples(mini: JudgeClient):
    schema = httpx.get(mini.line.url + "/openapi.json").json()
    (example,) = schema["components"]["schemas"]["JudgeCall"]["examples"]
    reply = httpx.post(mini.line.url + "/v1/verdicts", json=example)
    assert reply.status_code == 200
    assert set(reply.json()["scores"]) == {"target", "effect", "consistency"}
    for kind in (wire.EditReply, wire.JudgeReply, wire.ErrorReply):
        for shown in kind.model_json_schema()["examples"]:
            kind.model_validate(shown)


def test_a_score_is_on_the_published_scale():
    for score in (0, 6):
        with pytest.raises(ValueError, match="score"):
            wire.Scored(score=score)
