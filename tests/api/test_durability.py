"""What a 202 is worth: it survives SIGKILL of the whole node, and of those who race for one place exactly one has it.

The node is killed a few times, in a long run a hundred times.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from bzstream.submissions.database import Database
from tests.api.desk import Desk, new_key, signed, troubles
from tests.nodes import TOKEN, Node, child_processes, eventually, running_node, write_chain
from tests.seeds import seeds
from tests.submissions.conftest import postgres_server, where

KILLS = seeds(2, 100)
RACES = seeds(10, 30)
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
__all__ = ["postgres_server", "where"]


def rows(ledger: str) -> list[tuple[str, int, int, str]]:
    """(hotkey, block_number, expert_group, submission_id) of everything that the ledger holds."""
    database = Database(ledger)
    with database.read() as connection:
        found = connection.execute(text("SELECT hotkey, block_number, expert_group, submission_id FROM submissions"))
        held = [(row.hotkey, row.block_number, row.expert_group, row.submission_id) for row in found]
    database.close()
    return held


class Miner(threading.Thread):
    """Submits over one connection until the node is gone: good ones, the same again, other ones for a taken block,
    and forged ones. Keeps every answer."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.accepted: dict[str, tuple[str, int, int]] = {}
        self.refused: set[tuple[str, int, int]] = set()
        self.repeated = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            while True:
                self._one_miner(connection)
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()

    def _one_miner(self, connection: http.client.HTTPConnection) -> None:
        key = new_key()
        good = signed(key, Desk.NOW)
        status, answer = self._send(connection, good)
        assert status == 202, answer
        self.accepted[answer["submission_id"]] = (key.ss58_address, Desk.NOW, 0)
        status, again = self._send(connection, good)
        assert (status, again["submission_id"]) == (409, answer["submission_id"])
        status, _ = self._send(connection, signed(key, Desk.NOW, expert_group=1))
        assert status == 409
        self.refused.add((key.ss58_address, Desk.NOW, 1))
        status, _ = self._send(connection, {**good, "block_number": Desk.NOW - 1})
        assert status == 400
        self.refused.add((key.ss58_address, Desk.NOW - 1, 0))

    def _send(self, connection: http.client.HTTPConnection, body: dict[str, object]) -> tuple[int, Any]:
        connection.request("POST", "/submit", json.dumps(body), HEADERS)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def kill_everything(node: Node) -> None:
    for process in (node.process.pid, *child_processes(node.process.pid)):
        with suppress(ProcessLookupError):  # the kernel, which kills the children of a dead node, was quicker
            os.kill(process, signal.SIGKILL)
    node.process.wait()


@pytest.mark.slow
def test_a_kill_right_after_an_answer_loses_nothing(place: Path) -> None:
    dice, ledger = random.Random(4), str(place / "ledger.sqlite")
    accepted: dict[str, tuple[str, int, int]] = {}
    refused: set[tuple[str, int, int]] = set()
    for _ in range(KILLS):
        with submitting_node(place, ledger) as node:
            for submission_id in list(accepted)[-3:]:
                assert Desk(node).status(submission_id)["status"] == "queued", "it came through the kill before"
            miners = [Miner(node.port) for _ in range(4)]
            for miner in miners:
                miner.start()
            while not any(miner.accepted for miner in miners):
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.15))  # a random moment under load
            kill_everything(node)
            for miner in miners:
                miner.join()
                accepted |= miner.accepted
                refused |= miner.refused
        assert troubles(node) == []
    held = rows(ledger)
    assert {row[3]: row[:3] for row in held}.items() >= accepted.items()
    assert len({row[:2] for row in held}) == len(held), "nobody is in twice"
    assert not refused & {row[:3] for row in held}
    assert len(accepted) >= KILLS


def submitting_node(place: Path, ledger: str, *arguments: str) -> Any:
    """A node whose chain stands in the submit phase from the start."""
    chain = place / "submit"
    chain.mkdir(exist_ok=True)
    write_chain(chain, new_key().ss58_address, Desk.NOW)
    environment = {"BZ_LEDGER": ledger, "BZ_SUBMIT_MAX_PER_CYCLE": "1000000"}
    return running_node(place, "--chain-file", str(chain / "chain.json"), *arguments, environment=environment)


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """What each of them returns, begun as nearly at one moment as threads can."""
    barrier, results = threading.Barrier(len(works)), [None] * len(works)

    def run(index: int, work: Callable[[], Any]) -> None:
        barrier.wait()
        results[index] = work()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_nodes_of_two_workers_race_for_one_place(node: Node, where: str, tmp_path: Path) -> None:
    """On both databases: exactly one 202 for each (hotkey, block); the others are told 409."""
    with ExitStack() as stack:
        desks = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "store").symlink_to(node.store)
            desks.append(Desk(stack.enter_context(submitting_node(tmp_path / name, where, "--workers", "2"))))
        for desk in desks:
            eventually(lambda d=desk: all(d.node.health()["status"] == "healthy" for _ in range(16)), "both workers")  # type: ignore[misc]
        for number in range(RACES):
            key = new_key()
            # The same body from everybody, or one of another group from each.
            bodies = [signed(key, Desk.NOW, expert_group=0 if number % 2 else n % 4) for n in range(8)]
            found = at_once([lambda n=n, b=body: desks[n % 2].submit(b) for n, body in enumerate(bodies)])  # type: ignore[misc]
            told = [(answer.status, answer.body) for answer in found]
            assert sorted(status for status, _ in told) == [202] + [409] * 7, told
            (winner,) = [n for n, answer in enumerate(found) if answer.status == 202]
            for answer, body in zip(found, bodies, strict=True):
                same = body == bodies[winner]
                assert answer.json.get("submission_id") == (found[winner].json["submission_id"] if same else None)
    held = rows(where)
    assert len(held) == len({row[:2] for row in held}) == RACES
