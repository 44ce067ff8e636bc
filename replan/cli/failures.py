"""What the shell is told: exit 2 for the user's mistakes, 1 for our failures, 130 for Ctrl-C; no traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from replan.cli.console import say
from replan.errors import ConfigError, ImageError, ReplanError

OURS, USERS, INTERRUPTED = 1, 2, 130
_PATH_MISTAKES = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG
)  # fmt: skip


@contextmanager
def reported(debug: bool = False) -> Iterator[None]:
    """Turn what goes wrong inside into a line on stderr and an exit code; with `debug` the traceback is kept."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept")
        raise SystemExit(INTERRUPTED) from None
    except (typer.Exit, typer.Abort):  # both are RuntimeErrors, and neither is a failure
        raise
    except (ReplanError, OSError, RuntimeError) as error:
        told = explain(error)
        if debug or told is None:
            raise
        code, line = told
        say(f"error: {line}")
        raise SystemExit(code) from error


def explain(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of an error that we can explain; None for a bug, whose traceback must be seen."""
    from replan.record import PlanFileError, disk_full  # pulls in the plan grammar, which --help does not need

    if disk_full(error):
        return OURS, f"{error}; what was finished is kept"
    if isinstance(error, ConfigError | ImageError | PlanFileError):
        return USERS, str(error)
    if isinstance(error, ReplanError):
        return OURS, str(error)
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.errno in _PATH_MISTAKES and error.filename is not None:
        return USERS, f"{error.filename}: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, named so as not to import torch here
        first = str(error).splitlines()[0]
        return OURS, f"{first}\nTry --offload model, --quantize nf4 or --offload group; `replan doctor` says what fits."
    return None
