"""Why weights did not come from the model hub, said shortly: the libraries say it at length and beside the point."""

from __future__ import annotations


def unreachable(error: BaseException | None) -> bool:
    """Whether this error, or what led to it, is that the hub could not be asked: no network, or offline on purpose."""
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, httpx.TransportError | LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def absent(what: str) -> str:
    """What to tell then."""
    return f"{what}: is not on this machine, and the hub cannot be reached; name a folder, or download it before"
