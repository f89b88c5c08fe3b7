"""Accepting submissions: what the database is asked, the decision, and what is written, for many at once.

The ledger's writer thread calls `Admission` with the submissions that wait. The decision itself, `decide_all`, is pure.
It runs inside a transaction that holds the writers' lock, so that what it read of the ledger is still true when its
decision is written: (hotkey, block_number) is accepted once, whatever else runs at the same time.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, func, insert, literal_column, null, or_, select, union_all, update

from bzstream.submissions.schema import db_now, submissions
from bzstream.submissions.states import LEASED, UNFINISHED, predecessors
from bzstream.submissions.types import AdmissionResult, Admitted, Candidate, Duplicate, LimitReached

__all__ = ["Admission", "Decision", "Known", "decide_all"]

_HISTORY = 32
"""Evaluations that the estimate's mean is taken over: about one round of a small subnet."""
_LOAD_S = 1.0
"""Seconds for which the measured load of the queue is used for estimates: counting takes time linear in the queue."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the ledger holds about the candidates."""

    taken: Mapping[tuple[str, int], tuple[str, str]]
    """(hotkey, block_number) -> (submission_id, digest) of the one that was accepted."""
    counts: Mapping[tuple[str, int], int]
    """(hotkey, round) -> submissions accepted."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Verdicts in the order of the candidates: an id for what is accepted, else the refusal."""

    verdicts: Sequence[str | Duplicate | LimitReached]
    superseding: Sequence[tuple[str, int, str]]
    """(hotkey, round, submission_id that counts now) where there were earlier ones."""


def decide_all(candidates: Sequence[Candidate], known: Known, new_ids: Sequence[str]) -> Decision:
    """Decide candidates one after the other, as if each had come alone. Pure.

    409 comes before 429: a miner that sends the same submission again learns its id even when the limit is reached.
    """
    taken, counts = dict(known.taken), dict(known.counts)
    verdicts: list[str | Duplicate | LimitReached] = []
    counting: dict[tuple[str, int], str] = {}
    for candidate, new_id in zip(candidates, new_ids, strict=True):
        submission = candidate.submission
        place, cycle = (submission.hotkey, submission.block_number), (submission.hotkey, candidate.round)
        if place in taken:
            submission_id, digest = taken[place]
            verdicts.append(Duplicate(submission_id if digest == submission.digest else None))
        elif counts.get(cycle, 0) >= candidate.max_per_cycle:
            verdicts.append(LimitReached(candidate.max_per_cycle))
        else:
            taken[place] = (new_id, submission.digest)
            counts[cycle] = counts.get(cycle, 0) + 1
            counting[cycle] = new_id
            verdicts.append(new_id)
    superseding = [
        (hotkey, round_, new_id) for (hotkey, round_), new_id in counting.items() if counts[hotkey, round_] > 1
    ]
    return Decision(verdicts, superseding)


class Admission:
    """The operation that the writer runs for waiting submissions. Keeps the measured load of the queue for a second."""

    def __init__(self) -> None:
        self._load = _QueueLoad(0, 1, None)
        self._load_until = 0.0

    def __call__(self, connection: Connection, candidates: Sequence[Candidate]) -> Sequence[AdmissionResult]:
        """Decide the candidates and write down what is accepted. The connection holds the writers' lock."""
        decision = decide_all(candidates, _known(connection, candidates), [str(uuid.uuid4()) for _ in candidates])
        outcomes: list[AdmissionResult] = []
        rows: list[dict[str, object]] = []
        for candidate, verdict in zip(candidates, decision.verdicts, strict=True):
            if isinstance(verdict, str):
                load = self._next_load(connection)
                outcomes.append(Admitted(verdict, load.ahead, load.evaluators, load.mean_seconds))
                rows.append(_row(candidate, verdict))
            else:
                outcomes.append(verdict)
        if rows:
            connection.execute(_INSERT, rows)
        if decision.superseding:
            connection.execute(_SUPERSEDE, [dict(zip(_BY, values, strict=True)) for values in decision.superseding])
        return outcomes

    def _next_load(self, connection: Connection) -> _QueueLoad:
        now = time.monotonic()
        if now >= self._load_until:
            self._load = _QueueLoad(
                connection.execute(_UNFINISHED).scalar_one(),
                max(1, connection.execute(_EVALUATORS).scalar_one()),
                connection.execute(_MEAN_SECONDS).scalar_one(),
            )
            self._load_until = now + _LOAD_S
        load = self._load
        self._load = _QueueLoad(load.ahead + 1, load.evaluators, load.mean_seconds)
        return load


