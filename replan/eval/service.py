"""Edits made by an editor service: many requests in flight at one address, behind which any number of editors work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from replan import config
from replan.errors import ConfigError, ServiceError
from replan.types import Edit, EditRequest

if TYPE_CHECKING:
    from replan.backbones.base import EditConfig
    from replan.eval.methods import GenerateConfig
    from replan.serve.client import EditClient
    from replan.serve.wire import About

PATIENCE = 2.0  # times the timeout of one try: for how long a call may be tried again


@dataclass(frozen=True, slots=True)
class Served:
    """An edit function for several threads. `about` is what goes into the run's settings: the models, no address."""

    client: EditClient
    about: Mapping[str, Any]

    def __call__(self, request: EditRequest) -> Edit:
        """Raises ServiceError for an outage; PlanError, ConfigError, ImageError for a request refused."""
        return self.client(request)

    def check(self) -> None:
        """Raises ServiceError when the service is not there."""
        self.client.line.get("/ready")

    def stop(self) -> None:
        """Try nothing again; what the service is working on is waited for."""
        self.client.line.stopped.set()


def connect(settings: GenerateConfig, edit: EditConfig, planner: str | None) -> Served:
    """The service of a run, which must have the run's models; the edit settings are sent with every request.

    Raises ServiceError when nothing answers there, ConfigError when it would make other edits than the run wants.
    """
    from pydantic import ValidationError

    from replan.serve.client import ClientConfig, EditClient
    from replan.serve.wire import About

    patient = ClientConfig(
        timeout=settings.timeout, retries=1000, patience=PATIENCE * settings.timeout, connections=settings.workers
    )
    bare = settings.method != "replan"
    client = EditClient(str(settings.service), patient, config.dump(edit), baseline=bare)
    try:
        about = About.model_validate(client.line.get("/v1/about"))
    except ValidationError as error:
        raise ServiceError(f"service = {settings.service}: is no editor service of this version") from error
    _compare(about, settings, planner)
    client.wait_ready(settings.timeout)
    models = {"backbone": about.model.get("backbone")} | ({} if planner is None else {"planner": planner})
    return Served(client, {"service": models})


def _compare(about: About, settings: GenerateConfig, planner: str | None) -> None:
    where = f"service = {settings.service}"
    if about.service != "editor":
        raise ConfigError(f"{where}: is a {about.service}, not an editor")
    wanted = {"backbone": settings.backbone} | ({} if planner is None else {"planner": planner})
    for name, value in wanted.items():
        served = about.model.get(name)
        if served != value.rstrip("/").rpartition("/")[2]:  # a service tells the last part of a name only
            raise ConfigError(f"{where}: its {name} is {served or 'none'}, the run's is {value}; make them the same")
    batch = about.limits.get("batch", 1)
    if batch != 1:
        raise ConfigError(
            f"{where}: makes {batch} edits in one forward, so that pixels depend on what comes together; "
            "start it without --batch"
        )
