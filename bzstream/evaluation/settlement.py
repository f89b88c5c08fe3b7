"""Settles what one group's submissions earn in a round, from the gains in the ledger, by the rule of `scoring.pay`.

Any evaluator may finish a group's last submission, and any may settle it: the result depends on the ledger alone.
Blocking: the pipeline calls it in a thread.
"""

from __future__ import annotations

from bzstream.evaluation.records import Records
from bzstream.evaluation.scoring.pay import Gains, Pay, settle
from bzstream.submissions.ledger import Ledger
from bzstream.submissions.states import FINAL, Status
from bzstream.submissions.types import GroupPay

__all__ = ["settle_group"]


def settle_group(ledger: Ledger, records: Records, round_: int, group: int, independent_share: float) -> list[Pay]:
    """Write what each submission of the group earns; what was decided of those that passed the floor.

    Writes nothing while an evaluator works on one of them. A rejected submission earns 0; a failed one has no pay, as
    it has no score. A submission without gains in the ledger was scored by an older bzstream and earns its score. Gains
    on other windows, after somebody changed the settings in the middle of the round, are settled by themselves.
    """
    scores = ledger.scores(round_)
    counted = [] if scores is None else [row for row in scores.results if row.expert_group == group]
    if any(row.status not in FINAL for row in counted):
        return []
    measured = records.gains(round_, group)
    pays: dict[str, tuple[Status, float]] = {}
    alike: dict[tuple[int, ...], list[Gains]] = {}
    for row in counted:
        if row.status == "failed":
            continue
        tokens = measured.get(row.submission_id)
        if row.status == "scored" and tokens is not None:
            alike.setdefault(tokens.shape, []).append(Gains(row.submission_id, row.precedence, tokens, row.hotkey))
        else:
            unmeasured = row.status == "scored" and row.submission_id not in measured
            pays[row.submission_id] = (row.status, row.score or 0.0 if unmeasured else 0.0)
    decided = [pay for gains in alike.values() for pay in settle(gains, independent_share=independent_share)]
    pays |= {pay.submission_id: ("scored", pay.pay) for pay in decided}
    ledger.write_pay(GroupPay(round_, pays))
    return decided
