"""From answer to reward: what is the policy's fault scores, what is ours has no number."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
import torch
from rollouts import Editor, Judge, answer, exact_plan, mini_rows, outage

from replan.errors import ConfigError, PlanError, ServiceError
from replan.judge import Unscored
from replan.train.data import Rows
from replan.train.grpo import ServiceConfig
from replan.train.patience import Outage, Patience
from replan.train.reward import RewardConfig
from replan.train.score import Scored, Scorer
from replan.types import Box, Region

EDIT = RewardConfig(kind="edit", longest=2048)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return mini_rows(tmp_path_factory.mktemp("rows"))


def score(scorer: Scorer, rows: Rows, answers: list[str], index: int = 0) -> list[Scored]:
    return asyncio.run(scorer.score([rows[index]] * len(answers), answers))


def good(rows: Rows, index: int = 0) -> str:
    return answer(exact_plan(rows[index]))


def moved(rows: Rows, by: int, index: int = 0) -> str:
    """A plan that is sound and wrong."""
    plan = exact_plan(rows[index])
    return answer(replace(plan, regions=(Region(Box(by, by, by + 9, by + 9), "make this red"),)))


def test_right_wrong_and_malformed(rows: Rows) -> None:
    editor = Editor(rows)
    right, wrong, broken = score(Scorer(EDIT, editor, Judge()), rows, [good(rows), moved(rows, 3), "no plan"])
    assert right.value == pytest.approx(1 + 0.2 * 0.905)
    assert right.parts["success"] == 1.0
    assert right.picture is not None
    assert wrong.value is not None
    assert 0 < wrong.value < 0.5
    assert wrong.parts["success"] == 0.0
    assert broken.value == 0.0
    assert broken.parts["valid"] == 0.0
    assert len(editor.calls) == 2  # what has no form is never rendered


@pytest.mark.parametrize(
    "error",
    [
        outage(), ServiceError("503"), httpx.ConnectError("refused"), ConnectionResetError(), TimeoutError(),
        torch.OutOfMemoryError("a full device"),
    ],
)  # fmt: skip
def test_an_editor_out_of_order_is_no_zero(rows: Rows, error: Exception) -> None:
    editor = Editor(rows)
    editor.broken = lambda number, request: error
    found = score(Scorer(EDIT, editor, Judge()), rows, [good(rows), "no plan"])
    assert found[0].value is None
    assert found[0].failure is not None
    assert found[0].failure.stage == "editor"
    assert found[1].value == 0.0  # malformed plans need no editor


def test_a_judge_out_of_order_is_no_zero(rows: Rows) -> None:
    judge = Judge()
    judge.is_down = True
    found = score(Scorer(EDIT, Editor(rows), judge), rows, [good(rows)])[0]
    assert found.value is None
    assert found.failure is not None
    assert found.failure.stage == "judge"


def test_a_case_that_the_judge_cannot_score_has_no_reward(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the judge answered something: nothing is guessed from it."""

    def rate(*_: object) -> None:
        raise Unscored("the answer was not JSON: 'I give it 4 of 5'")

    judge = Judge()
    monkeypatch.setattr(judge, "rate", rate)
    assert score(Scorer(EDIT, Editor(rows), judge), rows, [good(rows)])[0].value is None


def test_a_plan_that_the_editor_refuses_is_the_policys_fault(rows: Rows) -> None:
    editor = Editor(rows)
    editor.broken = lambda number, request: PlanError("20 regions: at most 19")
    found = score(Scorer(EDIT, editor, Judge()), rows, [good(rows)])[0]
    assert found.value == pytest.approx(0.2 * 0.905)
    assert found.parts["refused"] == 1.0


def test_a_bug_is_not_swallowed(rows: Rows) -> None:
    editor = Editor(rows)
    for bug in (KeyError("bug"), RuntimeError("shapes differ")):
        editor.broken = lambda number, request, bug=bug: bug
        with pytest.raises(type(bug)):
            score(Scorer(EDIT, editor, Judge()), rows, [good(rows)])


def test_settings_that_never_worked_are_the_users_to_mend(rows: Rows) -> None:
    editor = Editor(rows)
    editor.broken = lambda number, request: ConfigError("no such backbone")
    scorer = Scorer(EDIT, editor, Judge())
    with pytest.raises(ConfigError):
        score(scorer, rows, [good(rows)])
    editor.broken = lambda number, request: ConfigError("told off") if number > 2 else None
    assert score(scorer, rows, [good(rows)])[0].value is not None
    assert score(scorer, rows, [moved(rows, 5)])[0].failure is not None


