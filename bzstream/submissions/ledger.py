"""The ledger: submissions and what became of them, evaluations, rounds and the chain's state; durable, shared by all.

`Ledger` is for ordinary threads (the evaluator, commands). `AsyncLedger` has the same for an event loop (the http
worker, the chain role). Writes go through one thread that commits them in groups (`writer`), reads through another
thread with its own connection, so that the event loop never waits for the disk. Open a ledger after forking, not
before.

A worker asks for the chain's state several times a second: one indexed row, whose large part (who is registered) is
fetched only when its version changed. Its age is measured by the database's clock on both sides, so that machines with
different clocks agree on what is stale.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

from sqlalchemy import ColumnElement, Connection, bindparam, delete, func, insert, select, true, update

from bzstream.chain.commitments import RoundCommitments
from bzstream.chain.round_base import RoundBase
from bzstream.chain.state import ChainState
from bzstream.chain.weights import RoundWeights
from bzstream.submissions.admission import Admission
from bzstream.submissions.commitments import write_all
from bzstream.submissions.database import Database, LedgerUnavailable
from bzstream.submissions.leases import (
    COLUMNS,
    Advance,
    Claim,
    LeaseLost,
    Renewal,
    advance_all,
    claim_all,
    reject_all,
    renew_all,
    row_of,
)
from bzstream.submissions.pay import gains_of, unsettled_groups, write_pays
from bzstream.submissions.schema import (
    LedgerError,
    chain_state,
    db_now,
    evaluations,
    evaluators,
    migrate,
    round_bases,
    round_weights,
    submissions,
)
from bzstream.submissions.states import UNFINISHED, Status, may_follow
from bzstream.submissions.types import (
    AdmissionResult,
    Candidate,
    EvaluationRow,
    GroupPay,
    Job,
    RoundScores,
    SubmissionRow,
)
from bzstream.submissions.writer import LedgerWriter

__all__ = ["AsyncLedger", "LeaseLost", "Ledger", "LedgerError", "LedgerUnavailable"]

_T = TypeVar("_T")

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

MAX_ATTEMPTS = 3
"""Evaluators that one submission may cost before it is `failed`."""


class _LedgerBase:
    """What both faces share: the threads, and the reader's memory of the chain's state."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._writer = LedgerWriter(database)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ledger-reader")
        self._accept = Admission()
        self._registered: tuple[int, dict[str, Any]] | None = None

    @classmethod
    def open(cls, where: str | Path) -> Self:
        """Open (and create or migrate) the ledger: a file for SQLite, or a postgresql:// URL. Raises LedgerError."""
        database = Database(where)
        try:
            with database.write() as connection:
                migrate(connection)
        except BaseException:
            database.close()
            raise
        return cls(database)

    def close(self) -> None:
        """Commit what waits, then let go of the database."""
        self._writer.close()
        self._reader.shutdown()
        self._database.close()

    def _reading(self, work: Callable[[Connection], _T]) -> _T:
        with self._database.read() as connection:
            return work(connection)

    def _chain_state(self, connection: Connection) -> ChainState | None:
        row = connection.execute(_CHAIN_HEAD).one_or_none()
        if row is None:
            return None
        if self._registered is None or self._registered[0] != row.version:
            payload = connection.execute(select(chain_state.c.payload)).scalar_one()
            self._registered = (row.version, _unpack(payload))
        return ChainState(block=row.block, observed_at=time.time() - row.age, frozen=row.frozen, **self._registered[1])


