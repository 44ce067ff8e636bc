"""The models behind the demo: several backbones and planners by name, each loaded once, one job on them at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from replan.errors import ConfigError

if TYPE_CHECKING:
    from replan.backbones.base import Backbone, EditConfig
    from replan.backbones.runtime import Runtime
    from replan.edit import Editor
    from replan.planner import Planner


class Studio:
    """Loads on first use. `busy()` is held by whoever runs a model: none of them is safe for two threads."""

    def __init__(
        self,
        backbones: Mapping[str, Callable[[], Backbone]],
        planners: Mapping[str, Callable[[], Planner]],
        configs: Mapping[str, EditConfig],
        runtime: Runtime | None = None,
    ) -> None:
        self.configs, self.runtime = dict(configs), runtime
        self._backbones = {name: cache(load) for name, load in backbones.items()}
        self._planners = {name: cache(load) for name, load in planners.items()}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, backbones: Sequence[str], planners: Sequence[str], runtime: Runtime, speed: str | None = None
    ) -> Studio:
        """By the names that `replan edit` takes; nothing is loaded yet. `speed` is a preset or a file, null for each
        backbone's own. Raises ConfigError for an unknown backbone or preset.
        """
        from replan import config
        from replan.backbones import find, load_backbone
        from replan.backbones.base import EditConfig
        from replan.planner import PlannerConfig, load_planner
        from replan.speed import speed_values

        chosen = [] if speed is None else [("speed", speed_values(speed))]

        def planner(name: str) -> Callable[[], Planner]:
            return lambda: load_planner(name, PlannerConfig(), runtime.torch_device(), runtime.torch_dtype())

        return cls(
            {name: lambda name=name: load_backbone(name, runtime) for name in backbones},
            {name: planner(name) for name in planners},
            {name: config.load(EditConfig, find(name)[0].config, chosen) for name in backbones},
            runtime,
        )

    @property
    def backbones(self) -> list[str]:
        return list(self._backbones)

    @property
    def planners(self) -> list[str]:
        return list(self._planners)

    def config(self, backbone: str) -> EditConfig:
        """The settings that belong to a backbone. Raises ConfigError for one that is not offered."""
        if backbone not in self.configs:
            raise ConfigError(f"backbone {backbone!r}: this demo offers {', '.join(self.configs)}")
        return self.configs[backbone]

    def planner(self, name: str) -> Planner:
        """A loaded planner. Raises ConfigError, PlannerError."""
        if name not in self._planners:
            raise ConfigError(f"planner {name!r}: this demo offers {', '.join(self._planners)}")
        return self._planners[name]()

    def editor(self, backbone: str, config: EditConfig) -> Editor:
        """An editor without a planner: plans are made, and corrected, before. Raises ConfigError, BackboneError."""
        from replan.edit import Editor

        self.config(backbone)
        return Editor(None, self._backbones[backbone](), config)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The right to run a model."""
        with self._lock:
            yield

    def warm(self) -> None:
        """Load what the first job will need, so that it starts at once."""
        with self.busy():
            self._backbones[self.backbones[0]]()
            self._planners[self.planners[0]]()


def sees_picture(backbone: str) -> bool:
    """Whether the backbone's text encoder sees the picture, so that the matrix has a row for it (Qwen)."""
    from replan.backbones import BACKBONES, find

    known = {row.name: row.pipeline for row in BACKBONES}
    pipeline = known.get(backbone) or find(backbone)[0].pipeline
    return "Qwen" in pipeline
