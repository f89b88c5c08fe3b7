"""What submissions earned, in the ledger: which groups are to be settled, their gains, and what was settled.

A group of a round is settled by any evaluator once all its submissions are final (`evaluation.settlement`), again when
one of them turned out to be a copy later. The ledger's threads run these operations.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, and_, bindparam, case, func, select, update

from bzstream.submissions.schema import evaluations, submissions
from bzstream.submissions.states import UNFINISHED
from bzstream.submissions.types import GroupPay

__all__ = ["gains_of", "unsettled_groups", "write_pays"]

_table = submissions.c
_evaluation = evaluations.c
_TO_SETTLE = and_(_table.status.in_(("scored", "rejected")), _table.pay.is_(None))
_UNSETTLED = (
    select(_table.round, _table.expert_group)
    .where(_table.round >= bindparam("since"), func.coalesce(_table.reason, "") != "superseded")
    .group_by(_table.round, _table.expert_group)
    .having(
        func.sum(case((_TO_SETTLE, 1), else_=0)) > 0,
        func.sum(case((_table.status.in_(UNFINISHED), 1), else_=0)) == 0,
    )
    .order_by(_table.round, _table.expert_group)
)
_PAY = (
    update(submissions)
    .where(_table.submission_id == bindparam("id"), _table.status == bindparam("was"))
    .values(pay=bindparam("earned"))
)
_UNPAID = select(_table.submission_id).where(_table.status == "scored", _table.pay.is_(None))
_DELETE_GAINS = (
    update(evaluations)
    .where(
        _evaluation.round < bindparam("settled"),
        _evaluation.gains.is_not(None),
        _evaluation.submission_id.not_in(_UNPAID),
    )
    .values(gains=None)
)


def gains_of(connection: Connection, round_: int, group: int) -> dict[str, bytes]:
    """Submission id -> packed gains; b"" of what earns nothing by itself."""
    rows = connection.execute(
        select(_evaluation.submission_id, _evaluation.gains).where(
            _evaluation.round == round_, _evaluation.expert_group == group, _evaluation.gains.is_not(None)
        )
    )
    return {row.submission_id: bytes(row.gains) for row in rows}


def unsettled_groups(connection: Connection, since: int) -> list[tuple[int, int]]:
    """(round, group) of which every counting submission is final, and one has no pay that should have one."""
    return [(row.round, row.expert_group) for row in connection.execute(_UNSETTLED, {"since": since})]


def write_pays(connection: Connection, settled: Sequence[GroupPay]) -> Sequence[None]:
    """Write what each submission earned; one whose status has changed meanwhile stays to be settled."""
    for group in settled:
        for name, (status, pay) in group.pays.items():
            connection.execute(_PAY, {"id": name, "was": status, "earned": pay})
        connection.execute(_DELETE_GAINS, {"settled": group.round})
    return [None] * len(settled)