class Ledger(_LedgerBase):
    """The ledger for ordinary threads; every method waits. All may raise LedgerUnavailable."""

    def accept(self, candidate: Candidate) -> AdmissionResult:
        """Take a submission in, or say why not. When it returns Admitted the submission is on disk."""
        return self._writer.call(self._accept, candidate)

    def find(self, submission_id: str) -> SubmissionRow | None:
        """The submission with this id."""
        return self._read(lambda connection: _find(connection, submission_id))

    def scores(self, round_: int | None = None) -> RoundScores | None:
        """One round's submissions; without a number the latest round with results. None when there is no such round."""
        return self._read(lambda connection: _scores(connection, round_))

    def chain_state(self) -> ChainState | None:
        """What the chain role wrote last; None before it wrote anything."""
        return self._read(self._chain_state)

    def write_chain_state(self, state: ChainState) -> None:
        """Replace the chain's state, or confirm it (the chain role's heartbeat)."""
        self._writer.call(_write_chain_state, state)

    def claim(self, worker: str, *, lease_s: float, limit: int = 1, max_attempts: int = MAX_ATTEMPTS) -> list[Job]:
        """Up to `limit` jobs, oldest first, now `fetching` under a lease of `lease_s` seconds."""
        return self._writer.call(claim_all, Claim(worker, limit, lease_s, max_attempts))

    def renew(self, jobs: Sequence[Job], *, lease_s: float) -> frozenset[str]:
        """Hold jobs for `lease_s` seconds from now; the ids of those that are still held, the others are lost."""
        return self._writer.call(renew_all, Renewal(tuple(jobs), lease_s))

    def advance(
        self,
        job: Job,
        status: Status,
        *,
        reason: str | None = None,
        content_hash: str | None = None,
        model_version: str | None = None,
        baseline_loss: float | None = None,
        loss: float | None = None,
        score: float | None = None,
    ) -> Job:
        """Bring a job into its next status and write what is given; final ones end the lease. Raises LeaseLost.

        `rejected` has score 0 and `failed` none; `queued` gives the job back (its attempt then does not count).
        Raises ValueError for a step that the table of states does not have.
        """
        if not may_follow(job.record.status, status):
            raise ValueError(f"a submission does not come from {job.record.status} to {status}")
        given = {
            "reason": reason,
            "content_hash": content_hash,
            "model_version": model_version,
            "baseline_loss": baseline_loss,
            "loss": loss,
            "score": 0.0 if status == "rejected" else score,
        }
        values = {name: value for name, value in given.items() if value is not None}
        advanced = self._writer.call(advance_all, Advance(job, status, values))
        if isinstance(advanced, LeaseLost):
            raise advanced
        return advanced

    def reject(self, submission_id: str, reason: str) -> bool:
        """Turn a finished submission into `rejected` (a copy, found out later); False when it was rejected already."""
        return self._writer.call(reject_all, (submission_id, reason))

    def heartbeat(self, worker: str) -> None:
        """Note that the evaluator `worker` is alive; `AsyncLedger.evaluator_age` tells when one was last."""
        self._writer.call(_heartbeat, worker)

    def round_weights(self, round_: int | None = None) -> RoundWeights | None:
        """What became of a round's weights; without a number of the newest round that has any."""
        return self._read(lambda connection: _weights_of_round(connection, round_))

    def weights_before(self, round_: int) -> RoundWeights | None:
        """What became of the weights of the newest round before `round_` that has any."""
        return self._read(lambda connection: _newest_weights(connection, round_weights.c.round < round_))

    def write_round_weights(self, weights: RoundWeights) -> None:
        """Keep what became of a round's weights, in place of what was known before."""
        self._writer.call(_write_round_weights, weights)

    def write_commitments(self, commitments: RoundCommitments) -> None:
        """Keep what the miners committed on the chain for a round, in place of what was known before."""
        self._writer.call(write_all, commitments)

    def write_evaluation(self, row: EvaluationRow) -> None:
        """Keep the evaluation of a submission, in place of an earlier one of it."""
        self._writer.call(_write_evaluations, row)

    def evaluation(self, submission_id: str) -> EvaluationRow | None:
        """The evaluation of a submission, without its `gains`."""
        rows = self._read(lambda connection: _evaluations(connection, _evaluation.submission_id == submission_id))
        return rows[0] if rows else None

    def evaluations(self, round_: int, group: int) -> list[EvaluationRow]:
        """All evaluations of a round for a group, each without its `record` and `gains`, which are long."""
        chosen = (_evaluation.round == round_, _evaluation.expert_group == group)
        return self._read(lambda connection: _evaluations(connection, *chosen, record=False))

    def gains(self, round_: int, group: int) -> dict[str, bytes]:
        """Submission id -> the gains of its evaluation (`EvaluationRow`), of a round's for a group that are kept."""
        return self._read(lambda connection: gains_of(connection, round_, group))

    def unsettled(self, since: int) -> list[tuple[int, int]]:
        """(round, group) that no evaluator works on any more and whose pay is not written; rounds from `since` on."""
        return self._read(lambda connection: unsettled_groups(connection, since))

    def write_pay(self, pay: GroupPay) -> None:
        """Keep what a group's submissions earned, where their status is still the one given.

        Deletes the gains of earlier rounds, except of what was scored and has no pay yet.
        """
        self._writer.call(write_pays, pay)

    def round_base(self, round_: int) -> str | None:
        """The model version that a round is scored against; None when the chain role has not noted it."""
        return self._read(lambda connection: _round_bases(connection, round_)).get(round_)

    def write_round_base(self, base: RoundBase) -> bool:
        """Keep the base of a round; False when the round has one already, which stays."""
        return self._writer.call(_write_round_bases, base)

    def _read(self, work: Callable[[Connection], _T]) -> _T:
        return self._reader.submit(self._reading, work).result()


