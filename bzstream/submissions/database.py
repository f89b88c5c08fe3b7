"""The ledger's database, SQLite or PostgreSQL: who may write, when a commit is on disk, and what its errors mean.

Both databases are given the same semantics, so that the ledger above is one piece of code:
- One writer at a time. SQLite: BEGIN IMMEDIATE. PostgreSQL: a transaction-scoped advisory lock, taken first, so that
  every later statement of the transaction sees all that was committed before. No write can conflict with another,
  nothing needs to be retried, and the order of commits is the order of acceptance.
- A commit is on disk when it returns. SQLite: WAL with synchronous=FULL. PostgreSQL: synchronous_commit is raised to
  `on` where the server's default is lower.
SQLite has no queue of waiting writers, so a process that begins its next transaction at once can starve the others. A
writer therefore first takes the *writer queue lock*, a lock file (`<ledger>.turn`) that it holds until its BEGIN
IMMEDIATE has succeeded: the writer that holds it is the next one, and the others wait for the lock.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from bzstream.submissions.schema import LedgerError

__all__ = ["Database", "LedgerUnavailable"]

LOCK_TIMEOUT_S = 10.0
"""Longest wait for the writers' lock; a batch of a healthy writer takes milliseconds."""
CHECKPOINT_PAGES = 16_384
"""Pages of the write-ahead log, 64 MiB, after which a commit moves them into the file, with two or three fsyncs more.
A submission writes about three pages: with SQLite's own limit of 1000, one commit in ten took several times as long."""
_ADVISORY_LOCK = 0x627A73747265616D  # "bzstream" in ASCII
_NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "glusterfs",
    "lustre",
    "afs",
    "fuse.sshfs",
}
"""SQLite's locks and shared memory do not work across machines (sqlite.org/wal.html, point 2)."""


class LedgerUnavailable(LedgerError):
    """The database does not answer, is locked for too long or failed; whether a write happened is not known."""


class Database:
    """Opens connections to the ledger. Each thread that uses it gets its own connection from the pool."""

    def __init__(self, where: str | Path) -> None:
        """`where`: a file for SQLite, or `postgresql://user:password@host/database`. Raises LedgerError."""
        url = _url(where)
        self._closed = False
        self.name = url.render_as_string(hide_password=True) if url.drivername != "sqlite" else str(url.database)
        # Parameters stay out of error texts: they hold the miners' URLs.
        common: dict[str, Any] = {"poolclass": QueuePool, "pool_size": 2, "hide_parameters": True}
        self._writer_queue_lock: int | None = None
        if url.drivername == "sqlite":
            file = Path(str(url.database))
            _prepare(file)
            self._writer_queue_lock = os.open(f"{file}.turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # Connections move between threads only through the pool, never while in use.
            # SQLite's own wait sleeps up to 100 ms between two tries. Writers often wait, so they try every ms instead.
            self._writers, self._readers = (
                create_engine(
                    url,
                    connect_args={"check_same_thread": False, "isolation_level": None, "timeout": timeout},
                    **common,
                )
                for timeout in (0, LOCK_TIMEOUT_S)
            )
            for engine in (self._writers, self._readers):
                event.listen(engine, "connect", _set_up_sqlite)
        else:
            arguments = {"connect_timeout": 5, "application_name": "bzstream"}
            self._writers = self._readers = create_engine(
                url, pool_pre_ping=True, isolation_level="READ COMMITTED", connect_args=arguments, **common
            )
            event.listen(self._writers, "connect", _set_up_postgresql)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that holds the writers' lock; on disk when the block ends without an exception."""
        with self._errors(), self._writers.connect() as connection:
            if self._writer_queue_lock is None:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
            else:
                self._begin_immediate(connection, self._writer_queue_lock)
            yield connection
            connection.commit()  # without it the connection rolls back when it goes back to the pool

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction for reading, never held up by a writer."""
        with self._errors(), self._readers.connect() as connection:
            if self._writer_queue_lock is not None:
                connection.exec_driver_sql("BEGIN")
            yield connection
            connection.commit()

    def close(self) -> None:
        """Close every connection; no thread may be using one. Closing twice is fine."""
        self._writers.dispose()
        self._readers.dispose()
        if self._writer_queue_lock is not None and not self._closed:
            os.close(self._writer_queue_lock)
        self._closed = True

    def _begin_immediate(self, connection: Connection, writer_queue_lock: int) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        _retry_until(deadline, lambda: _try_flock(writer_queue_lock))
        try:
            _retry_until(deadline, lambda: _try_begin(connection))
        finally:
            fcntl.flock(writer_queue_lock, fcntl.LOCK_UN)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise LedgerUnavailable(f"the ledger {self.name} failed: {_first_line(error)}") from error
        except SQLAlchemyError as error:
            raise LedgerUnavailable(f"the ledger {self.name} failed: {str(error).splitlines()[0]}") from error


def _retry_until(deadline: float, attempt: Callable[[], bool]) -> None:
    while not attempt():
        if time.monotonic() > deadline:
            raise LedgerUnavailable(f"the ledger was locked for {LOCK_TIMEOUT_S:g} s; is a process stuck with it?")
        time.sleep(0.001)


def _try_flock(writer_queue_lock: int) -> bool:
    try:
        fcntl.flock(writer_queue_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_begin(connection: Connection) -> bool:
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    except DBAPIError as error:
        if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            connection.rollback()
            return False
        raise
    return True


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    # Two processes that turn a new file to WAL at once get "busy" without SQLite's own wait: wait for them here.
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")


def _set_up_postgresql(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit')"
            " IN ('off', 'local')"
        )
        cursor.execute(f"SET lock_timeout = '{int(LOCK_TIMEOUT_S * 1000)}ms'")
        cursor.execute(f"SET statement_timeout = '{int(2 * LOCK_TIMEOUT_S * 1000)}ms'")
        cursor.execute("SET idle_in_transaction_session_timeout = '60s'")
    connection.commit()


def _url(where: str | Path) -> URL:
    given = str(where)
    if "://" not in given:
        return URL.create("sqlite", database=str(Path(given).absolute()))
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise LedgerError("the ledger's URL cannot be read; write postgresql://user:password@host/database") from None
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise LedgerError("a PostgreSQL ledger needs psycopg; install bzstream[validator]") from None
        return url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite" and url.database:
        return URL.create("sqlite", database=str(Path(url.database).absolute()))
    raise LedgerError(f"a ledger is a file or a postgresql:// URL, not {url.drivername}://")


def _prepare(file: Path) -> None:
    """Create the file for its owner alone (it holds URLs that no miner may read) and check that SQLite can use it."""
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with file.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise LedgerError(
            f"the ledger {file} cannot be opened: {error.strerror}; check the folder and --ledger"
        ) from None
    if head and head != b"SQLite format 3\0":
        raise LedgerError(f"{file} is not a ledger (no SQLite database); give another file with --ledger")
    kind = _file_system(file)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise LedgerError(f"the ledger {file} lies on a network file system ({kind}); use a local disk or PostgreSQL")


def _file_system(file: Path) -> str:
    """The type of the file system that holds `file`, from the mount table; empty when that cannot be told."""
    resolved = file.resolve()
    best, kind = -1, ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        # proc(5): "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw"; spaces are written \040.
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split(" ")[4].replace("\\040", " "))
        if len(point.parts) >= best and resolved.is_relative_to(point):
            best, kind = len(point.parts), rest.split(" ")[0]
    return kind


def _first_line(error: DBAPIError) -> str:
    lines = str(error.orig).strip().splitlines()
    return lines[0] if lines else type(error.orig).__name__
