"""Tables and migrations: the shape of the ledger, the same for SQLite and PostgreSQL.

`MIGRATIONS[n]` brings a ledger from version n to n + 1; they run in one transaction under the writers' lock, so that
any number of processes may open a new ledger at once. A ledger of a newer version is refused, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    insert,
    inspect,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from bzstream.errors import BzstreamError

__all__ = [
    "MIGRATIONS",
    "LedgerError",
    "chain_state",
    "commitments",
    "db_now",
    "evaluations",
    "evaluators",
    "migrate",
    "round_bases",
    "round_weights",
    "submissions",
]


class LedgerError(BzstreamError):
    """The ledger cannot be opened or used; base of the errors of `submissions` about it."""


class db_now(FunctionElement[float]):  # noqa: N801  it reads as the SQL function it stands for
    """Seconds since the epoch by the database's clock: the one clock that every machine shares."""

    type = Float(53)
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(_element: Any, _compiler: Any, **_: Any) -> str:
    # 2440587.5 is the Julian day of 1970-01-01; unixepoch('subsec') needs SQLite 3.42. Resolution about 40 us.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgresql_now(_element: Any, _compiler: Any, **_: Any) -> str:
    # clock_timestamp, not now(): the latter stands still within a transaction, which may have waited for the lock.
    return "cast(extract(epoch from clock_timestamp()) as double precision)"


_metadata = MetaData()

schema_version = Table("schema_version", _metadata, Column("version", Integer, nullable=False))

_Serial = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself for INTEGER PRIMARY KEY only

submissions = Table(
    "submissions",
    _metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),  # the order of acceptance
    Column("submission_id", Text, nullable=False, unique=True),
    Column("hotkey", Text, nullable=False),
    Column("block_number", BigInteger, nullable=False),
    Column("expert_group", BigInteger, nullable=False),
    Column("checkpoint_url", Text, nullable=False),
    Column("checkpoint_hash", Text),
    Column("signature", Text, nullable=False),
    Column("digest", Text, nullable=False),  # SHA-256 of the signed bytes
    Column("round", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("received_at", Float(53), nullable=False),
    Column("fetched_at", Float(53)),
    Column("evaluating_at", Float(53)),
    Column("finished_at", Float(53)),
    Column("content_hash", Text),
    Column("model_version", Text),
    Column("baseline_loss", Float(53)),
    Column("loss", Float(53)),
    Column("score", Float(53)),
    Column("pay", Float(53)),
    Column("attempts", Integer, nullable=False),
    Column("committed_block", BigInteger),  # of a commitment on the chain to the file that was fetched
    Column("worker", Text),
    Column("lease_token", Text),
    Column("lease_expires", Float(53)),
    UniqueConstraint("hotkey", "block_number", name="one_per_hotkey_and_block"),
    Index("submissions_of_a_round", "round", "hotkey"),
    Index("submissions_by_status", "status", "seq"),
)

chain_state = Table(
    "chain_state",
    _metadata,
    Column("id", Integer, primary_key=True),  # one row, 1
    Column("version", BigInteger, nullable=False),  # changes with `payload`, so that readers can skip an unchanged one
    Column("block", BigInteger, nullable=False),
    Column("frozen", Boolean, nullable=False),
    Column("observed_at", Float(53), nullable=False),  # by the database's clock
    Column("payload", Text, nullable=False),  # JSON: validators, miners, hashes
)

evaluators = Table(
    "evaluators",
    _metadata,
    Column("worker", Text, primary_key=True),
    Column("seen_at", Float(53), nullable=False),  # its last sign of life, by the database's clock
)

_weights_set = Table(  # of ledgers up to version 3
    "weights_set",
    _metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("confirmed_at", Float(53), nullable=False),
)

round_weights = Table(
    "round_weights",
    _metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("shares", Text, nullable=False),  # JSON: hotkey -> share
    Column("outcome", Text, nullable=False),
    Column("reason", Text),
    Column("attempts", Integer, nullable=False),
    Column("block", BigInteger),
)

round_bases = Table(
    "round_bases",
    _metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("model_version", Text, nullable=False),
    Column("block", BigInteger, nullable=False),  # at which the version was seen in force
)

commitments = Table(
    "commitments",
    _metadata,
    Column("round", BigInteger, primary_key=True, autoincrement=False),
    Column("hotkey", Text, primary_key=True),
    Column("text", Text, nullable=False),
    Column("block", BigInteger, nullable=False),
)

evaluations = Table(
    "evaluations",
    _metadata,
    Column("submission_id", Text, primary_key=True),
    Column("round", BigInteger, nullable=False),
    Column("expert_group", BigInteger, nullable=False),
    Column("weights", Text, nullable=False),
    Column("sketch", Text, nullable=False),
    Column("record", Text, nullable=False),  # JSON: the whole evaluation
    Column("gains", LargeBinary),  # of each token; deleted once a later round is settled
    Index("evaluations_of_a_round", "round", "expert_group"),
)


def _first(connection: Connection) -> None:
    _metadata.create_all(connection, [schema_version, submissions, chain_state, evaluators, _weights_set])
    connection.execute(insert(schema_version).values(version=0))


def _evaluations(connection: Connection) -> None:
    # Evaluators made this very table by themselves beside a ledger of version 1, and it may hold rows.
    evaluations.create(connection, checkfirst=True)


def _round_bases(connection: Connection) -> None:
    round_bases.create(connection)


def _round_weights(connection: Connection) -> None:
    round_weights.create(connection)
    confirmed = select(_weights_set.c.round, literal("{}"), literal("set"), literal(0))
    connection.execute(insert(round_weights).from_select(["round", "shares", "outcome", "attempts"], confirmed))
    _weights_set.drop(connection)


def _commitments(connection: Connection) -> None:
    commitments.create(connection)
    _add_column(connection, submissions.c.committed_block)


def _pay(connection: Connection) -> None:
    _add_column(connection, submissions.c.pay)
    _add_column(connection, evaluations.c.gains)
    # Until now a submission earned its score.
    finished = submissions.c.status.in_(("scored", "rejected"))
    connection.execute(update(submissions).where(finished).values(pay=submissions.c.score))


def _add_column(connection: Connection, column: Column[Any]) -> None:
    """Add a column that may be NULL to an old ledger's table; a new ledger's table has it from the start."""
    table = column.table.name
    if column.name not in {held["name"] for held in inspect(connection).get_columns(table)}:
        type_ = column.type.compile(connection.dialect)
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {column.name} {type_}"))


MIGRATIONS: Sequence[Callable[[Connection], None]] = (
    _first,
    _evaluations,
    _round_bases,
    _round_weights,
    _commitments,
    _pay,
)


def migrate(connection: Connection, migrations: Sequence[Callable[[Connection], None]] = MIGRATIONS) -> None:
    """Bring the ledger to the newest version. The caller holds the writers' lock. Raises LedgerError."""
    version = 0
    if inspect(connection).has_table(schema_version.name):
        version = connection.execute(select(schema_version.c.version)).scalar_one()
    if version > len(migrations):
        raise LedgerError(
            f"the ledger has schema version {version}, this bzstream knows {len(migrations)}; upgrade bzstream"
        )
    for migration in migrations[version:]:
        migration(connection)
    if version < len(migrations):
        connection.execute(update(schema_version).values(version=len(migrations)))