class AsyncLedger(_LedgerBase):
    """The ledger for an event loop: nothing here blocks it. All may raise LedgerUnavailable."""

    async def accept(self, candidate: Candidate) -> AdmissionResult:
        """As Ledger.accept. A caller that is cancelled meanwhile may still have been accepted."""
        return await self._writer.submit(self._accept, candidate)

    async def find(self, submission_id: str) -> SubmissionRow | None:
        """As Ledger.find."""
        return await self._read(lambda connection: _find(connection, submission_id))

    async def scores(self, round_: int | None = None) -> RoundScores | None:
        """As Ledger.scores."""
        return await self._read(lambda connection: _scores(connection, round_))

    async def chain_state(self) -> ChainState | None:
        """As Ledger.chain_state."""
        return await self._read(self._chain_state)

    async def write_chain_state(self, state: ChainState) -> None:
        """As Ledger.write_chain_state."""
        await self._writer.submit(_write_chain_state, state)

    async def evaluator_age(self) -> float | None:
        """Seconds since any evaluator's last sign of life; None when there never was one."""
        return await self._read(lambda connection: connection.execute(_EVALUATOR_AGE).scalar_one())

    async def round_weights(self, round_: int | None = None) -> RoundWeights | None:
        """As Ledger.round_weights."""
        return await self._read(lambda connection: _weights_of_round(connection, round_))

    async def weights_before(self, round_: int) -> RoundWeights | None:
        """As Ledger.weights_before."""
        return await self._read(lambda connection: _newest_weights(connection, round_weights.c.round < round_))

    async def write_round_weights(self, weights: RoundWeights) -> None:
        """As Ledger.write_round_weights."""
        await self._writer.submit(_write_round_weights, weights)

    async def write_commitments(self, commitments: RoundCommitments) -> None:
        """As Ledger.write_commitments."""
        await self._writer.submit(write_all, commitments)

    async def round_bases(self, since: int) -> dict[int, str]:
        """Round -> the model version that it is scored against, of the rounds from `since` on."""
        return await self._read(lambda connection: _round_bases(connection, since))

    async def write_round_base(self, base: RoundBase) -> bool:
        """As Ledger.write_round_base."""
        return await self._writer.submit(_write_round_bases, base)

    async def _read(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._reading, work)


_table = submissions.c
_evaluation = evaluations.c
_CHAIN_HEAD = select(
    chain_state.c.version,
    chain_state.c.block,
    chain_state.c.frozen,
    (db_now() - chain_state.c.observed_at).label("age"),
)
_EVALUATOR_AGE = select(db_now() - func.max(evaluators.c.seen_at))
_FIND = select(*COLUMNS).where(_table.submission_id == bindparam("id"))
_COUNTED = func.coalesce(_table.reason, "") != "superseded"
# `not in` on purpose: it leaves the index by round, newest first, as the one to use.
_LATEST = select(_table.round).where(_table.status.not_in(UNFINISHED), _COUNTED).order_by(_table.round.desc()).limit(1)
_ROUND = select(*COLUMNS).where(_table.round == bindparam("round"), _COUNTED).order_by(_table.seq)


def _find(connection: Connection, submission_id: str) -> SubmissionRow | None:
    if not _ID.fullmatch(submission_id):  # PostgreSQL takes no NUL in a text
        return None
    row = connection.execute(_FIND, {"id": submission_id}).one_or_none()
    return None if row is None else row_of(row)