class _QueueLoad(NamedTuple):
    ahead: int
    evaluators: int
    mean_seconds: float | None


def _known(connection: Connection, candidates: Sequence[Candidate]) -> Known:
    blocks = [candidate.submission.block_number for candidate in candidates]
    asked = {
        "hotkeys": sorted({candidate.submission.hotkey for candidate in candidates}),
        "rounds": sorted({candidate.round for candidate in candidates}),
        "low": min(blocks),
        "high": max(blocks),
    }
    taken: dict[tuple[str, int], tuple[str, str]] = {}
    counts: dict[tuple[str, int], int] = {}
    for hotkey, number, submission_id, digest, count in connection.execute(_KNOWN, asked):
        if submission_id is None:
            counts[hotkey, number] = count
        else:
            taken[hotkey, number] = (submission_id, digest)
    return Known(taken, counts)


def _row(candidate: Candidate, submission_id: str) -> dict[str, object]:
    submission = candidate.submission
    return {
        "submission_id": submission_id,
        "hotkey": submission.hotkey,
        "block_number": submission.block_number,
        "expert_group": submission.expert_group,
        "checkpoint_url": submission.checkpoint_url,
        "checkpoint_hash": submission.checkpoint_hash,
        "signature": submission.signature,
        "digest": submission.digest,
        "round": candidate.round,
        "status": "queued",
        "attempts": 0,
    }


_table = submissions.c

# One statement for both questions, each of which looks into a short range of an index for each hotkey: SQLite searches
# no index for `(a, b) IN (...)`, and blocks of one batch lie in one cycle. What is found beyond the candidates does no
# harm.
_HOTKEYS = _table.hotkey.in_(bindparam("hotkeys", expanding=True))
_KNOWN = union_all(
    select(_table.hotkey, _table.block_number, _table.submission_id, _table.digest, null()).where(
        _HOTKEYS, _table.block_number.between(bindparam("low"), bindparam("high"))
    ),
    select(_table.hotkey, _table.round, null(), null(), func.count())
    .where(_table.round.in_(bindparam("rounds", expanding=True)), _HOTKEYS)
    .group_by(_table.hotkey, _table.round),
)
_BY = ("of_hotkey", "of_round", "by")
_INSERT = insert(submissions).values(received_at=db_now())
_SUPERSEDE = (
    update(submissions)
    .where(
        _table.hotkey == bindparam("of_hotkey"),
        _table.round == bindparam("of_round"),
        _table.submission_id != bindparam("by"),
        or_(*(_table.status == status for status in predecessors("rejected"))),  # executemany takes no list
    )
    .values(
        status="rejected", reason="superseded", score=0.0, finished_at=db_now(), lease_token=None, lease_expires=None
    )
)
_UNFINISHED = select(func.count()).where(_table.status.in_(UNFINISHED))
_EVALUATORS = select(func.count(_table.worker.distinct())).where(
    _table.status.in_(sorted(LEASED)), _table.lease_expires > db_now()
)
_recent = (
    select((_table.finished_at - _table.evaluating_at).label("seconds"))
    .where(_table.status == "scored")
    .order_by(_table.seq.desc())
    .limit(_HISTORY)
    .subquery()
)
_MEAN_SECONDS = select(func.avg(literal_column("seconds"))).select_from(_recent)