def test_equal_plans_are_rendered_once_and_failures_again(rows: Rows) -> None:
    editor = Editor(rows)
    scorer = Scorer(EDIT, editor, Judge())
    other = good(rows).replace("nothing else", "that is all of it")
    same = score(scorer, rows, [good(rows), other, good(rows), moved(rows, 3)])
    assert len(editor.calls) == 2
    assert same[0].value == same[1].value == same[2].value
    assert len({request.seed for request in editor.calls}) == 1  # a group differs by its plans alone
    editor.broken = lambda number, request: outage() if number == 3 else None
    assert score(scorer, rows, [moved(rows, 7)])[0].value is None
    assert score(scorer, rows, [moved(rows, 7)])[0].value is not None


def test_stage_one_needs_no_services(rows: Rows) -> None:
    found = score(Scorer(RewardConfig()), rows, [good(rows), "no plan"])
    assert [one.value for one in found] == [pytest.approx(0.905), 0.0]
    with pytest.raises(ConfigError, match="editor and a judge"):
        Scorer(EDIT)


def test_stage_one_knows_rows_without_regions(rows: Rows) -> None:
    row = rows[0]
    bare = answer(replace(exact_plan(row), regions=()))
    whole = replace(row, task=replace(row.task, answer=bare))
    scorer = Scorer(RewardConfig(longest=2048, global_plans=True))
    right, wrong = (asyncio.run(scorer.score_one(asked, bare)) for asked in (whole, row))
    assert right.value == pytest.approx(0.905)
    assert wrong.value == pytest.approx(0.905 - 0.2 * 0.4)


def test_a_repaired_plan_is_not_valid(rows: Rows) -> None:
    cut = good(rows).replace("]</region>", ", ]</region>")
    assert score(Scorer(RewardConfig()), rows, [cut])[0].parts["valid"] == 0.0


# --- patience --------------------------------------------------------------------------------------------------------


class Clock:
    """Sleeps without time passing, and mends the editor after so many pauses."""

    def __init__(self, editor: Editor, mended_after: int) -> None:
        self.waits: list[float] = []
        self.editor, self.mended_after = editor, mended_after

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        if len(self.waits) >= self.mended_after:
            self.editor.broken = lambda number, request: None


def batch(rows: Rows) -> tuple[list, list[str]]:
    chosen = [rows[k] for k in range(4) for _ in range(2)]
    return chosen, [good(rows, k) for k in range(4)] + [moved(rows, 3 + k) for k in range(4)]


def test_a_few_failures_leave_their_groups_at_once(rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    editor = Editor(rows)
    editor.broken = lambda number, request: outage() if number == 2 else None
    clock = Clock(editor, 99)
    patience = Patience(Scorer(EDIT, editor, Judge()), ServiceConfig(most_failed=0.25), clock.sleep)
    with caplog.at_level("WARNING"):
        found = asyncio.run(patience.score(*batch(rows)))
    assert [one.value is None for one in found].count(True) == 1
    assert clock.waits == []
    assert patience.tally.lost == {"editor": 1}
    assert patience.tally.scored == 7
    assert "leave their groups" in caplog.text


def test_many_failures_pause_until_the_service_is_back(rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    editor = Editor(rows)
    editor.broken = lambda number, request: outage() if number > 2 else None
    clock = Clock(editor, mended_after=3)
    patience = Patience(Scorer(EDIT, editor, Judge()), ServiceConfig(backoff=5, longest=12, patience=1e6), clock.sleep)
    with caplog.at_level("WARNING"):
        found = asyncio.run(patience.score(*batch(rows)))
    assert all(one.value is not None for one in found)
    assert [round(wait, 6) >= least for wait, least in zip(clock.waits, (5, 10, 12), strict=True)] == [True] * 3
    assert max(clock.waits) <= 12 * 1.25
    assert patience.tally.pauses == 3
    assert "training pauses for" in caplog.text
    undisturbed = asyncio.run(Scorer(EDIT, Editor(rows), Judge()).score(*batch(rows)))
    assert [one.value for one in found] == [one.value for one in undisturbed]


def test_what_was_scored_is_not_asked_again(rows: Rows) -> None:
    judge = Judge()
    editor = Editor(rows)
    editor.broken = lambda number, request: outage() if number <= 7 else None
    patience = Patience(Scorer(EDIT, editor, judge, workers=1), ServiceConfig(), Clock(editor, 1).sleep)
    asyncio.run(patience.score(*batch(rows)))
    assert judge.asked == 3 * 8


def test_in_the_end_it_gives_up(rows: Rows) -> None:
    editor = Editor(rows)
    editor.broken = lambda number, request: outage()
    clock = Clock(editor, 99)
    settings = ServiceConfig(backoff=5, longest=5, patience=4)
    with pytest.raises(Outage, match="8 of 8 rollouts could not be scored") as told:
        asyncio.run(Patience(Scorer(EDIT, editor, Judge()), settings, clock.sleep).score(*batch(rows)))
    assert "the editor is down" in str(told.value)
