"""Work in several threads, never more of it begun than keeps them busy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

W = TypeVar("W")
R = TypeVar("R")


def in_parallel(
    function: Callable[[W], R], work: Iterable[W], workers: int, stop: Callable[[], None] = lambda: None
) -> Iterator[R]:
    """`function` of each piece of work, yielded as it is known; one worker means this very thread and the order given.

    An error of `function` ends it. However it ends (error, Ctrl-C, the caller closing it), `stop` is called, nothing
    new is begun, and what is under way is waited for.
    """
    if workers == 1:
        try:
            for piece in work:
                yield function(piece)
        finally:
            stop()
        return
    pool = ThreadPoolExecutor(workers)
    waiting: set[Future[R]] = set()
    try:
        for piece in work:
            waiting.add(pool.submit(function, piece))
            if len(waiting) >= 2 * workers:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from [future.result() for future in finished]
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from [future.result() for future in finished]
    finally:
        stop()
        pool.shutdown(wait=True, cancel_futures=True)