def _scores(connection: Connection, round_: int | None) -> RoundScores | None:
    if round_ is None:
        round_ = connection.execute(_LATEST).scalar_one_or_none()
    records = tuple(row_of(row) for row in connection.execute(_ROUND, {"round": round_}))
    if round_ is None or not records:
        return None
    version = next((record.model_version for record in records if record.model_version is not None), None)
    return RoundScores(round_, version, records)


def _heartbeat(connection: Connection, workers: Sequence[str]) -> Sequence[None]:
    for worker in set(workers):
        connection.execute(delete(evaluators).where(evaluators.c.worker == worker))
        connection.execute(insert(evaluators).values(worker=worker, seen_at=db_now()))
    return [None] * len(workers)


def _weights_of_round(connection: Connection, round_: int | None) -> RoundWeights | None:
    return _newest_weights(connection, true() if round_ is None else round_weights.c.round == round_)


def _newest_weights(connection: Connection, chosen: ColumnElement[bool]) -> RoundWeights | None:
    newest = select(round_weights).where(chosen).order_by(round_weights.c.round.desc()).limit(1)
    row = connection.execute(newest).one_or_none()
    return None if row is None else RoundWeights(**{**row._mapping, "shares": json.loads(row.shares)})


def _write_round_weights(connection: Connection, written: Sequence[RoundWeights]) -> Sequence[None]:
    for weights in written:
        connection.execute(delete(round_weights).where(round_weights.c.round == weights.round))
        values = {**asdict(weights), "shares": json.dumps(weights.shares)}
        connection.execute(insert(round_weights).values(**values))
    return [None] * len(written)


def _evaluations(connection: Connection, *chosen: ColumnElement[bool], record: bool = True) -> list[EvaluationRow]:
    left_out = {"gains"} if record else {"gains", "record"}
    columns = [_evaluation[name] for name in EvaluationRow.__dataclass_fields__ if name not in left_out]
    rows = connection.execute(select(*columns).where(*chosen))
    return [EvaluationRow(**{"record": "", "gains": b"", **row._mapping}) for row in rows]


def _write_evaluations(connection: Connection, rows: Sequence[EvaluationRow]) -> Sequence[None]:
    for row in rows:
        connection.execute(delete(evaluations).where(_evaluation.submission_id == row.submission_id))
        connection.execute(insert(evaluations).values(**asdict(row)))
    return [None] * len(rows)


def _round_bases(connection: Connection, since: int) -> dict[int, str]:
    rows = connection.execute(
        select(round_bases.c.round, round_bases.c.model_version).where(round_bases.c.round >= since)
    )
    return {row.round: row.model_version for row in rows}


def _write_round_bases(connection: Connection, bases: Sequence[RoundBase]) -> Sequence[bool]:
    written = []
    for base in bases:
        new = base.round not in _round_bases(connection, base.round)
        if new:
            connection.execute(insert(round_bases).values(**base._asdict()))
        written.append(new)
    return written


def _write_chain_state(connection: Connection, states: Sequence[ChainState]) -> Sequence[None]:
    state = states[-1]  # the newest replaces those before it
    payload = _pack(state)
    held = connection.execute(select(chain_state.c.version, chain_state.c.payload)).one_or_none()
    values: dict[str, Any] = {
        "block": state.block,
        "frozen": state.frozen,
        "observed_at": db_now() - state.age(),
    }
    if held is None:
        connection.execute(insert(chain_state).values(id=1, version=1, payload=payload, **values))
    else:
        if held.payload != payload:
            values |= {"version": held.version + 1, "payload": payload}
        connection.execute(update(chain_state).values(**values))
    return [None] * len(states)


def _pack(state: ChainState) -> str:
    return json.dumps(
        {
            "validators": sorted(state.validators),
            "miners": None if state.miners is None else sorted(state.miners),
            "hashes": {str(block): value for block, value in sorted(state.hashes.items())},
        }
    )


def _unpack(payload: str) -> dict[str, Any]:
    held = json.loads(payload)
    return {
        "validators": frozenset(held["validators"]),
        "miners": None if held["miners"] is None else frozenset(held["miners"]),
        "hashes": MappingProxyType({int(block): value for block, value in held["hashes"].items()}),
    }
