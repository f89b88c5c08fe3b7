"""Leases: which evaluator works on a submission, and what happens when that evaluator dies.

A claim writes a random token and an end, by the database's clock, into the submission's row. Every later change is
conditional on that token and on the end lying in the future. So an evaluator that hung, lost its network or was
restarted can change nothing once another evaluator has its job, or once the submission was superseded, which clears the
token. The ledger's writer thread runs these operations.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, case, select, update

from bzstream.submissions.commitments import committed_block
from bzstream.submissions.schema import LedgerError, db_now, submissions
from bzstream.submissions.states import FINAL, LEASED, Status, predecessors
from bzstream.submissions.types import Job, SubmissionRow

__all__ = [
    "COLUMNS",
    "Advance",
    "Claim",
    "LeaseLost",
    "Renewal",
    "advance_all",
    "claim_all",
    "reject_all",
    "renew_all",
    "row_of",
]


class LeaseLost(LedgerError):
    """The job went to another evaluator, was superseded, or its lease ran out: drop its result."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Ask for work."""

    worker: str
    limit: int
    lease_s: float
    max_attempts: int
    """A submission whose lease was lost so often becomes `failed`: it may be what kills the evaluators."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """Keep jobs for `lease_s` more seconds."""

    jobs: tuple[Job, ...]
    lease_s: float


@dataclass(frozen=True, slots=True)
class Advance:
    """Bring a job into `status` and write what became known (columns of the table)."""

    job: Job
    status: Status
    values: Mapping[str, Any]


_table = submissions.c
COLUMNS = tuple(_table[name] for name in SubmissionRow.__dataclass_fields__)
"""The columns of a SubmissionRow, in its order."""


def row_of(row: Row[Any]) -> SubmissionRow:
    """A SubmissionRow from a row of COLUMNS's columns."""
    return SubmissionRow(**row._mapping)


_LOST = (_table.status.in_(sorted(LEASED)), _table.lease_expires <= db_now())
_NO_LEASE = {"lease_token": None, "lease_expires": None}
_GIVE_UP = (
    update(submissions)
    .where(*_LOST, _table.attempts >= bindparam("max_attempts"))
    .values(status="failed", reason="evaluator_lost", finished_at=db_now(), **_NO_LEASE)
)
_RETURN = update(submissions).where(*_LOST).values(status="queued", **_NO_LEASE)
_WAITING = select(_table.submission_id).where(_table.status == "queued").order_by(_table.seq).limit(bindparam("number"))
_CLAIM = (
    update(submissions)
    .where(_table.submission_id.in_(bindparam("ids", expanding=True)))
    .values(
        status="fetching",
        attempts=_table.attempts + 1,
        worker=bindparam("by"),
        lease_token=bindparam("token"),
        lease_expires=db_now() + bindparam("lease_s"),
    )
)
_CLAIMED = select(*COLUMNS).where(_table.lease_token == bindparam("token")).order_by(_table.seq)
_HELD = (
    _table.submission_id == bindparam("id"),
    _table.lease_token == bindparam("token"),
    _table.lease_expires > db_now(),
)
_RENEW = update(submissions).where(*_HELD).values(lease_expires=db_now() + bindparam("lease_s"))
_READ = select(*COLUMNS).where(_table.submission_id == bindparam("id"))


def claim_all(connection: Connection, claims: Sequence[Claim]) -> Sequence[list[Job]]:
    """For each claim the oldest waiting submissions, now `fetching` under a lease; jobs of lost leases wait again."""
    results: list[list[Job]] = []
    for claim in claims:
        connection.execute(_GIVE_UP, {"max_attempts": claim.max_attempts})
        connection.execute(_RETURN)
        ids = list(connection.execute(_WAITING, {"number": claim.limit}).scalars())
        token = secrets.token_hex(16)
        if ids:
            connection.execute(_CLAIM, {"ids": ids, "by": claim.worker, "token": token, "lease_s": claim.lease_s})
        rows = connection.execute(_CLAIMED, {"token": token}) if ids else ()
        results.append([Job(row_of(row), token) for row in rows])
    return results


def renew_all(connection: Connection, renewals: Sequence[Renewal]) -> Sequence[frozenset[str]]:
    """For each renewal the submission ids that are still held."""
    return [
        frozenset(
            job.record.submission_id
            for job in renewal.jobs
            if connection.execute(_RENEW, _of(job) | {"lease_s": renewal.lease_s}).rowcount
        )
        for renewal in renewals
    ]


def advance_all(connection: Connection, advances: Sequence[Advance]) -> Sequence[Job | LeaseLost]:
    """Each job in its new status, or LeaseLost. The transitions are ones that the table of states has."""
    results: list[Job | LeaseLost] = []
    for advance in advances:
        job, status = advance.job, advance.status
        values: dict[str, Any] = {"status": status, **advance.values}
        if job.record.status == "fetching" and status == "verifying":
            # The same bytes fetched again, after an evaluator died, keep the time (and the precedence) they had.
            same = and_(_table.fetched_at.is_not(None), _table.content_hash == advance.values.get("content_hash"))
            values["fetched_at"] = case((same, _table.fetched_at), else_=db_now())
            content_hash = str(advance.values.get("content_hash"))
            values["committed_block"] = committed_block(connection, job.record.round, job.record.hotkey, content_hash)
        if status == "evaluating":
            values["evaluating_at"] = db_now()
        if status in FINAL:
            values |= {"finished_at": db_now(), **_NO_LEASE}
        if status == "queued":  # given back unharmed: the attempt does not count
            values |= {"attempts": _table.attempts - 1, **_NO_LEASE}
        statement = update(submissions).where(*_HELD, _table.status == job.record.status).values(**values)
        if not connection.execute(statement, _of(job)).rowcount:
            results.append(LeaseLost(f"the lease on submission {job.record.submission_id} was lost; drop its result"))
            continue
        row = connection.execute(_READ, {"id": job.record.submission_id}).one()
        results.append(replace(job, record=row_of(row)))
    return results


def reject_all(connection: Connection, rejections: Sequence[tuple[str, str]]) -> Sequence[bool]:
    """For each (submission_id, reason) whether it was turned from scored or failed into rejected."""
    finished = tuple(status for status in predecessors("rejected") if status in FINAL)
    statement = (
        update(submissions)
        .where(_table.submission_id == bindparam("id"), _table.status.in_(finished))
        .values(status="rejected", reason=bindparam("because"), score=0.0, pay=None, finished_at=db_now())
    )
    return [bool(connection.execute(statement, {"id": i, "because": why}).rowcount) for i, why in rejections]


def _of(job: Job) -> dict[str, Any]:
    return {"id": job.record.submission_id, "token": job.token}
