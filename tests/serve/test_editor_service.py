"""The editor over HTTP: what it answers, what it refuses and how, and that nobody's absence keeps it busy."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from fakes import FakePlanner, picture, plan_for
from PIL import Image
from servants import Servant, body, in_thread, service, setup, until

from replan import Editor, EditRequest
from replan import plan as plans
from replan.errors import ConfigError
from replan.serve import wire
from replan.serve.editing import EditEngine
from replan.serve.editor import editor_service
from replan.serve.limits import Limits
from replan.serve.run import running


@pytest.fixture(scope="module")
def servant() -> Servant:
    return Servant()


@pytest.fixture(scope="module")
def url(servant: Servant) -> Iterator[str]:
    with service(servant) as address:
        yield address


def post(url: str, path: str = "/v1/edits", **changes: object) -> httpx.Response:
    content = json.dumps(body(**changes))  # httpx's own encoder refuses what a careless client may send
    return httpx.post(url + path, content=content, headers={"content-type": "application/json"}, timeout=30)


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    reply = wire.ErrorReply.model_validate_json(response.content)
    told = reply.error
    assert reply.detail == told.message
    assert len(response.content) < 3000
    assert "Traceback" not in response.text
    return response.status_code, told.type, told.field


def pixels(reply: httpx.Response) -> bytes:
    return wire.decode(reply.json()["image"], 10_000).tobytes()


def test_the_edit_is_the_one_that_the_editor_makes(url: str):
    plan = plan_for(picture())
    reply = post(url, plan=plans.to_json(plan), id="call-1")
    assert reply.status_code == 200
    answer = wire.EditReply.model_validate_json(reply.content)
    alone = Editor(FakePlanner(), Servant(), setup().config)(EditRequest(picture(), "make it red", 3, plan))
    assert pixels(reply) == alone.image.tobytes()
    assert (answer.id, answer.seed, answer.notes) == ("call-1", 3, [])
    assert plans.from_json(answer.plan) == plan
    assert set(answer.timings) == {"queue", "load", "plan", "condition", "sample", "decode"}


def test_the_same_call_gives_the_same_bytes_and_another_seed_others(url: str):
    first, again, other = post(url), post(url), post(url, seed=4)
    assert pixels(first) == pixels(again) != pixels(other)


def test_the_picture_that_was_sent_does_not_come_back(url: str):
    sent = body()["image"]
    for reply in (post(url), post(url, seed="none"), post(url, image=sent[:-40]), post(url, unknown=1)):
        assert sent[100:200] not in reply.text


def test_settings_of_a_call(url: str, servant: Servant):
    servant.steps = 0
    assert post(url, settings={"steps": 5, "mask.expand": 0.1}).status_code == 200
    assert servant.steps == 5
    assert servant.now[2].mask.expand == 0.1
    rules = [{"until": 1.0, "rows": ["hint 1: +region 1"]}]
    assert post(url, settings={"mask.rules": rules, "negative_prompt": "/etc, blurry."}).status_code == 200
    assert servant.now[2].mask.rules[0].rows == ("hint 1: +region 1",)
    post(url, baseline=True)
    assert servant.plans[-1] is None


def test_planning_that_fails_edits_by_the_instruction_unless_strict(url: str):
    reply = post(url, instruction="nonsense")
    assert "planning failed" in reply.json()["notes"][0]
    assert error(post(url, instruction="nonsense", strict=True)) == (422, "invalid", "plan")
    assert error(post(url, instruction="outage"))[:2] == (503, "unavailable")  # the planner's outage is no bad plan


BAD_REGION = {"version": 1, "size": [32, 24], "prompt": "x", "regions": [{"box": [0, 0, 9], "hint": "a"}]}


@pytest.mark.parametrize(
    ("changes", "status", "field"),
    [
        ({"image": None}, 422, "image"),
        ({"image": "not base64!"}, 422, "image"),
        ({"image": base64.b64encode(b"no picture").decode()}, 422, "image"),
        ({"image": wire.encode(picture())[:120]}, 422, "image"),
        ({"image": wire.encode(Image.new("RGB", (101, 100)))}, 413, "image"),
        ({"image": wire.encode(Image.new("RGB", (2, 2)))}, 422, "image"),
        ({"extra_images": ["AAAA"]}, 422, "extra_images.0"),
        ({"instruction": " "}, 422, "instruction"),
        ({"instruction": "x" * 5000}, 422, "instruction"),
        ({"seed": -1}, 422, "seed"),
        ({"seed": "7"}, 422, "seed"),
        ({"version": 2}, 422, "version"),
        ({"id": "../x"}, 422, "id"),
        ({"plan": BAD_REGION}, 422, "plan"),
        ({"plan": {"version": 1, "size": [500, 24], "prompt": "x"}}, 422, "plan"),
        ({"settings": {"stepps": 3}}, 422, "settings"),
        ({"settings": {"steps": 11}}, 422, "settings"),
        ({"settings": {"max_area": 10**9}}, 422, "settings"),
        ({"settings": {"max_area": 96 * 96 + 1}}, 422, "settings"),  # it is the work that is bounded, not the picture
        ({"settings": {"mask.rules": [{"until": 1.0, "rows": ["main: +main"] * 20_000}]}}, 422, "settings"),
        ({"settings": {"mask.rules": [{"until": 1.0, "rows": ["hint " + "9" * 5000 + ": +main"]}]}}, 422, "settings"),
        ({"settings": {"negative_prompt": "\ud800" * 3000}}, 422, "settings"),
        ({"plan": {"version": 1, "size": [32, 24], "prompt": "x" * 100_000}}, 422, "plan"),
        ({"settings": {"speed": "/etc/passwd"}}, 422, "settings"),
        ({"settings": {"speed": "own.yaml"}}, 422, "settings"),
        ({"settings": {"mask": {"rules": "../rules.yaml"}}}, 422, "settings"),
        ({"timeout": 0}, 422, "timeout"),
        ({"instructions": "x"}, 422, "instructions"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_field_is_named(url: str, servant: Servant, changes: dict, status: int, field: str):
    before = len(servant.requests)
    assert error(post(url, **changes))[::2] == (status, field)
    assert len(servant.requests) == before


def test_messages_say_what_would_be_right(url: str):
    assert "did you mean steps" in post(url, settings={"stepps": 3}).json()["detail"]
    assert "at most 10" in post(url, settings={"steps": 11}).json()["detail"]


def test_bodies_that_are_none(url: str):
    assert error(httpx.post(url + "/v1/edits", content=b"{")) == (422, "invalid", "body")
    is_json = {"content-type": "application/json"}
    assert error(httpx.post(url + "/v1/edits", content=b"{", headers=is_json)) == (422, "invalid", "body")
    assert error(httpx.post(url + "/v1/edits", content=b"x" * 500_000)) == (413, "too_large", "body")
    assert error(httpx.get(url + "/v1/edits"))[:2] == (405, "unknown")
    assert error(httpx.get(url + "/../etc/passwd"))[:2] == (404, "unknown")


def test_a_body_without_a_length_is_measured_while_it_comes(url: str):
    pieces = (b"x" * 50_000 for _ in range(20))
    assert error(httpx.post(url + "/v1/edits", content=pieces)) == (413, "too_large", "body")


def test_a_page_of_another_site_may_not_use_it(url: str):
    for path in ("/v1/edits", "/edit-upload"):
        response = httpx.post(url + path, json=body(), headers={"sec-fetch-site": "cross-site"})
        assert response.status_code == 403
    assert "access-control-allow-origin" not in httpx.get(url + "/ready", headers={"origin": "http://x"}).headers


def test_an_unforeseen_error_says_nothing_of_the_inside():
    def crash(request: EditRequest) -> None:
        if request.seed == 13:
            raise AssertionError("secret /home/someone")

    with service(Servant(crash)) as url:
        response = post(url, seed=13)
        assert error(response)[:2] == (500, "failed")
        assert "secret" not in response.text
        assert post(url).status_code == 200  # the worker lives on


def test_live_and_ready_are_different():
    loading, broken = threading.Event(), {}

    def open_editor() -> Editor:
        loading.wait(20)
        if broken:
            raise OSError("no weights in /home/someone/models")
        return Editor(FakePlanner(), Servant(), setup().config)

    def states(url: str) -> tuple[int, int, str]:
        live, ready, health = (httpx.get(url + path) for path in ("/live", "/ready", "/health"))
        return live.status_code, ready.status_code, health.json()["status"]

    for is_broken, end in ((False, (200, 200, "ready")), (True, (503, 503, "failed"))):
        loading.clear()
        broken.update({"broken": True} if is_broken else {})
        limits = Limits(queue=2)
        with running(editor_service(EditEngine(setup(), limits, open_editor), limits)) as url:
            assert states(url) == (200, 503, "loading")
            early = post(url)
            assert error(early)[:2] == (503, "loading")
            assert int(early.headers["retry-after"]) > 0
            loading.set()
            until(lambda url=url, end=end: states(url) == end)
            if is_broken:
                assert error(post(url))[:2] == (503, "failed")
                told = "".join(httpx.get(url + path).text for path in ("/live", "/ready")) + post(url).text
                assert "/home" not in told
                assert "the log says why" in told


def test_the_time_limit_covers_the_reading_of_a_call(monkeypatch: pytest.MonkeyPatch):
    read = EditEngine.read
    monkeypatch.setattr(EditEngine, "read", lambda self, call: (time.sleep(1.0), read(self, call))[1])
    with service(Servant()) as address:
        start = time.monotonic()
        assert error(post(address, timeout=0.2))[:2] == (504, "timeout")
        assert time.monotonic() - start < 0.9


def test_only_limits_that_can_be_kept():
    with pytest.raises(ConfigError, match="max_pixels = 200000000: must be 178956970 or less"):
        Limits(max_pixels=200_000_000)


def test_ready_only_when_the_model_has_answered():
    answered: list[EditRequest] = []

    def fails_once_asked(request: EditRequest) -> None:
        answered.append(request)
        raise OSError("the weights load, but the model does not run")

    engine = EditEngine(setup(), Limits(), lambda: Editor(FakePlanner(), Servant(fails_once_asked), setup().config))
    with running(editor_service(engine, Limits())) as url:
        until(lambda: httpx.get(url + "/health").json()["status"] == "failed")
        assert httpx.get(url + "/ready").status_code == 503
    assert len(answered) == 1


def test_a_full_queue_is_a_429_that_says_when_to_come_back():
    servant = Servant()
    with service(servant, Limits(queue=2)) as url:
        servant.gate.clear()
        waiting = [in_thread(lambda seed=seed: post(url, seed=seed)) for seed in range(3)]  # one runs, two wait
        until(lambda: httpx.get(url + "/status").json()["pending_tasks"] == 3)
        full = post(url)
        assert error(full)[:2] == (429, "busy")
        assert int(full.headers["retry-after"]) >= 1
        assert httpx.get(url + "/ready").status_code == 200  # full is not broken
        servant.gate.set()
        for thread, results in waiting:
            thread.join(20)
            assert results[0].status_code == 200
        assert post(url).status_code == 200


def test_a_timeout_stops_the_work_within_a_step():
    servant = Servant()
    with service(servant) as url:
        servant.gate.clear()
        assert error(post(url, timeout=0.2, settings={"steps": 10})) == (504, "timeout", "timeout")
        assert servant.steps == 1
        servant.gate.set()
        assert post(url).status_code == 200  # 3 steps
        assert servant.steps == 1 + 3  # nothing more was done for the first


def test_a_client_that_hangs_up_frees_the_worker_within_a_step():
    servant = Servant()
    with service(servant) as url:
        servant.gate.clear()

        async def hang_up() -> None:
            async with httpx.AsyncClient() as client:
                task = asyncio.create_task(client.post(url + "/v1/edits", json=body(settings={"steps": 10})))
                assert await asyncio.to_thread(servant.stepping.wait, 20)
                task.cancel()
                await asyncio.wait([task])

        asyncio.run(hang_up())
        until(lambda: "replan_inside 0.0" in httpx.get(url + "/metrics").text)
        servant.gate.set()
        assert post(url).status_code == 200
        assert servant.steps == 1 + 3


def test_who_hangs_up_in_the_middle_of_a_request_has_made_no_mistake():
    with service(Servant()) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as line:
            line.sendall(b"POST /v1/edits HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        until(lambda: 'route="/v1/edits",status="499"' in httpx.get(url + "/metrics").text)
        assert 'status="400"' not in httpx.get(url + "/metrics").text
        assert "replan_inside 0.0" in httpx.get(url + "/metrics").text


def test_who_hangs_up_while_waiting_is_never_begun():
    servant = Servant()
    with service(servant) as url:
        servant.gate.clear()
        thread, results = in_thread(lambda: post(url, seed=1))
        assert servant.stepping.wait(20)
        assert error(post(url, seed=2, timeout=0.1))[0] == 504
        servant.gate.set()
        thread.join(20)
        assert results[0].status_code == 200
        assert [request.seed for request in servant.requests] == [1]


def test_planning_stops_too():
    stopped: list[bool] = []

    class Slow(FakePlanner):
        def stream(self, request: EditRequest, on_text):
            for _ in range(200):
                if request.seed == 9 and not on_text("..."):
                    stopped.append(True)
                    break
                if request.seed == 9:
                    threading.Event().wait(0.02)
            return self(request)

    servant = Servant()
    with service(servant, planner=Slow()) as url:
        assert error(post(url, seed=9, timeout=0.2))[0] == 504
        assert post(url).status_code == 200
    assert stopped == [True]
    assert [request.seed for request in servant.requests] == [3]


def test_the_same_id_is_done_once(url: str, servant: Servant):
    before = len(servant.requests)
    first, again = post(url, id="twice"), post(url, id="twice")
    assert first.json()["image"] == again.json()["image"]
    assert len(servant.requests) == before + 1
    assert error(post(url, id="twice", seed=9)) == (409, "conflict", "id")


def test_errors_have_the_shape_that_is_published(url: str):
    jsonschema = pytest.importorskip("jsonschema", reason="no validator of JSON schemas is installed")
    published = httpx.get(url + "/openapi.json").json()
    shape = {"$ref": "#/components/schemas/ErrorReply", "components": published["components"]}
    other_site = {"sec-fetch-site": "cross-site"}
    replies = [
        post(url, seed=-1), post(url, settings={"steps": 11}), post(url, instruction="outage"), httpx.get(url + "/x"),
        httpx.post(url + "/v1/edits", content=b"x" * 500_000), httpx.post(url + "/v1/edits", headers=other_site),
    ]  # fmt: skip
    assert [reply.status_code for reply in replies] == [422, 422, 503, 404, 413, 403]
    for reply in replies:
        error(reply)
        jsonschema.validate(reply.json(), shape)
    told = published["paths"]["/v1/edits"]["post"]["responses"]
    assert {"400", "403", "408", "409", "413", "422", "429", "499", "500", "503", "504"} <= set(told)


def test_an_error_has_the_id_of_its_call(url: str):
    for changes in ({"seed": -1}, {"settings": {"steps": 11}}, {"image": "AAAA"}, {"instruction": "outage"}):
        assert post(url, id="call-7", **changes).json()["error"]["id"] == "call-7"
        assert post(url, **changes).json()["error"]["id"] is None
    assert post(url, id="no id!").json()["error"]["id"] is None


def test_a_refusal_does_not_echo_what_was_sent(url: str):
    long = "x" * 50_000
    for changes in ({long: 1}, {"settings": {long: 1}}, {"settings": {"speed": long}}, {"plan": {long: long}}):
        assert len(post(url, **changes).content) < 2000


def test_a_timeout_inside_the_work_is_no_timeout_of_the_call():
    def inner(request: EditRequest) -> None:
        if request.seed == 13:
            raise TimeoutError("of a library")

    with service(Servant(inner)) as url:
        assert error(post(url, seed=13))[:2] == (500, "failed")


def test_metrics_tell_what_happened(url: str):
    post(url)
    post(url, seed=-1)
    page = httpx.get(url + "/metrics").text
    assert 'replan_requests_total{route="/v1/edits",status="200"}' in page
    assert 'replan_requests_total{route="/v1/edits",status="422"}' in page
    assert 'replan_stage_seconds_count{stage="sample"}' in page
    assert "replan_ready 1.0" in page
    httpx.get(url + "/a-name-that-someone-made-up")
    assert "made-up" not in httpx.get(url + "/metrics").text


def test_the_schema_is_published_with_examples_that_work(url: str):
    schema = httpx.get(url + "/openapi.json").json()
    assert {"/v1/edits", "/v1/images/generations", "/edit", "/edit-upload", "/health", "/status"} <= set(
        schema["paths"]
    )
    examples = schema["components"]["schemas"]["EditCall"]["examples"]
    assert len(examples) == 2
    with service(Servant(), Limits()) as open_to_all:
        others = {"Generation": "/v1/images/generations", "Wanted": "/edit"}
        calls = [("/v1/edits", example) for example in examples]
        calls += [(path, schema["components"]["schemas"][name]["examples"][0]) for name, path in others.items()]
        assert [httpx.post(open_to_all + path, json=call).status_code for path, call in calls] == [200] * 4
    assert httpx.get(url + "/docs").status_code == 200
    about = wire.About.model_validate(httpx.get(url + "/v1/about").json())
    assert about.service == "editor"
    assert about.limits["queue"] == 2


def test_it_listens_on_loopback_only(url: str):
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", int(url.rpartition(":")[2]))) != 0
