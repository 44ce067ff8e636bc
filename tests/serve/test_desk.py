"""The queue before a model: bounded, fair, and it does nothing that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from replan.errors import ServiceError
from replan.serve.desk import Conflict, Desk, Full, Ticket

Batch = Sequence[Ticket[str, str]]


class Worker:
    """Upper-cases words; waits at `gate` before each batch, and keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, batch: Batch) -> None:
        self.batches.append([str(ticket.work) for ticket in batch])
        self.begun.set()
        assert self.gate.wait(10)
        for ticket in batch:
            if ticket.work == "bad":
                ticket.fail(ValueError("bad word"))
            elif ticket.work == "crash":
                raise RuntimeError("crash")
            elif not ticket.abandoned:
                ticket.finish(str(ticket.work).upper())


def desk(worker: Callable[[Batch], None], size: int = 4, batch: int = 1) -> Desk[str, str]:
    made = Desk(worker, size, batch)
    made.start()
    return made


async def ask(made: Desk[str, str], word: str, *, id: str | None = None, key: str = "", timeout: float = 10) -> str:
    async with asyncio.timeout(timeout):
        return (await made.ask(id or word, word, word, key))[0]


async def begun(worker: Worker) -> None:
    assert await asyncio.to_thread(worker.begun.wait, 10)


def test_an_answer_for_each_and_a_crash_ends_only_its_own_batch():
    worker = Worker()
    made = desk(worker)

    async def run() -> list[object]:
        words = ("a", "bad", "crash", "b")
        return await asyncio.gather(*(ask(made, word) for word in words), return_exceptions=True)

    a, bad, crash, b = asyncio.run(run())
    assert (a, b) == ("A", "B")
    assert isinstance(bad, ValueError)
    assert isinstance(crash, RuntimeError)
    assert made.alive == 1


def test_what_does_not_fit_is_turned_away_with_a_time():
    worker = Worker()
    made = desk(worker, size=2)

    async def run() -> None:
        worker.gate.clear()
        first = asyncio.create_task(ask(made, "first"))
        await begun(worker)  # it runs; two more fit
        others = [asyncio.create_task(ask(made, word)) for word in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(Full) as full:
            await ask(made, "c")
        assert full.value.after >= 1
        with pytest.raises(Full):
            made.check()
        worker.gate.set()
        assert await asyncio.gather(first, *others) == ["FIRST", "A", "B"]
        assert await ask(made, "c") == "C"

    asyncio.run(run())
    assert worker.batches == [["first"], ["a"], ["b"], ["c"]]


def test_what_an_idle_worker_is_about_to_take_needs_no_place():
    made = Desk(Worker(), size=2)

    async def run() -> None:
        tasks = [asyncio.create_task(ask(made, word)) for word in "abc"]
        await asyncio.sleep(0)
        with pytest.raises(Full):
            made.check()
        made.start()
        assert await asyncio.gather(*tasks) == ["A", "B", "C"]

    asyncio.run(run())


def test_equal_keys_share_a_batch_and_others_wait_their_turn():
    worker = Worker()
    made = desk(worker, size=8, batch=3)

    async def run() -> None:
        worker.gate.clear()
        tasks = [asyncio.create_task(ask(made, "first"))]
        await begun(worker)
        for word, key in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "x"), ("e", "x")):
            tasks.append(asyncio.create_task(ask(made, word, key=key)))
        await asyncio.sleep(0)
        worker.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert worker.batches == [["first"], ["a", "c", "d"], ["b"], ["e"]]


def test_what_nobody_waits_for_is_not_begun_and_frees_its_place():
    worker = Worker()
    made = desk(worker, size=1)

    async def run() -> None:
        worker.gate.clear()
        first = asyncio.create_task(ask(made, "first"))
        await begun(worker)
        with pytest.raises(TimeoutError):
            await ask(made, "late", timeout=0.01)
        gone = asyncio.create_task(ask(made, "gone"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        after = asyncio.create_task(ask(made, "after"))  # the one place is free again
        await asyncio.sleep(0)
        worker.gate.set()
        assert await asyncio.gather(first, after) == ["FIRST", "AFTER"]

    asyncio.run(run())
    assert worker.batches == [["first"], ["after"]]


def test_a_running_ticket_learns_that_it_was_abandoned():
    seen: list[bool] = []
    left = threading.Event()

    def act(batch: Batch) -> None:
        assert left.wait(10)
        seen.append(batch[0].abandoned)

    made = desk(act)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await ask(made, "a", timeout=0.05)
        left.set()

    asyncio.run(run())
    made.close()
    for thread in made._workers:
        thread.join(10)
    assert seen == [True]


def test_the_same_id_is_the_same_work_and_another_content_is_refused():
    worker = Worker()
    made = desk(worker)

    async def run() -> None:
        worker.gate.clear()
        twins = [asyncio.create_task(ask(made, "a", id="1")) for _ in range(2)]
        await begun(worker)
        with pytest.raises(Conflict):
            await ask(made, "b", id="1")
        twins[0].cancel()  # one of two leaves: the other still gets its answer
        await asyncio.wait([twins[0]])
        worker.gate.set()
        assert await twins[1] == "A"
        assert await ask(made, "a", id="1") == "A"  # finished before: answered once more, not done once more

    asyncio.run(run())
    assert worker.batches == [["a"]]


def test_a_failure_is_not_kept_for_a_retry():
    worker = Worker()
    made = desk(worker)

    async def run() -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match="bad word"):
                await ask(made, "bad", id="1")

    asyncio.run(run())
    assert worker.batches == [["bad"], ["bad"]]


def test_few_answers_are_kept():
    worker = Worker()
    made = desk(worker)

    async def run() -> None:
        for number in range(100):
            await ask(made, str(number))
        await ask(made, "0")

    asyncio.run(run())
    assert len(worker.batches) == 101


def test_closing_ends_the_worker_and_those_who_wait():
    worker = Worker()
    made = desk(worker)

    async def run() -> None:
        worker.gate.clear()
        tasks = [asyncio.create_task(ask(made, word)) for word in "ab"]
        await begun(worker)
        made.close()
        worker.gate.set()
        for task in tasks:
            with pytest.raises(ServiceError, match="stopping"):
                await task

    asyncio.run(run())
    for thread in made._workers:
        thread.join(10)
    assert made.alive == 0
