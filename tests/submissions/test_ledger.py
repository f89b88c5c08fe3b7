"""The ledger on SQLite and on PostgreSQL: what is taken, what is refused, and who may change it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, text

from bzstream.chain.commitments import Commitment, RoundCommitments, commitment_text
from bzstream.chain.round_base import RoundBase
from bzstream.chain.state import ChainState
from bzstream.chain.weights import RoundWeights
from bzstream.submissions.admission import Admission
from bzstream.submissions.database import Database, LedgerUnavailable
from bzstream.submissions.ledger import AsyncLedger, LeaseLost, Ledger, LedgerError
from bzstream.submissions.types import (
    AdmissionResult,
    Admitted,
    Candidate,
    Duplicate,
    EvaluationRow,
    Job,
    LimitReached,
    SubmissionRow,
)
from bzstream.submissions.writer import LedgerWriter
from tests.submissions.values import HOTKEYS, ROUND, accepted, candidate, in_loop


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that really happens elsewhere (a lease that runs out), 10 s at most."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def find(ledger: Ledger, submission_id: str) -> SubmissionRow:
    record = ledger.find(submission_id)
    assert record is not None
    return record


# --- accepting ---


def test_what_is_accepted_can_be_found(ledger: Ledger) -> None:
    submission_id = accepted(ledger.accept(candidate(checkpoint_hash="sha256:" + "0" * 64)))
    record = find(ledger, submission_id)
    assert (record.hotkey, record.block_number, record.round) == (HOTKEYS[0], 12530, ROUND)
    assert (record.status, record.reason, record.score) == ("queued", None, None)
    assert abs(record.received_at - time.time()) < 60
    assert ledger.find("no such id") is None


def test_a_hotkey_and_block_are_taken_for_ever(ledger: Ledger, where: str) -> None:
    first = accepted(ledger.accept(candidate()))
    assert ledger.accept(candidate()) == Duplicate(first)
    assert ledger.accept(candidate(url="https://miner.example/other")) == Duplicate(None)
    ledger.close()
    again = Ledger.open(where)
    assert again.accept(candidate(round_=ROUND + 420)) == Duplicate(first)
    again.close()


def test_a_cycle_has_its_limit_for_each_hotkey(ledger: Ledger) -> None:
    ids = [accepted(ledger.accept(candidate(block=block, limit=2))) for block in (1, 2)]
    assert ledger.accept(candidate(block=3, limit=2)) == LimitReached(2)
    assert ledger.accept(candidate(block=2, limit=2)) == Duplicate(ids[1])  # 409 comes before 429
    accepted(ledger.accept(candidate(HOTKEYS[1], block=3, limit=2)))
    accepted(ledger.accept(candidate(block=3, round_=ROUND + 420, limit=2)))


def test_the_last_of_a_cycle_counts(ledger: Ledger) -> None:
    ids = [accepted(ledger.accept(candidate(block=block))) for block in (1, 2, 3)]
    other = accepted(ledger.accept(candidate(HOTKEYS[1])))
    records = [find(ledger, i) for i in ids]
    assert [record.status for record in records] == ["rejected", "rejected", "queued"]
    assert [record.reason for record in records] == ["superseded", "superseded", None]
    assert find(ledger, other).status == "queued"
    scores = ledger.scores(ROUND)
    assert scores is not None
    assert [record.submission_id for record in scores.results] == [ids[2], other]


@pytest.fixture
def writer(ledger: Ledger, where: str) -> Iterator[LedgerWriter]:
    """A second writer on the ledger's database, for operations that the ledger does not have."""
    database = Database(where)
    made = LedgerWriter(database)
    yield made
    made.close()
    database.close()


def test_many_at_once_are_decided_as_if_one_came_after_the_other(ledger: Ledger, writer: LedgerWriter) -> None:
    group = [*(candidate(block=block, limit=2) for block in (1, 1, 2, 3)), candidate(HOTKEYS[1], block=1)]

    def together(connection: Connection, groups: Sequence[Sequence[Candidate]]) -> Sequence[Sequence[AdmissionResult]]:
        return [Admission()(connection, group) for group in groups]

    outcomes = writer.call(together, group)
    first, second, other = accepted(outcomes[0]), accepted(outcomes[2]), accepted(outcomes[4])
    assert outcomes[1] == Duplicate(first)
    assert outcomes[3] == LimitReached(2)
    assert [find(ledger, i).reason for i in (first, second, other)] == ["superseded", None, None]


