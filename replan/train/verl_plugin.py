"""What every process of verl needs, loaded by `import verl` itself through the entry point group `verl.plugins`.

verl 0.9.1 imports a value-head class from trl wherever trl is installed; trl 1 no longer has it, so every worker would
die, although only critics use it and GRPO has none. Told that there is no trl, verl leaves it alone.

Light on purpose: verl loads it in every worker before anything else. Outside verl it does nothing.
"""

from __future__ import annotations

import sys

_HOLDERS = ("verl.utils.import_utils", "verl.utils.model", "verl.models.transformers.monkey_patch")


def hide_trl() -> None:
    """Make verl, where it is loaded, believe that trl is absent; other plugins may have made it look already."""
    for name in _HOLDERS:
        if name in sys.modules:
            sys.modules[name].is_trl_available = _absent  # type: ignore[attr-defined]


def _absent() -> bool:
    return False


hide_trl()  # an entry point of this group is only imported, never called
