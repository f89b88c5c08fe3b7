"""Group commit: which jobs share a transaction, and when it begins."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection

from bzstream.submissions import writer
from bzstream.submissions.database import Database
from bzstream.submissions.writer import LedgerWriter


class Desk:
    """A writer whose one operation notes who shared a transaction, and holds the first one up until it is let go."""

    def __init__(self, database: Database) -> None:
        self.writer = LedgerWriter(database)
        self.groups: list[list[int]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.callers = ThreadPoolExecutor(16)

    def operation(self, _: Connection, numbers: Sequence[int]) -> Sequence[int]:
        self.begun.set()
        assert self.go_on.wait(10)
        self.groups.append(sorted(numbers))
        return numbers

    def do(self, *numbers: int) -> None:
        """Do the jobs, which come at the same time, and wait for them."""
        assert tuple(self.callers.map(lambda n: self.writer.call(self.operation, n), numbers)) == numbers


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    database = Database(tmp_path / "ledger.sqlite")
    desk = Desk(database)
    yield desk
    desk.go_on.set()
    desk.writer.close()
    desk.callers.shutdown()
    database.close()


def eight_in_one_transaction(desk: Desk) -> None:
    """Eight jobs come while the transaction of job 0 is under way, and are then done together."""
    first = desk.callers.submit(desk.do, 0)
    assert desk.begun.wait(10)
    others = [desk.callers.submit(desk.writer.call, desk.operation, number) for number in range(1, 9)]
    while desk.writer.waiting < 8:
        time.sleep(0.001)
    desk.go_on.set()
    first.result(10)
    assert [other.result(10) for other in others] == list(range(1, 9))
    assert desk.groups == [[0], list(range(1, 9))]


def test_who_comes_alone_waits_for_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PACE_S", 60.0)
    desk.go_on.set()
    for number in range(5):
        desk.do(number)
    assert desk.groups == [[0], [1], [2], [3], [4]]


def test_what_waits_is_done_together(desk: Desk) -> None:
    eight_in_one_transaction(desk)


def test_a_transaction_waits_for_as_many_as_the_one_before_had(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PACE_S", 60.0)
    eight_in_one_transaction(desk)
    desk.do(*range(9, 17))
    assert desk.groups[2:] == [list(range(9, 17))]


def test_a_transaction_does_not_wait_for_long(desk: Desk) -> None:
    eight_in_one_transaction(desk)
    desk.do(9)
    assert desk.groups[2:] == [[9]]


def test_what_waits_is_done_before_the_writer_ends(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PACE_S", 60.0)
    eight_in_one_transaction(desk)
    last = desk.callers.submit(desk.do, 9)
    while not desk.writer.waiting:
        time.sleep(0.001)
    desk.writer.close()
    last.result(10)
    assert desk.groups[2:] == [[9]]
