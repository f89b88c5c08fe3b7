"""Several processes on one ledger, and processes that die: nobody's 202 is lost, nobody gets two."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from bzstream.submissions.database import Database
from tests.seeds import seeds

ROOT = Path(__file__).parents[2]


class Miners:
    """Starts one process after the other; see tests/submissions/miners.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._line() == "ready"

    def start(self, first: int, count: int) -> int:
        """Start a process; its pid."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{first} {count}\n")
        self._process.stdin.flush()
        return int(self._line().removeprefix("started "))

    def answer(self) -> tuple[int, str] | None:
        """The next (block, submission id or `-`); None when the process is gone."""
        line = self._line()
        if line == "ended":
            return None
        block, _, answer = line.partition(" ")
        return int(block), answer

    def answers(self) -> list[tuple[int, str]]:
        """All answers until the process is gone."""
        return list(iter(self.answer, None))

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")


@contextmanager
def miners(where: str) -> Iterator[Miners]:
    command = [sys.executable, "-m", "tests.submissions.miners", where]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Miners(process)
    finally:
        process.communicate(timeout=60)


def rows(where: str) -> list[tuple[int, str]]:
    database = Database(where)
    with database.read() as connection:
        found = connection.execute(text("SELECT block_number, submission_id FROM submissions")).all()
    database.close()
    return [(row.block_number, row.submission_id) for row in found]


def test_racing_processes_get_exactly_one_for_each_hotkey_and_block(where: str) -> None:
    with miners(where) as one, miners(where) as two, miners(where) as three:
        for racer in (one, two, three):
            racer.start(0, 400)
        given = [racer.answers() for racer in (one, two, three)]
    won = [(block, answer) for answers in given for block, answer in answers if answer != "-"]
    assert [len(answers) for answers in given] == [400] * 3
    assert sorted(block for block, _ in won) == list(range(400))
    assert sorted(rows(where)) == sorted(won)


@pytest.mark.parametrize(
    ("where", "kills"), [("sqlite", seeds(15, 100)), ("postgresql", seeds(8, 30))], indirect=["where"]
)
def test_every_answer_before_a_kill_is_in_the_ledger_once(where: str, kills: int) -> None:
    """SIGKILL at random moments under load; the next process opens what the one before left behind."""
    dice = random.Random(6)
    acknowledged: list[tuple[int, str]] = []
    deadline = time.monotonic() + 200
    with miners(where) as miner:
        for number in range(kills):
            assert time.monotonic() < deadline
            pid = miner.start(number * 10**6, 10**6)
            for _ in range(dice.randint(1, 40)):  # it is at work: 16 at a time
                answer = miner.answer()
                assert answer is not None
                acknowledged.append(answer)
            time.sleep(dice.uniform(0, 0.01))
            os.kill(pid, signal.SIGKILL)
            acknowledged += miner.answers()
    held = rows(where)
    assert all(answer != "-" for _, answer in acknowledged)
    assert len(dict(held)) == len(held)
    assert set(acknowledged) <= set(held)
    assert len(acknowledged) > 15 * kills
