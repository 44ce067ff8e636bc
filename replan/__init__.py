"""replan: plan, mask, denoise, judge, train. Importing it loads no torch and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replan.edit import Editor as Editor
    from replan.types import Box as Box
    from replan.types import Edit as Edit
    from replan.types import EditRequest as EditRequest
    from replan.types import Plan as Plan
    from replan.types import Region as Region
    from replan.types import Size as Size

__version__ = "0.1.0"
__all__ = ["Box", "Edit", "EditRequest", "Editor", "Plan", "Region", "Size"]


def __getattr__(name: str) -> Any:
    if name == "Editor":
        from replan.edit import Editor

        return Editor
    if name in __all__:
        from replan import types

        return getattr(types, name)
    raise AttributeError(f"module 'replan' has no attribute {name!r}")
