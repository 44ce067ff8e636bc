"""Remote planners against real HTTP servers on this machine that speak the services' wire formats."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest
from PIL import Image
from planner_server import Answer, Server, serve

from replan.chat import retry_after
from replan.errors import ImageError, PlanError, PlannerError
from replan.plan import AnswerError
from replan.planner import PlannerConfig, load_planner, remote
from replan.planner.base import candidates
from replan.types import Box, EditRequest, Plan, Size

pytest.importorskip("openai")
pytest.importorskip("google.genai")

REGION = '<region>[{"bbox_2d": [56, 28, 252, 182], "hint": "red"}]</region>'
ANSWER = f"<think>cup</think><gen_image>keep it</gen_image>{REGION}"
SIZE = Size(500, 375)  # sent as 504x364


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve() as state:
        monkeypatch.setattr(remote, "BACKOFF", 0.01)
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", state.url)
        monkeypatch.setenv("GEMINI_API_KEY", "gemini-key")
        monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
        monkeypatch.delenv("REPLAN_API_KEY", raising=False)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield state


def chat(text: object = ANSWER, finish: str = "stop", **message: object) -> dict[str, Any]:
    turn = {"role": "assistant", "content": text, **message}
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": turn, "finish_reason": finish}],
    }  # fmt: skip


def gemini(text: str | None = ANSWER, finish: str = "STOP") -> dict[str, Any]:
    said = [] if text is None else [{"text": text[:40]}, {"text": text[40:]}]
    parts = [{"text": "let me see", "thought": True}, *said]
    return {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": finish}]}


REPLIES: dict[str, Callable[..., dict[str, Any]]] = {"chat": chat, "gemini": gemini}


def planner(server: Server, kind: str, **changes: Any) -> Any:
    config = PlannerConfig(**{"retries": 2, "timeout": 5.0, "frame": "seen", **changes})
    return load_planner(f"{server.url}/v1#m" if kind == "chat" else "gemini:m", config)


def request(seed: int = 0) -> EditRequest:
    image = Image.new("RGB", SIZE, "white")
    image.paste((200, 0, 0), (100, 100, 200, 200))
    return EditRequest(image, "make the cup red", seed=seed)


both = pytest.mark.parametrize("kind", ["chat", "gemini"])


# --- the wire --------------------------------------------------------------------------------------------------------


@both
def test_plan(server: Server, kind: str) -> None:
    server.script = [Answer(REPLIES[kind]())]
    plan = planner(server, kind)(request())
    assert (plan.reasoning, plan.prompt, plan.size, plan.notes, plan.raw) == ("cup", "keep it", SIZE, (), ANSWER)
    assert plan.regions[0].box == Box(56, 28, 252, 182).rescale(Size(504, 364), SIZE)


def test_what_a_chat_server_gets(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLAN_API_KEY", "secret")
    server.script = [Answer(chat())]
    planner(server, "chat", max_new_tokens=77)(request(5))
    path, body, headers = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("m", 0.0, 77)
    assert "seed" not in body
    image, text = body["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    assert sent.size == (504, 364)
    assert sent.getpixel((151, 145)) == (200, 0, 0)
    assert "504 wide and 364 high" in text["text"]
    assert text["text"].endswith("Instruction: make the cup red")


def test_what_gemini_gets(server: Server) -> None:
    server.script = [Answer(gemini())]
    planner(server, "gemini", max_new_tokens=77, image_first=False, frame="auto")(request())
    path, body, headers = server.asked[0]
    assert path.endswith("/models/m:generateContent")
    assert headers["x-goog-api-key"] == "gemini-key"
    assert (body["generationConfig"]["temperature"], body["generationConfig"]["maxOutputTokens"]) == (0.0, 77)
    before, image, after = body["contents"][0]["parts"]
    assert "1000 wide and 1000 high" in before["text"]
    assert after == {"text": "make the cup red"}
    assert Image.open(io.BytesIO(base64.b64decode(image["inlineData"]["data"]))).size == (504, 364)


@both
def test_candidates_carry_their_seeds(server: Server, kind: str) -> None:
    server.script = [Answer(REPLIES[kind]())]
    outcomes = candidates(planner(server, kind, candidate_temperature=0.6, top_p=0.9), request(2**40), 3)
    assert all(isinstance(outcome, Plan) for outcome in outcomes)
    settings = [body if kind == "chat" else body["generationConfig"] for body in server.bodies()]
    start = 2**40 if kind == "chat" else 2**40 % 2**31
    assert sorted(each["seed"] for each in settings) == [start, start + 1, start + 2]
    assert {each["temperature"] for each in settings} == {0.6}
    assert {each["top_p" if kind == "chat" else "topP"] for each in settings} == {0.9}


@pytest.mark.parametrize(("model", "expected"), [("Qwen/Qwen3-VL-8B-Instruct", 1000), ("TainU/RePlan", 504)])
def test_frame_by_model_name(server: Server, model: str, expected: int) -> None:
    server.script = [Answer(chat())]
    load_planner(f"{server.url}/v1#{model}", PlannerConfig())(request())
    assert server.bodies()[0]["model"] == model
    assert f"is {expected} wide" in server.bodies()[0]["messages"][0]["content"][1]["text"]


def test_the_only_model_of_a_server_needs_no_name(server: Server) -> None:
    server.script = [Answer({"object": "list", "data": [{"id": "one", "object": "model"}]}), Answer(chat())]
    load_planner(f"{server.url}/v1")(request())
    assert server.bodies()[1]["model"] == "one"
    server.script = [Answer({"object": "list", "data": [{"id": name, "object": "model"} for name in "ab"]})]
    with pytest.raises(PlannerError, match=r"write .*#MODEL with one of: a, b"):
        load_planner(f"{server.url}/v1")
    server.script = [Answer({}, status=404)]
    with pytest.raises(PlannerError, match="cannot ask which models"):
        load_planner(f"{server.url}/v1")


def test_settings_that_a_model_does_not_take_are_left_out(server: Server) -> None:
    error = {"error": {"message": "Unsupported value", "param": "temperature", "code": "unsupported_value"}}
    server.script = [Answer(error, status=400), Answer(chat())]
    asking = planner(server, "chat")
    assert isinstance(asking(request()), Plan)
    assert isinstance(asking(request()), Plan)
    assert ["temperature" in body for body in server.bodies()] == [True, False, False]
    server.script = [Answer({"error": {"message": "bad picture", "param": "messages"}}, status=400)]
    with pytest.raises(PlannerError, match=r"refused the request.*bad picture"):
        asking(request())


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_come_from_the_environment_at_construction(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PlannerError, match="OPENAI_API_KEY"):
        load_planner("openai:gpt-x")
    with pytest.raises(PlannerError, match="GEMINI_API_KEY"):
        load_planner("gemini:gemini-x")
    monkeypatch.setenv("OPENAI_API_KEY", "first")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    asking = load_planner("openai:gpt-x")
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    server.script = [Answer(chat())]
    asking(request())
    assert server.asked[0][2]["authorization"] == "Bearer first"
    with pytest.raises(PlannerError, match="openai:MODEL"):
        load_planner("openai:")
    monkeypatch.setenv("REPLAN_API_KEY", "")
    planner(server, "chat")(request())  # no key of another service goes to a server of one's own
    assert server.asked[-1][2]["authorization"] == "Bearer none"


# --- outages and retries ---------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_failures_are_tried_again(server: Server, kind: str, status: int) -> None:
    failure = Answer({"error": {"message": "busy", "code": status}}, status=status)
    server.script = [failure, failure, Answer(REPLIES[kind]())]
    assert isinstance(planner(server, kind)(request()), Plan)
    assert len(server.asked) == 3


@both
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_lasting_failures_are_not(server: Server, kind: str, status: int) -> None:
    server.script = [Answer({"error": {"message": "no such key", "code": status}}, status=status)]
    with pytest.raises(PlannerError, match="no such key"):
        planner(server, kind)(request())
    assert len(server.asked) == 1


@both
def test_it_gives_up_in_the_end(server: Server, kind: str) -> None:
    server.script = [Answer({"error": {"message": "still busy", "code": 503}}, status=503)]
    with pytest.raises(PlannerError, match=r"status 503: .*still busy"):
        planner(server, kind, retries=3)(request())
    assert len(server.asked) == 4


@both
def test_retry_after_is_honoured(server: Server, kind: str) -> None:
    busy = {"error": {"message": "slow down", "code": 429}}
    server.script = [Answer(busy, status=429, headers={"Retry-After": "0.6"}), Answer(REPLIES[kind]())]
    assert isinstance(planner(server, kind)(request()), Plan)
    assert 0.55 < server.times[1] - server.times[0] < 3
    server.script = [Answer(busy, status=429, headers={"Retry-After": "3600"}), Answer(REPLIES[kind]())]
    with pytest.raises(PlannerError, match="slow down"):  # nobody waits for an hour
        planner(server, kind)(request())
    assert len(server.asked) == 3


def test_gemini_says_in_its_body_how_long_to_wait(server: Server) -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.6s"}]
    busy = Answer({"error": {"message": "quota", "code": 429, "details": details}}, status=429)
    server.script = [busy, Answer(gemini())]
    assert isinstance(planner(server, "gemini")(request()), Plan)
    assert server.times[1] - server.times[0] > 0.55


def test_retry_after_formats() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "-7"}) == 0
    assert 55 < (retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)}) or 0) <= 60
    for header in ({}, {"retry-after": "soon"}, None):
        assert retry_after(header) is None


def test_spent_quota_is_not_tried_again(server: Server) -> None:
    server.script = [Answer({"error": {"message": "pay", "code": "insufficient_quota"}}, status=429)]
    with pytest.raises(PlannerError, match="pay"):
        planner(server, "chat")(request())
    assert len(server.asked) == 1


@both
def test_slow_answers_time_out(server: Server, kind: str) -> None:
    server.script = [Answer(REPLIES[kind](), delay=2.0)]
    start = time.monotonic()
    with pytest.raises(PlannerError, match=r"no answer from .* within 0\.3 s"):
        planner(server, kind, timeout=0.3, retries=1)(request())
    assert time.monotonic() - start < 1.9
    assert len(server.asked) == 2
    server.script = [Answer(REPLIES[kind](), delay=2.0), Answer(REPLIES[kind]())]
    assert isinstance(planner(server, kind, timeout=0.3)(request()), Plan)


@both
def test_no_server(server: Server, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "url", "http://127.0.0.1:9")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
    with pytest.raises(PlannerError, match="no connection to"):
        planner(server, kind)(request())


# --- answers that are none -------------------------------------------------------------------------------------------

NO_ANSWER: list[tuple[str, Answer, str]] = [
    ("chat", Answer(b"{not json"), "no valid answer"),
    ("chat", Answer(b"<html>login</html>", headers={"content-type": "text/html"}), "no valid answer"),
    ("chat", Answer({}), "no choices"),
    ("chat", Answer({"choices": []}), "no choices"),
    ("chat", Answer({"choices": [{"finish_reason": "stop"}]}), "no choices"),
    ("chat", Answer([1, 2]), "no valid answer"),
    ("chat", Answer({"choices": 5}), "no choices"),
    ("chat", Answer(chat(["a"])), "content is no text"),
    ("chat", Answer(chat("")), "it is empty"),
    ("chat", Answer(chat(None)), "it is empty"),
    ("chat", Answer(chat("", "length")), "raise planner.max_new_tokens"),
    ("chat", Answer(chat(None, refusal="I cannot help with that.")), "refused: I cannot help"),
    ("chat", Answer(chat("<think>", "content_filter")), "content filter"),
    ("gemini", Answer(b"{not json"), "no valid answer"),
    ("gemini", Answer(b"<html>login</html>", headers={"content-type": "text/html"}), "no valid answer"),
    ("gemini", Answer({}), "no candidates"),
    ("gemini", Answer({"candidates": 5}), "no valid answer"),
    ("gemini", Answer({"promptFeedback": {"blockReason": "SAFETY"}}), "blocked (SAFETY)"),
    ("gemini", Answer(gemini("<think>", "SAFETY")), "stopped for SAFETY"),
    ("gemini", Answer({"candidates": [{"finishReason": "STOP"}]}), "it is empty"),
    ("gemini", Answer(gemini(None)), "it is empty"),
    ("gemini", Answer(gemini(None, "MAX_TOKENS")), "raise planner.max_new_tokens"),
]


@pytest.mark.parametrize(("kind", "answer", "message"), NO_ANSWER)
def test_no_answer_is_a_planner_error_and_never_a_plan(server: Server, kind: str, answer: Answer, message: str) -> None:
    server.script = [answer]
    with pytest.raises(PlannerError) as caught:
        planner(server, kind)(request())
    assert message in str(caught.value)
    assert len(server.asked) == 1


@both
def test_a_bad_answer_is_a_plan_error(server: Server, kind: str) -> None:
    server.script = [Answer(REPLIES[kind]("The cup is red now, is it not? No tags here, only prose, sorry."))]
    with pytest.raises(AnswerError, match="no <gen_image>") as caught:
        planner(server, kind)(request())
    assert caught.value.raw.startswith("The cup")


@both
def test_a_cut_answer_says_so(server: Server, kind: str) -> None:
    finish = "length" if kind == "chat" else "MAX_TOKENS"
    server.script = [Answer(REPLIES[kind](ANSWER[:-9], finish))]
    plan = planner(server, kind)(request())
    assert plan.notes == ("<region> is not closed", "the answer was cut off at 2048 tokens")


# --- many ------------------------------------------------------------------------------------------------------------


@both
def test_many_keep_their_order_and_bounds(server: Server, kind: str) -> None:
    """Twelve requests, three at once; a bad answer and an outage stay with the request that met them."""

    def choose(body: dict[str, Any]) -> Answer:
        seed = (body if kind == "chat" else body["generationConfig"])["seed"]
        if seed == 4:
            return Answer({"error": {"message": "down", "code": 500}}, status=500, delay=0.05)
        return Answer(REPLIES[kind]("no plan" if seed == 7 else ANSWER.replace("cup", f"cup {seed}")), delay=0.05)

    server.choose = choose
    outcomes = planner(server, kind, concurrency=3).plan_many([request(k) for k in range(12)], sampled=True)
    assert 2 <= server.most_at_once <= 3
    assert isinstance(outcomes[4], PlannerError)
    assert isinstance(outcomes[7], PlanError)
    plans = {k: outcome for k, outcome in enumerate(outcomes) if isinstance(outcome, Plan)}
    assert {k: plan.reasoning for k, plan in plans.items()} == {k: f"cup {k}" for k in range(12) if k not in (4, 7)}
    assert planner(server, kind).plan_many([]) == []


def test_unreasonable_pictures_are_not_sent(server: Server) -> None:
    with pytest.raises(ImageError):
        planner(server, "chat")(EditRequest(Image.new("RGB", (3000, 10)), "x"))
    assert server.asked == []
