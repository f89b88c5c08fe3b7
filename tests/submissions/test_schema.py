"""The ledger's schema: brought from one version to the next with all that it holds, on SQLite and on PostgreSQL."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, insert, inspect, select, text

from bzstream.chain.weights import RoundWeights
from bzstream.submissions.admission import Admission
from bzstream.submissions.database import Database
from bzstream.submissions.ledger import Ledger, LedgerError
from bzstream.submissions.schema import MIGRATIONS, evaluations, migrate
from bzstream.submissions.types import Duplicate
from tests.submissions.values import ROUND, accepted, candidate


def version_of(database: Database) -> int:
    with database.read() as connection:
        version: int = connection.execute(text("SELECT version FROM schema_version")).scalar_one()
        return version


def test_a_ledger_is_migrated_and_a_newer_one_refused(where: str) -> None:
    Ledger.open(where).close()
    database = Database(where)

    def another(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE submissions ADD COLUMN added TEXT"))

    for _ in range(2):
        with database.write() as connection:
            migrate(connection, (*MIGRATIONS, another))
    assert version_of(database) == len(MIGRATIONS) + 1
    database.close()
    with pytest.raises(LedgerError, match="upgrade bzstream"):
        Ledger.open(where)


VERSION_1_EVALUATIONS = (
    "CREATE TABLE evaluations (submission_id TEXT NOT NULL, round BIGINT NOT NULL, expert_group BIGINT NOT NULL,"
    " weights TEXT NOT NULL, sketch TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (submission_id))",
    "CREATE INDEX evaluations_of_a_round ON evaluations (round, expert_group)",
)
"""What evaluators added to a ledger of version 1 without a word in its version."""


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_ledger_of_version_1_is_brought_up_with_all_that_it_holds(where: str, evaluated: bool) -> None:
    database = Database(where)
    with database.write() as connection:
        migrate(connection, MIGRATIONS[:1])
        submission_id = accepted(Admission()(connection, [candidate()])[0])
        for statement in VERSION_1_EVALUATIONS if evaluated else ():
            connection.execute(text(statement))
        if evaluated:
            row = {"submission_id": submission_id, "round": ROUND, "record": "{}"}
            connection.execute(insert(evaluations).values(**row, expert_group=3, weights="w", sketch="s"))
        connection.execute(text("INSERT INTO weights_set (round, confirmed_at) VALUES (12100, 1.0)"))
    assert version_of(database) == 1
    ledger = Ledger.open(where)
    record = ledger.find(submission_id)
    assert record is not None
    assert (record.status, record.round) == ("queued", ROUND)
    assert ledger.accept(candidate()) == Duplicate(submission_id)
    assert ledger.round_weights() == RoundWeights(12100, outcome="set")
    ledger.close()
    assert version_of(database) == len(MIGRATIONS)
    with database.read() as connection:
        assert connection.execute(select(evaluations.c.submission_id)).scalars().all() == [submission_id] * evaluated
        indexes = {index["name"] for index in inspect(connection).get_indexes("evaluations")}
    assert "evaluations_of_a_round" in indexes
    database.close()


def test_what_was_scored_before_there_was_pay_earns_its_score(where: str) -> None:
    database = Database(where)
    with database.write() as connection:
        migrate(connection, MIGRATIONS[:5])
        for table, column in (("submissions", "pay"), ("evaluations", "gains")):  # as version 5 had them
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        insert_old = "INSERT INTO submissions (submission_id, hotkey, block_number, expert_group, checkpoint_url,"
        insert_old += " signature, digest, round, status, received_at, attempts, score) VALUES"
        for i, (status, score) in enumerate((("scored", 0.5), ("rejected", 0.0), ("queued", None))):
            row = {"id": f"0000000{i}-0000-4000-8000-000000000000", "round": ROUND, "status": status, "score": score}
            values = "(:id, :id, 1, 0, '', '', '', :round, :status, 1.0, 1, :score)"
            connection.execute(text(f"{insert_old} {values}"), row)
    assert version_of(database) == 5
    ledger = Ledger.open(where)
    scores = ledger.scores(ROUND)
    assert scores is not None
    assert [row.pay for row in scores.results] == [0.5, 0.0, None]
    assert scores.unfinished == 1
    assert ledger.gains(ROUND, 0) == {}
    ledger.close()
    assert version_of(database) == len(MIGRATIONS)
    database.close()
