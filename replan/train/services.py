"""Editor and judge of a training run, by name: in this process, or a service. The trainer cannot tell which."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from replan import config as configs
from replan.train.grpo import GrpoConfig, ServiceConfig
from replan.train.score import EditFunction, Scorer
from replan.types import Edit, EditRequest

if TYPE_CHECKING:
    from replan.judge import Judge


def open_scorer(config: GrpoConfig) -> Scorer:
    """The scorer of a run. Raises ConfigError for a name that nothing answers to."""
    if config.reward.kind != "edit":
        return Scorer(config.reward, seed=config.seed, workers=config.services.workers)
    edit, judge = open_editor(config.services), open_judge(config.services)
    return Scorer(config.reward, edit, judge, config.seed, config.services.workers)


def open_editor(services: ServiceConfig) -> EditFunction:
    """An edit function; one in this process loads when first used and makes one edit at a time."""
    if services.editor.startswith(("http://", "https://")):
        from replan.serve.client import ClientConfig, EditClient

        patient = ClientConfig(timeout=services.timeout, patience=4 * services.timeout, connections=services.workers)
        return EditClient(services.editor, patient, services.edit, strict=True)
    from replan.backbones import EditConfig, find
    from replan.edit import Editor

    settings = configs.load(EditConfig, find(services.editor)[0].config, over=(services.edit,))
    editor, lock = Editor.load(services.editor, None, config=settings), threading.Lock()

    def edit(request: EditRequest) -> Edit:
        with lock:
            return editor(request, strict=True)

    return edit


def open_judge(services: ServiceConfig) -> Judge:
    """As the benchmark opens it; an address without a `#model` is a judge of `replan serve judge`."""
    if services.judge.startswith(("http://", "https://")) and "#" not in services.judge:
        from replan.serve.client import ClientConfig, JudgeClient

        return JudgeClient(services.judge, ClientConfig(timeout=services.timeout, patience=4 * services.timeout))
    from replan.judge import JudgeConfig, load_judge

    return load_judge(services.judge, JudgeConfig(timeout=services.timeout, concurrency=services.workers))
