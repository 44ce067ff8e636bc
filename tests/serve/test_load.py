"""The load test in small, on one editor without Ray; scripts/load_test.py is the full one."""

from __future__ import annotations

from typing import Any

import pytest
from test_cluster import load_test


def test_a_crowd_before_one_editor():
    figures = load_test().run(
        ["--replicas", "0", "--kills", "0", "--clients", "40", "--requests", "60", "--port", "0", "--queue", "4"]
    )
    assert figures["answered"] == 60
    assert figures["tries_by_status"]["429"] > 0  # the queue was full, and everybody came back
    assert all(figures["checks"].values()), figures


def figures_of(**changes: Any) -> dict[str, bool]:
    """The checks of a flawless test of 200 requests, with changes to what came of it."""
    made = load_test()
    asked = made._arguments(["--requests", "200", "--kills", "0"])
    tally = made.Tally(seconds=[1.0] * 200, memory=[(done, 900.0) for done in range(0, 201, 20)])
    tally.answers.update(range(200))
    tally.statuses.update({"200": 200, "429": 17})
    for name, value in changes.items():
        getattr(tally, name).clear()
        (getattr(tally, name).update if name in ("statuses", "answers") else getattr(tally, name).extend)(value)
    return made._figures(tally, 60.0, asked)["checks"]


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"answers": [*range(200), 7]}, "every request answered exactly once or refused"),
        ({"statuses": {"200": 201}}, "every request answered exactly once or refused"),
        ({"statuses": {"200": 200, "ReadError": 1}}, "every status is clear"),
        ({"statuses": {"200": 200, "500": 1}}, "every status is clear"),
        ({"wrong": [7]}, "every picture is the one its seed gives"),
        ({"memory": [(done, 900 + done * 0.025) for done in range(0, 201, 20)]}, "memory is flat"),
    ],
)
def test_each_check_can_fail(changes: dict[str, Any], check: str):
    assert all(figures_of().values())
    found = figures_of(**changes)
    assert not found[check]
    assert sum(not value for value in found.values()) == 1
