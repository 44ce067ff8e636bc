"""Help pages that one wants to read: no word `bool` beside switches, and the name `replan` however it was started."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


def _bare(params: list[Any]) -> list[Any]:
    """The same parameters; a switch takes no value, so none is named beside it."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


class Page(TyperCommand):
    """A verb."""

    def get_params(self, ctx: Any) -> Any:
        return _bare(super().get_params(ctx))


class Pages(TyperGroup):
    """Verbs of one kind."""

    def get_params(self, ctx: Any) -> Any:
        return _bare(super().get_params(ctx))
