"""An editor service without weights."""

from __future__ import annotations

import pytest
from servants import Servant, setup


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Load what the first service would load, so that no test measures it."""
    Servant().close()
    setup()
