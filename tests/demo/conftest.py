"""The fixtures of these tests; they live in a module with a name of its own, so that tests can import from it."""

from visitors import _unpaced, demo, visit

__all__ = ["_unpaced", "demo", "visit"]