def test_the_estimate_counts_the_seed_the_queue_and_past_evaluations(ledger: Ledger) -> None:
    outcomes = [ledger.accept(candidate(hotkey)) for hotkey in HOTKEYS[:3]]
    assert [outcome.ahead for outcome in outcomes if isinstance(outcome, Admitted)] == [0, 1, 2]
    fast = Admitted("id", ahead=9, evaluators=2, mean_seconds=6.0)
    assert fast.eta_blocks(blocks_to_seed=70, block_s=12.0) == 70 + 3  # (9 / 2 + 1) * 6 s = 33 s
    assert Admitted("id", 0, 1, None).eta_blocks(blocks_to_seed=1, block_s=12.0) == 2
    assert Admitted("id", 0, 1, 0.0).eta_blocks(blocks_to_seed=0, block_s=12.0) == 1


@pytest.mark.parametrize("where", ["sqlite", "postgresql"], indirect=True)
def test_racing_threads_and_ledgers_get_exactly_one(where: str) -> None:
    """Two ledgers stand for two machines: each has its own connections and writer."""
    ledgers = [Ledger.open(where), Ledger.open(where)]
    start = threading.Barrier(16)

    def race(number: int) -> list[str]:
        start.wait()
        outcomes = [ledgers[number % 2].accept(candidate(block=block, limit=100)) for block in range(8)]
        return [outcome.submission_id for outcome in outcomes if isinstance(outcome, Admitted)]

    with ThreadPoolExecutor(16) as pool:
        won = [submission_id for ids in pool.map(race, range(16)) for submission_id in ids]
    assert len(won) == len(set(won)) == 8
    scores = ledgers[0].scores(ROUND)
    assert scores is not None
    assert [record.status for record in scores.results] == ["queued"]
    for ledger in ledgers:
        ledger.close()


@in_loop
async def test_group_commit_answers_nobody_before_the_commit(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = AsyncLedger.open(where)
    commits = 0
    inner = Database.write

    def counting(self: Database) -> object:
        nonlocal commits
        commits += 1
        return inner(self)

    monkeypatch.setattr(Database, "write", counting)
    outcomes = await asyncio.gather(*[ledger.accept(candidate(hotkey, b)) for hotkey in HOTKEYS for b in (1, 2, 3)])
    ids = [accepted(outcome) for outcome in outcomes]
    assert commits < len(ids) / 4
    # Another process would see every one of them: they are committed, not pending.
    other = AsyncLedger.open(where)
    assert all([await other.find(i) for i in ids])
    await asyncio.to_thread(other.close)
    await asyncio.to_thread(ledger.close)


@in_loop
async def test_a_cancelled_caller_disturbs_nobody(where: str) -> None:
    ledger = AsyncLedger.open(where)
    tasks = [asyncio.create_task(ledger.accept(candidate(hotkey))) for hotkey in HOTKEYS[:8]]
    await asyncio.sleep(0)
    tasks[3].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[3], asyncio.CancelledError)
    assert sum(isinstance(outcome, Admitted) for outcome in outcomes) == 7
    await asyncio.to_thread(ledger.close)


@in_loop
async def test_one_that_the_database_refuses_fails_alone(where: str) -> None:
    """PostgreSQL takes no NUL in a text; intake never lets one through."""
    ledger = AsyncLedger.open(where)
    group = [candidate(HOTKEYS[0]), candidate(HOTKEYS[1], url="https://x.example/\0"), candidate(HOTKEYS[2])]
    outcomes = await asyncio.gather(*map(ledger.accept, group), return_exceptions=True)
    assert isinstance(outcomes[0], Admitted)
    assert isinstance(outcomes[2], Admitted)
    assert isinstance(outcomes[1], LedgerError if "postgresql" in where else Admitted)
    assert await ledger.find("\0") is None
    await asyncio.to_thread(ledger.close)


def test_a_failing_operation_takes_nobody_along(ledger: Ledger, writer: LedgerWriter) -> None:
    def broken(connection: Connection, _: object) -> list[None]:
        connection.execute(text("DELETE FROM submissions"))
        raise LedgerError("on purpose")

    submission_id = accepted(ledger.accept(candidate()))
    with pytest.raises(LedgerError, match="on purpose"):
        writer.call(broken, None)
    assert find(ledger, submission_id).status == "queued"


def test_a_failing_commit_is_told_to_everybody_in_it(ledger: Ledger, writer: LedgerWriter) -> None:
    def broken(connection: Connection, _: object) -> list[None]:
        connection.execute(text("SELECT * FROM no_such_table"))
        return []

    with pytest.raises(LedgerUnavailable, match="no_such_table"):
        writer.call(broken, None)
    accepted(ledger.accept(candidate()))


