"""The judge behind a service: real HTTP servers on this machine speak both wire formats, and misbehave."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_run
import pytest
from PIL import Image
from planner_server import Answer, Server, serve

from replan.errors import ConfigError, JudgeError
from replan.eval.data import DataConfig, Item, load_bench
from replan.eval.generate import read_run
from replan.eval.score import Cost, Kept, Scoring, read_scores
from replan.judge import DIMENSIONS, Case, Judge, JudgeConfig, Unscored, load_judge

WIRES = ("openai", "gemini")
QUICK = JudgeConfig(backoff=0.01, timeout=5.0, concurrency=4)


def said(wire: str, text: str | None, finish: str = "STOP", **more: Any) -> dict[str, Any]:
    """A whole response with this answer in it."""
    if wire == "openai":
        message = {"role": "assistant", "content": text, **more}
        usage = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
        reason = {"STOP": "stop", "SAFETY": "content_filter", "MAX_TOKENS": "length"}[finish]
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "judge-1",
            "choices": [choice],
            "usage": usage,
        }
    usage = {"promptTokenCount": 1000, "candidatesTokenCount": 40, "thoughtsTokenCount": 10, "totalTokenCount": 1050}
    content = {"role": "model", "parts": [{"text": text}]} if text is not None else {"role": "model"}
    candidate = {"index": 0, "content": content, "finishReason": finish}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "judge-1"}


def score(wire: str, value: Any, reason: str = "because") -> Answer:
    return Answer(said(wire, json.dumps({"reasoning": reason, "score": value})))


def failing(wire: str, status: int, headers: dict[str, str] | None = None, details: Any = None) -> Answer:
    error: dict[str, Any] = {"message": "not now", "code": status, "status": "BUSY"}
    return Answer({"error": error | ({"details": details} if details else {})}, status, headers or {})


def question(body: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """Text, number of pictures and answer schema of a request in either format."""
    if "messages" in body:
        parts = body["messages"][0]["content"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
        return "\n".join(texts), sum(part["type"] == "image_url" for part in parts), schema
    parts = body["contents"][0]["parts"]
    texts = [part["text"] for part in parts if "text" in part]
    return (
        "\n".join(texts),
        sum("inlineData" in part for part in parts),
        body["generationConfig"].get("responseJsonSchema", {}),
    )


def dimension_of(body: dict[str, Any]) -> str:
    text = question(body)[0]
    marks = {
        "right thing worked on": "target",
        "look as the instruction asks": "effect",
        "still as it was": "consistency",
    }
    return next((name for mark, name in marks.items() if mark in text), "quality")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("GEMINI_API_KEY", "a key")
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    with serve() as running:
        yield running


def judge_at(server: Server, wire: str, config: JudgeConfig = QUICK) -> Judge:
    if wire == "openai":
        return load_judge(f"{server.url}/v1#judge-1", config)
    return load_judge("gemini:judge-1", replace(config, base_url=server.url))


def case() -> Case:
    return Case(
        7, 'make the {expression} "red"', "left cup", lambda: Image.new("RGB", (32, 24)),
        lambda: Image.new("RGB", (32, 24), "red"), "a" * 64, "b" * 64,
    )  # fmt: skip


@pytest.mark.parametrize("wire", WIRES)
def test_four_separate_calls_with_schema_and_pictures(wire: str, server: Server) -> None:
    server.choose = lambda body: score(wire, 5, dimension_of(body))
    judge = judge_at(server, wire)
    for name, dimension in DIMENSIONS.items():
        rating = judge.rate(case(), dimension)
        assert (rating.score, rating.reason, rating.model) == (5, name, "judge-1")
        assert (rating.tokens_in, rating.tokens_out) == (1000, 50)
        text, pictures, schema = question(server.bodies()[-1])
        assert schema["properties"]["score"]["enum"] == list(dimension.scale)
        assert pictures == (1 if name == "quality" else 2)
        # the instruction's own braces are not filled in
        assert ('make the {expression} "red"' in text, "left cup" in text) == (name != "quality", name != "quality")
    assert len(server.asked) == 4


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    "bad",
    ["4", "0", '{"score": 4}', '{"score": "5"}', '{"score": true}', '{"score": 5.0}', "I give it a 5", "[5]", "", "{",
     '{"reasoning": "no score"}'],
)  # fmt: skip
def test_answers_off_the_scale_or_unparsable_are_asked_again_and_never_guessed(
    wire: str, bad: str, server: Server
) -> None:
    server.script = [Answer(said(wire, bad)), Answer(said(wire, bad)), score(wire, 3)]
    rating = judge_at(server, wire).rate(case(), DIMENSIONS["effect"])
    assert rating.score == 3
    assert (rating.tokens_in, rating.tokens_out) == (3000, 150)  # all three were paid
    assert "could not be used" in question(server.bodies()[-1])[0]
    server.script = [Answer(said(wire, bad))]
    with pytest.raises(Unscored, match=r"3 tries"):
        judge_at(server, wire).rate(case(), DIMENSIONS["effect"])


@pytest.mark.parametrize("wire", WIRES)
def test_refusals_are_asked_again_then_unscored(wire: str, server: Server) -> None:
    refusal = (
        said(wire, None, refusal="I will not look at this")
        if wire == "openai"
        else {"promptFeedback": {"blockReason": "SAFETY"}}
    )
    paid = {name: value for name, value in said(wire, None).items() if name.startswith("usage")}
    for answer in (refusal | paid, said(wire, None, "SAFETY")):
        server.script = [Answer(answer), score(wire, 1)]
        rating = judge_at(server, wire).rate(case(), DIMENSIONS["target"])
        assert (rating.score, rating.tokens_in, rating.tokens_out) == (1, 2000, 100)  # a refusal is paid as well
        server.script = [Answer(answer)]
        with pytest.raises(Unscored, match="refused") as caught:
            judge_at(server, wire).rate(case(), DIMENSIONS["target"])
        assert (caught.value.tokens_in, caught.value.tokens_out) == (3000, 150)


@pytest.mark.parametrize("wire", WIRES)
def test_what_was_spent_before_an_outage_is_counted(wire: str, server: Server, run: Path) -> None:
    answers = [Answer(said(wire, "no JSON")), failing(wire, 401)]
    server.choose = lambda body: answers[min(len(server.asked) - 1, 1)]
    spent = Cost()
    first = next(scoring(run, judge_at(server, wire)).run(1, spent))
    assert first.down is not None
    assert (spent.calls, spent.tokens_in, spent.tokens_out) == (1, 1000, 50)


@pytest.mark.parametrize("wire", WIRES)
def test_answers_that_come_in_after_an_interrupt_are_counted_and_kept(wire: str, server: Server, run: Path) -> None:
    server.choose = lambda body: replace(score(wire, 5), delay=0.2)
    found, spent = scoring(run, judge_at(server, wire)), Cost()
    answers = found.run(4, spent)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert spent.calls == len(server.asked) == sum(len(entries) for entries in found.entries.values()) > 1
    assert scoring(run, judge_at(server, wire)).known == spent.calls


def test_a_server_that_moved_is_the_same_judge(server: Server, run: Path) -> None:
    server.choose = lambda body: score("openai", 5)
    ask_all(scoring(run, judge_at(server, "openai")), run)
    with serve() as elsewhere:
        again = scoring(run, judge_at(elsewhere, "openai"))
        assert (again.known, again.open) == (24, [])
        assert again.judge.describe()["name"] == read_scores(run)["judge"]["name"]
    assert scoring(run, load_judge(f"{server.url}/v1#judge-2", QUICK)).known == 0


@pytest.mark.parametrize("wire", WIRES)
def test_retry_after_is_honoured(wire: str, server: Server) -> None:
    server.script = [failing(wire, 429, {"retry-after": "0.5"}), score(wire, 5)]
    judge_at(server, wire).rate(case(), DIMENSIONS["target"])
    assert server.times[1] - server.times[0] >= 0.5


def test_gemini_retry_info_is_honoured(server: Server) -> None:
    info = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.4s"}]
    server.script = [failing("gemini", 429, details=info), score("gemini", 5)]
    judge_at(server, "gemini").rate(case(), DIMENSIONS["target"])
    assert server.times[1] - server.times[0] >= 0.4


@pytest.mark.parametrize("wire", WIRES)
def test_500s_slow_answers_and_broken_bodies_are_tried_again(wire: str, server: Server) -> None:
    slow = replace(score(wire, 5), delay=1.5)
    server.script = [failing(wire, 500), failing(wire, 503), Answer(b"<html>"), Answer({}), slow, score(wire, 5)]
    judge = judge_at(server, wire, replace(QUICK, timeout=1.0))
    assert judge.rate(case(), DIMENSIONS["target"]).score == 5
    assert len(server.asked) == 6


@pytest.mark.parametrize("wire", WIRES)
def test_what_will_not_pass_is_not_tried_again(wire: str, server: Server) -> None:
    server.script = [failing(wire, 401)]
    with pytest.raises(JudgeError, match="status 401") as caught:
        judge_at(server, wire).rate(case(), DIMENSIONS["target"])
    assert not isinstance(caught.value, Unscored)
    assert len(server.asked) == 1


def test_fenced_json_is_json(server: Server) -> None:
    server.script = [Answer(said("openai", '```json\n{"reasoning": "", "score": 5}\n```'))]
    assert judge_at(server, "openai").rate(case(), DIMENSIONS["target"]).score == 5


def test_specs_that_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "GOOGLE_CLOUD_PROJECT", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for spec, told in (
        ("gpt", "write http"), ("openai:gpt", "OPENAI_API_KEY"), ("gemini:g", "GEMINI_API_KEY"),
        ("vertex:g", "GOOGLE_CLOUD_PROJECT"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            load_judge(spec)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    bench_run.run(tmp_path / "run", load_bench(DataConfig(limit=6)))
    return tmp_path / "run"


def scoring(run: Path, judge: Judge) -> Scoring:
    return Scoring.of(run, load_bench(DataConfig(limit=6)), judge, Kept(run.parent / "cache"))


def ask_all(found: Scoring, run: Path, concurrency: int = 4) -> tuple[Cost, dict[str, Any]]:
    spent = Cost(price_in=1.0, price_out=10.0)
    try:
        list(found.run(concurrency, spent))
    finally:
        found.save(read_run(run), spent)
    return spent, read_scores(run)


@pytest.mark.parametrize("wire", WIRES)
def test_nothing_is_paid_twice_and_a_changed_picture_is_judged_anew(wire: str, server: Server, run: Path) -> None:
    server.choose = lambda body: score(wire, 5)
    first = scoring(run, judge_at(server, wire))
    estimate = first.estimate(1.0, 10.0)
    assert (estimate.calls, estimate.tokens_in > 4000, estimate.dollars is not None) == (24, True, True)
    spent, scores = ask_all(first, run)
    assert (spent.calls, spent.tokens_in, spent.tokens_out, len(server.asked)) == (24, 24000, 1200, 24)
    assert server.most_at_once <= 4
    rating = scores["items"][0]["ratings"]["effect"]
    assert (rating["score"], rating["model"], rating["temperature"], len(rating["prompt"])) == (5, "judge-1", 0.0, 16)
    assert rating["date"].startswith("20")
    again = scoring(run, judge_at(server, wire))
    assert (again.known, again.open) == (24, [])
    Image.new("RGB", (96, 96), "red").save(run / "2" / "final_result.png")
    changed = scoring(run, judge_at(server, wire))
    assert {ask.case.id for ask in changed.open} == {2}
    assert len(changed.open) == 4
    other = scoring(run, judge_at(server, wire, replace(QUICK, temperature=0.5)))
    assert len(other.open) == 24


@pytest.mark.parametrize("wire", WIRES)
def test_judge_dies_half_way_and_the_next_run_goes_on(wire: str, server: Server, run: Path) -> None:
    quick = replace(QUICK, retries=1)
    counted: list[int] = []

    def choose(body: dict[str, Any]) -> Answer:
        counted.append(1)
        return score(wire, 5) if len(counted) <= 9 else failing(wire, 503)

    server.choose = choose
    with pytest.raises(JudgeError, match="counts as down"):
        ask_all(scoring(run, judge_at(server, wire, quick)), run, concurrency=2)
    # 9 answers, 3 failures on end and the 4 begun meanwhile, each tried twice: not all 15 open questions
    assert len(counted) <= 9 + 2 * (3 + 4)
    scores = read_scores(run)
    ratings = [rating for item in scores["items"] for rating in item["ratings"].values()]
    assert sum("score" in rating for rating in ratings) == 9
    assert all("unscored" in rating for rating in ratings if "score" not in rating)
    server.choose = lambda body: score(wire, 3 if dimension_of(body) != "target" else 1)
    resumed = scoring(run, judge_at(server, wire, quick))
    assert (resumed.known, len(resumed.open)) == (9, 15)
    before = len(server.asked)
    _, scores = ask_all(resumed, run)
    assert len(server.asked) - before == 15
    assert (scores["spent"]["calls"], scores["spent"]["tokens_in"]) == (24, 24000)  # of both
    assert scores["spent"]["dollars"] == pytest.approx(24 * (1000 * 1 + 50 * 10) / 1e6)
    values = [rating["score"] for item in scores["items"] for rating in item["ratings"].values()]
    assert len(values) == 24
    assert values.count(5) == 9


def test_one_bad_case_does_not_end_a_run(server: Server, run: Path) -> None:
    server.choose = lambda body: (
        Answer(said("openai", "no JSON")) if dimension_of(body) == "effect" else score("openai", 5)
    )
    spent, scores = ask_all(scoring(run, judge_at(server, "openai")), run)
    assert spent.calls == 24
    assert spent.tokens_in == 18 * 1000 + 6 * 3000
    for item in scores["items"]:
        assert "unscored" in item["ratings"]["effect"]
        assert "score" not in item["ratings"]["effect"]
        assert item["ratings"]["quality"]["score"] == 5
    assert len(scoring(run, judge_at(server, "openai")).open) == 6  # asked again by the next run


def test_missing_pictures_are_told(server: Server, run: Path) -> None:
    (run / "1" / "edit.json").unlink()
    (run / "3" / "edit.json").unlink()
    (run / "3" / "failed.json").write_text('{"error": "out of memory"}')
    server.choose = lambda body: score("openai", 5)
    _, scores = ask_all(scoring(run, judge_at(server, "openai")), run)
    missing = {item["id"]: item.get("missing") for item in scores["items"] if "missing" in item}
    assert missing == {1: "not generated", 3: "failed: out of memory"}


def test_stop_ends_a_long_wait(server: Server) -> None:
    import threading

    server.script = [failing("openai", 429, {"retry-after": "60"})]
    judge = judge_at(server, "openai")
    threading.Timer(0.3, judge.stop).start()
    began = time.monotonic()
    with pytest.raises(JudgeError):
        judge.rate(case(), DIMENSIONS["target"])
    assert time.monotonic() - began < 10


def test_the_exact_judge_knows_only_its_world(run: Path) -> None:
    judge = load_judge("mini")
    bench = load_bench(DataConfig(limit=2))
    good = scoring(run, judge).open[0].case
    assert judge.rate(good, DIMENSIONS["target"]).score in (1, 5)
    with pytest.raises(Unscored, match="only the mini world"):
        judge.rate(replace(good, extra={}, id=99), DIMENSIONS["target"])
    with pytest.raises(Unscored, match="another version"):
        judge.rate(replace(good, extra=bench.items[1].extra, id=98), DIMENSIONS["target"])
    assert isinstance(bench.items[0], Item)
