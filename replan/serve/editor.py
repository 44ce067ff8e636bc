"""`replan serve editor`: the routes of the editor."""

from __future__ import annotations

from fastapi import Request

from replan.serve import wire
from replan.serve.adapters import add_adapters
from replan.serve.app import Service
from replan.serve.door import Door
from replan.serve.engine import Engine
from replan.serve.limits import Limits


def editor_service(engine: Engine[wire.EditCall, wire.EditReply], limits: Limits) -> Door:
    """The app around an engine, which it starts and closes."""
    service = Service(engine, limits, "editor", "replan editor")

    async def edit(request: Request, call: wire.EditCall) -> wire.EditReply:
        reply = await service.watched(request, engine.answer(call), call.id)
        service.metrics.worked(reply.timings)
        return reply

    @service.app.post("/v1/edits", tags=["edit"], summary="Edit a picture")
    async def edits(request: Request, call: wire.EditCall) -> wire.EditReply:
        """Plan (unless a plan is sent) and edit. The same picture, plan, settings and seed give the same edit."""
        return await edit(request, call)

    add_adapters(service, edit)
    return service.finished()