# --- leases ---


def claim(ledger: Ledger, worker: str = "a", lease_s: float = 60.0, **more: int) -> list[Job]:
    return ledger.claim(worker, lease_s=lease_s, **more)


def test_a_job_goes_its_way(ledger: Ledger) -> None:
    accepted(ledger.accept(candidate()))
    (job,) = claim(ledger)
    assert (job.record.status, job.record.attempts) == ("fetching", 1)
    assert claim(ledger, "b") == []
    job = ledger.advance(job, "verifying", content_hash="sha256:" + "1" * 64)
    assert job.record.fetched_at is not None
    job = ledger.advance(job, "evaluating")
    job = ledger.advance(job, "scored", baseline_loss=2.5, loss=2.0, score=0.5, model_version="step_1000")
    record = find(ledger, job.record.submission_id)
    assert (record.status, record.score, record.loss, record.baseline_loss) == ("scored", 0.5, 2.0, 2.5)
    assert record.finished_at is not None
    scores = ledger.scores()
    assert scores is not None
    assert (scores.round, scores.model_version, scores.results) == (ROUND, "step_1000", (record,))
    with pytest.raises(LeaseLost):
        ledger.advance(Job(record, job.token), "rejected", reason="late")
    assert ledger.reject(record.submission_id, "copy")
    assert not ledger.reject(record.submission_id, "copy")
    record = find(ledger, record.submission_id)
    assert (record.status, record.reason, record.score) == ("rejected", "copy", 0.0)


def test_jobs_come_oldest_first_and_once(ledger: Ledger) -> None:
    ids = [accepted(ledger.accept(candidate(hotkey))) for hotkey in HOTKEYS[:5]]
    claimed = claim(ledger, limit=2) + claim(ledger, "b", limit=2) + claim(ledger, limit=2)
    assert [job.record.submission_id for job in claimed] == ids


def test_a_dead_evaluators_job_returns_and_its_late_result_is_refused(ledger: Ledger) -> None:
    accepted(ledger.accept(candidate()))
    (lost,) = claim(ledger, "dead", lease_s=0.02)
    taken: list[Job] = []

    def take() -> bool:
        taken.extend(claim(ledger, "alive"))
        return bool(taken)

    until(take)
    assert taken[0].record.attempts == 2
    with pytest.raises(LeaseLost):
        ledger.advance(lost, "verifying")
    assert ledger.renew([lost], lease_s=60) == frozenset()
    ledger.advance(taken[0], "verifying")


def test_a_lease_that_ran_out_counts_as_lost_even_before_another_claims(ledger: Ledger) -> None:
    accepted(ledger.accept(candidate()))
    (job,) = claim(ledger)
    until(lambda: not ledger.renew([job], lease_s=0.0001))
    with pytest.raises(LeaseLost):
        ledger.advance(job, "failed", reason="crash")


def test_a_renewed_lease_lasts(ledger: Ledger) -> None:
    ids = [accepted(ledger.accept(candidate(hotkey))) for hotkey in HOTKEYS[:2]]
    jobs = claim(ledger, lease_s=1.0, limit=2)
    assert ledger.renew(jobs, lease_s=60) == frozenset(ids)
    deadline = time.monotonic() + 1.2
    until(lambda: time.monotonic() > deadline)
    assert claim(ledger, "b") == []


def test_what_kills_evaluators_fails_in_the_end(ledger: Ledger) -> None:
    submission_id = accepted(ledger.accept(candidate()))
    for _ in range(2):
        until(lambda: bool(claim(ledger, lease_s=0.01, max_attempts=2)))
    until(lambda: not claim(ledger, lease_s=0.01, max_attempts=2) and find(ledger, submission_id).status == "failed")
    record = find(ledger, submission_id)
    assert (record.reason, record.score) == ("evaluator_lost", None)


def test_a_job_given_back_costs_no_attempt(ledger: Ledger) -> None:
    accepted(ledger.accept(candidate()))
    (job,) = claim(ledger)
    ledger.advance(job, "queued")
    (again,) = claim(ledger, "b")
    assert again.record.attempts == 1


def test_a_superseded_job_is_lost_to_its_evaluator(ledger: Ledger) -> None:
    accepted(ledger.accept(candidate(block=1)))
    (job,) = claim(ledger)
    accepted(ledger.accept(candidate(block=2)))
    with pytest.raises(LeaseLost):
        ledger.advance(job, "verifying")
    assert find(ledger, job.record.submission_id).reason == "superseded"


