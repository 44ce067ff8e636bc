"""The clients: the same edit as in process, patient with outages, and typed errors for what does not pass."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from fakes import FakePlanner, picture, plan_for
from planner_server import Answer, Server, serve
from servants import Servant, in_thread, service, setup, until

from replan import Editor, EditRequest
from replan.errors import ConfigError, ImageError, JudgeError, PlanError, ServiceError
from replan.judge import DIMENSIONS, Case
from replan.serve import wire
from replan.serve.client import ClientConfig, EditClient, JudgeClient
from replan.serve.limits import Limits
from replan.types import Box, Edit, Plan, Region, Size

QUICK = ClientConfig(timeout=5, retries=3, backoff=0.01, longest_wait=0.05, patience=20)
GOOD = wire.EditReply(
    id="x", image=wire.encode(picture()), seed=3, plan=None, notes=["a note"], timings={"sample": 1.0}, model="mini"
).model_dump()
BUSY = Answer({"error": {"type": "busy", "message": "full", "field": None}}, 429, {"retry-after": "0"})


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as made:
        yield made


def request(**changes: object) -> EditRequest:
    return EditRequest(**{"image": picture(), "instruction": "make it red", "seed": 3} | changes)  # type: ignore[arg-type]


def test_an_edit_as_in_process():
    servant = Servant()
    with service(servant) as url, EditClient(url, QUICK) as edit:
        edit.wait_ready(5)
        for asked in (request(), request(plan=plan_for(picture())), request(seed=2**60)):
            alone = Editor(FakePlanner(), Servant(), setup().config)(asked)
            made = edit(asked)
            assert made.image.tobytes() == alone.image.tobytes()
            assert (made.plan, made.notes, made.request) == (alone.plan, alone.notes, asked)
            assert asyncio.run(edit.acall(asked)).image.tobytes() == alone.image.tobytes()
        assert EditClient(url, QUICK, {"steps": 1})(request()).timings
        assert servant.now[2].steps == 1


def test_many_at_once_from_threads_and_tasks():
    with service(Servant(), Limits(queue=16)) as url, EditClient(url, QUICK) as edit:

        async def many() -> list[Edit]:
            return await asyncio.gather(*(edit.acall(request(seed=seed)) for seed in range(8)))

        threads = [in_thread(lambda seed=seed: edit(request(seed=seed))) for seed in range(8)]
        tasks = asyncio.run(many())
        for seed, (thread, results) in enumerate(threads):
            thread.join(20)
            assert results[0].image.tobytes() == tasks[seed].image.tobytes()


@pytest.mark.parametrize("passing", [BUSY, Answer(status=503), Answer(b"<html>", 502), Answer(b"{", 200)])
def test_what_may_pass_is_tried_again_with_the_same_id(server: Server, passing: Answer):
    server.script = [passing, passing, Answer(GOOD)]
    with EditClient(server.url, QUICK) as edit:
        assert edit(request()).notes == ("a note",)
    assert len({body["id"] for body in server.bodies()}) == 1
    assert len(server.bodies()) == 3
    server.asked.clear()
    server.script = [passing, Answer(GOOD)]
    with EditClient(server.url, QUICK) as edit:
        assert asyncio.run(edit.acall(request())).notes == ("a note",)
    assert len(server.bodies()) == 2


def test_two_calls_have_two_ids(server: Server):
    server.script = [Answer(GOOD)]
    with EditClient(server.url, QUICK) as edit:
        edit(request())
        edit(request())
    assert len({body["id"] for body in server.bodies()}) == 2


def test_an_outage_that_lasts_is_a_service_error(server: Server):
    server.script = [Answer({"error": {"type": "failed", "message": "out of memory"}}, 503)]
    with EditClient(server.url, QUICK) as edit, pytest.raises(ServiceError, match="status 503: out of memory"):
        edit(request())
    assert len(server.asked) == 4


def test_nobody_there():
    edit = EditClient("http://127.0.0.1:1", QUICK)
    for call in (lambda: edit(request()), lambda: asyncio.run(edit.acall(request())), lambda: edit.wait_ready(0.1)):
        with pytest.raises(ServiceError, match=r"127\.0\.0\.1:1"):
            call()
    judge = JudgeClient("http://127.0.0.1:1", QUICK)
    with pytest.raises(JudgeError) as failed:
        judge.rate(Case(0, "x", "", picture, picture, "", ""), DIMENSIONS["target"])
    assert isinstance(failed.value, ServiceError)


def test_an_answer_that_comes_too_late(server: Server):
    server.script = [Answer(GOOD, delay=1)]
    slow = ClientConfig(timeout=0.1, retries=1, backoff=0.01)
    with EditClient(server.url, slow) as edit, pytest.raises(ServiceError, match=r"no answer within 0\.1 s"):
        edit(request())


def test_it_waits_as_long_as_the_service_asks_and_not_much_longer(server: Server):
    server.script = [Answer({}, 429, {"retry-after": "0.3"}), Answer(GOOD)]
    with EditClient(server.url, ClientConfig(backoff=0.01)) as edit:
        edit(request())
    assert 0.3 <= server.times[1] - server.times[0] < 0.3 + 0.3 + 2


def test_patience_ends(server: Server):
    server.script = [Answer(status=503)]
    config = ClientConfig(retries=10_000, backoff=0.01, longest_wait=0.02, patience=0.3)
    start = time.monotonic()
    with EditClient(server.url, config) as edit, pytest.raises(ServiceError):
        edit(request())
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("field", "kind"),
    [("plan", PlanError), ("settings", ConfigError), ("image", ImageError), ("body", ImageError), ("id", ConfigError)],
)
def test_a_refusal_is_not_an_outage_and_not_tried_again(server: Server, field: str, kind: type[Exception]):
    server.script = [Answer({"error": {"type": "invalid", "message": "no good", "field": field}}, 422)]
    with EditClient(server.url, QUICK) as edit, pytest.raises(kind, match=f"{field}: no good") as failed:
        edit(request())
    assert not isinstance(failed.value, ServiceError)
    assert len(server.asked) == 1


def test_refusals_of_the_real_service():
    far = Plan("", "x", (Region(Box(0, 0, 9, 9), "a"),), Size(500, 24))
    with service(Servant()) as url, EditClient(url, QUICK) as edit:
        with pytest.raises(PlanError, match="another shape"):
            edit(request(plan=far))
        with pytest.raises(ImageError, match="more than 10,000"):
            edit(request(image=picture(200, 200)))
        with pytest.raises(ConfigError, match="did you mean steps"):
            EditClient(url, QUICK, {"stepps": 1})(request())
        with pytest.raises(ConfigError, match="seed"):
            edit(request(seed=-1))
        with pytest.raises(PlanError):
            EditClient(url, QUICK, strict=True)(request(instruction="nonsense"))


def test_an_address_of_something_else(server: Server):
    server.script = [Answer({"hello": "world"}, 404)]
    with EditClient(server.url, QUICK) as edit, pytest.raises(ServiceError, match="status 404"):
        edit(request())
    with pytest.raises(ConfigError, match="must be an address"):
        EditClient("localhost:8001")


def test_closing_ends_a_call_that_waits_for_its_next_try(server: Server):
    server.script = [Answer({}, 503, {"retry-after": "60"})]
    edit = EditClient(server.url, ClientConfig(longest_wait=60))
    failed: list[Exception] = []

    def call() -> None:
        try:
            edit(request())
        except ServiceError as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    until(lambda: len(server.asked) == 1)
    edit.close()
    thread.join(10)
    assert failed


def test_a_call_outlives_a_service_that_comes_back():
    """The service goes away in the middle of a call and another takes its port: a retry, not a lost edit."""
    import socket

    from replan.serve.editing import EditEngine
    from replan.serve.editor import editor_service
    from replan.serve.run import running

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made, limits = setup(), Limits()
    stuck, fresh = Servant(), Servant()
    patient = ClientConfig(retries=200, backoff=0.02, longest_wait=0.05)
    with EditClient(f"http://127.0.0.1:{port}", patient) as edit:
        first = EditEngine(made, limits, lambda: Editor(FakePlanner(), stuck, made.config))
        with running(editor_service(first, limits), port=port, grace=1):
            edit.wait_ready(10)
            stuck.stepping.clear()
            stuck.gate.clear()
            thread, results = in_thread(lambda: edit(request()))
            assert stuck.stepping.wait(10)
        stuck.close()
        second = EditEngine(made, limits, lambda: Editor(FakePlanner(), fresh, made.config))
        with running(editor_service(second, limits), port=port):
            thread.join(20)
    alone = Editor(FakePlanner(), Servant(), made.config)(request())
    assert results[0].image.tobytes() == alone.image.tobytes()


@pytest.mark.parametrize("setting", ["timeout=0", "retries=-1", "connections=0", "patience=0"])
def test_settings_that_make_no_sense(setting: str):
    name, value = setting.split("=")
    with pytest.raises(ConfigError, match=r"client"):
        ClientConfig(**{name: float(value)})
