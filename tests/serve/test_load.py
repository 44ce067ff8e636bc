"""The load test in small, on one editor without Ray; scripts/load_test.py is the full one."""

from __future__ import annotations

from test_cluster import load_test


def test_a_crowd_before_one_editor():
    figures = load_test().run(
        ["--replicas", "0", "--kills", "0", "--clients", "40", "--requests", "60", "--port", "0", "--queue", "4"]
    )
    assert figures["answered"] == 60
    assert figures["tries_by_status"]["429"] > 0  # the queue was full, and everybody came back
    assert all(figures["checks"].values()), figures