def test_a_step_that_the_table_does_not_have_is_a_bug(ledger: Ledger) -> None:
    accepted(ledger.accept(candidate()))
    (job,) = claim(ledger)
    with pytest.raises(ValueError, match="fetching to scored"):
        ledger.advance(job, "scored", score=1.0)


def test_precedence_is_the_submission_if_it_proved_its_hash(ledger: Ledger) -> None:
    content = "sha256:" + "ab" * 32
    for number, signed in enumerate((content, "sha256:" + "cd" * 32, None)):
        accepted(ledger.accept(candidate(HOTKEYS[number], checkpoint_hash=signed)))
    records = [ledger.advance(job, "verifying", content_hash=content).record for job in claim(ledger, limit=3)]
    assert [r.precedence for r in records] == [records[0].received_at, records[1].fetched_at, records[2].fetched_at]


# --- scores ---


def test_scores_of_no_round_are_none(ledger: Ledger) -> None:
    assert ledger.scores() is None
    accepted(ledger.accept(candidate()))
    assert ledger.scores() is None
    assert ledger.scores(ROUND) is not None
    assert ledger.scores(ROUND + 420) is None


# --- the chain's state ---

STATE = ChainState(12345, 0.0, frozenset(HOTKEYS[:2]), frozenset(HOTKEYS), True, {12180: "ab" * 32})


def test_the_chains_state_comes_back_with_its_age(ledger: Ledger, where: str) -> None:
    assert ledger.chain_state() is None
    other = Ledger.open(where)
    for state in (STATE, ChainState(12346, 0.0, frozenset(), None, False, {})):
        for age in (0.0, 100.0):
            written = ChainState(
                state.block, time.time() - age, state.validators, state.miners, state.frozen, state.hashes
            )
            ledger.write_chain_state(written)
            for reader in (ledger, other, other):
                read = reader.chain_state()
                assert read is not None
                assert abs(read.age() - age) < 5
                assert (read.block, read.validators, read.miners) == (state.block, state.validators, state.miners)
                assert (read.frozen, dict(read.hashes)) == (state.frozen, dict(state.hashes))
    other.close()


def test_what_became_of_a_rounds_weights_is_remembered(ledger: Ledger) -> None:
    assert ledger.round_weights() is None
    sent = RoundWeights(ROUND, {"a": 0.75, "b": 0.25}, "sent", None, 1, 12600)
    landed = RoundWeights(ROUND, {"a": 0.75, "b": 0.25}, "set", None, 1, 12602)
    earlier = RoundWeights(ROUND - 420, {}, "refused", "no permit")
    for weights in (sent, earlier, landed):
        ledger.write_round_weights(weights)
    assert ledger.round_weights(ROUND) == ledger.round_weights() == landed
    assert ledger.weights_before(ROUND) == earlier
    assert ledger.weights_before(ROUND - 420) is None


@in_loop
async def test_the_async_face_reads_too(where: str) -> None:
    ledger = AsyncLedger.open(where)
    await ledger.write_chain_state(STATE)
    state = await ledger.chain_state()
    assert state is not None
    assert state.block == 12345
    assert await ledger.find("nothing") is None
    assert await ledger.scores() is None
    await ledger.write_round_weights(RoundWeights(ROUND))
    assert await ledger.round_weights() == await ledger.weights_before(ROUND + 1) == RoundWeights(ROUND)
    await asyncio.to_thread(ledger.close)


# --- opening ---


def test_ledgers_opened_at_once_are_made_once(where: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        ledgers = list(pool.map(lambda _: Ledger.open(where), range(8)))
    accepted(ledgers[0].accept(candidate()))
    assert isinstance(ledgers[7].accept(candidate()), Duplicate)
    for ledger in ledgers:
        ledger.close()


def test_what_cannot_be_opened_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database at all")
    for place in (
        tmp_path / "no" / "ledger",
        tmp_path,
        tmp_path / "text",
        "mysql://u:secret@h/d",
        "postgresql://%zz:[",
    ):
        with pytest.raises(LedgerError) as caught:
            Ledger.open(place)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_said_without_the_password() -> None:
    with pytest.raises(LedgerUnavailable) as caught:
        Ledger.open("postgresql://user:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_the_file_is_its_owners_and_full_sync(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    ledger = Ledger.open(file)
    accepted(ledger.accept(candidate()))
    for name in os.listdir(tmp_path):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    ledger.close()
    database = Database(file)
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
    database.close()
    with pytest.raises(LedgerUnavailable, match="closed"):
        ledger.accept(candidate())


def test_a_locked_ledger_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bzstream.submissions.database.LOCK_TIMEOUT_S", 0.05)
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerUnavailable, match="locked"):
        ledger.accept(candidate())
    assert ledger.find("x") is None  # readers are not held up
    other.execute("ROLLBACK")
    other.close()
    accepted(ledger.accept(candidate()))
    ledger.close()


def test_postgresql_commits_are_durable_whatever_the_servers_default(postgres_server: str) -> None:
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE careless")
        connection.execute("ALTER DATABASE careless SET synchronous_commit = off")
    database = Database(f"{postgres_server}/careless")
    with database.write() as connection_:
        assert connection_.execute(text("SHOW synchronous_commit")).scalar_one() == "on"
    database.close()


def test_an_evaluator_shows_that_it_lives(ledger: Ledger, where: str) -> None:
    async def age() -> float | None:
        opened = AsyncLedger.open(where)
        try:
            return await opened.evaluator_age()
        finally:
            opened.close()

    assert asyncio.run(age()) is None
    for worker in ("one", "two", "one"):
        ledger.heartbeat(worker)
    seconds = asyncio.run(age())
    assert seconds is not None
    assert 0 <= seconds < 60


def test_the_base_of_a_round_is_written_once(ledger: Ledger, where: str) -> None:
    assert ledger.round_base(ROUND) is None
    assert ledger.write_round_base(RoundBase(ROUND, "step_1000", 12199))
    assert not ledger.write_round_base(RoundBase(ROUND, "step_2000", 12200))
    assert ledger.round_base(ROUND) == "step_1000"
    assert ledger.round_base(ROUND - 420) is None
    with contextlib.closing(Ledger.open(where)) as again:
        assert again.round_base(ROUND) == "step_1000"


def test_an_evaluation_is_kept_in_place_of_an_earlier_one(ledger: Ledger) -> None:
    rows = [EvaluationRow("a", ROUND, 1, weights, "sketch", f"record of {weights}", b"") for weights in ("old", "new")]
    for row in (
        *rows,
        EvaluationRow("b", ROUND, 2, "other", "", "", b""),
        EvaluationRow("c", ROUND + 420, 1, "", "", "", b""),
    ):
        ledger.write_evaluation(row)
    assert ledger.evaluation("a") == rows[1]
    assert ledger.evaluation("d") is None
    assert ledger.evaluations(ROUND, 1) == [dataclasses.replace(rows[1], record="")]


@pytest.mark.parametrize("first", ["fetched", "committed"])
def test_a_commitment_gives_precedence_to_the_file_it_is_about(ledger: Ledger, first: str) -> None:
    """Whichever the ledger learns first: the commitment, or what the file turned out to be."""
    files = {HOTKEYS[0]: "ab" * 32, HOTKEYS[1]: "ab" * 32, HOTKEYS[2]: "cd" * 32}
    found = RoundCommitments(
        ROUND,
        {
            HOTKEYS[0]: Commitment(commitment_text(HOTKEYS[0], "ab" * 32), 12505),
            HOTKEYS[1]: Commitment(commitment_text(HOTKEYS[0], "ab" * 32), 12504),  # copied from the first
            HOTKEYS[2]: Commitment(commitment_text(HOTKEYS[2], "ef" * 32), 12503),  # to another file
        },
    )
    ids = {hotkey: accepted(ledger.accept(candidate(hotkey))) for hotkey in files}
    if first == "committed":
        ledger.write_commitments(found)
    for job in claim(ledger, limit=3):
        job = ledger.advance(job, "verifying", content_hash=f"sha256:{files[job.record.hotkey]}")
        assert job.record.committed_block == (
            12505 if (first, job.record.hotkey) == ("committed", HOTKEYS[0]) else None
        )
    for _ in range(2):
        ledger.write_commitments(found)
    rows = {hotkey: find(ledger, ids[hotkey]) for hotkey in files}
    assert [rows[hotkey].committed_block for hotkey in files] == [12505, None, None]
    assert rows[HOTKEYS[0]].precedence < min(rows[HOTKEYS[1]].precedence, rows[HOTKEYS[2]].precedence)
    ledger.write_commitments(RoundCommitments(ROUND - 420, {}))
    assert find(ledger, ids[HOTKEYS[0]]).committed_block == 12505
