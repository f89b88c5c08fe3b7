"""A consistent copy of a SQLite ledger, made beside running nodes (`bzstream backup`).

`cp` misses what is still in the write-ahead log (`<ledger>-wal`). VACUUM INTO copies everything that was committed when
it began, in one read transaction, and holds up no writer (https://sqlite.org/lang_vacuum.html#vacuuminto).
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from bzstream.submissions.database import LOCK_TIMEOUT_S
from bzstream.submissions.schema import MIGRATIONS, LedgerError
from bzstream.util.durable import sync_folder

__all__ = ["back_up"]


def back_up(ledger: str, copy: Path) -> int:
    """Write a copy of the ledger to the new file `copy`; the number of submissions in it.

    `copy` (mode 0600: it holds the miners' URLs) gets its name when it is whole, checked and on disk. Any thread.
    Raises LedgerError, and then there is no new file. SIGKILL may leave a hidden `.<name>.*.new` beside it.
    """
    if "://" in ledger:
        raise LedgerError(
            "bzstream backup copies SQLite ledgers, which are files; for PostgreSQL use pg_dump --format=custom, and"
            " pg_restore to put it back"
        )
    if not Path(ledger).is_file():
        raise LedgerError(f"there is no ledger {ledger}; the one of a store is STORE/ledger.sqlite")
    if os.path.lexists(copy):
        raise LedgerError(f"{copy} exists already and is left alone; give the name of a new file")
    try:
        # Like every temporary file, created for its owner alone. VACUUM INTO takes an empty file.
        fd, name = tempfile.mkstemp(prefix=f".{copy.name}.", suffix=".new", dir=copy.parent)
        try:
            _copy(ledger, name)
            submissions = _checked(name)
            os.fsync(fd)
            _give_name(name, copy)
        finally:
            os.close(fd)
            Path(name).unlink(missing_ok=True)
        sync_folder(copy.parent)
    except OSError as error:
        raise LedgerError(f"the copy {copy} cannot be written: {error.strerror}") from None
    except sqlite3.Error as error:
        raise LedgerError(f"the ledger {ledger} was not copied to {copy}: {error}") from None
    return submissions


def _open(file: str) -> sqlite3.Connection:
    # Read-only: no typing error makes an empty database, and no backup changes the ledger.
    return sqlite3.connect(
        f"{Path(file).absolute().as_uri()}?mode=ro", uri=True, timeout=LOCK_TIMEOUT_S, isolation_level=None
    )


def _copy(ledger: str, target: str) -> None:
    with closing(_open(ledger)) as connection:
        connection.execute("VACUUM INTO ?", (target,))


def _checked(file: str) -> int:
    """Raise LedgerError unless the file is a whole ledger of a version that this program opens; its submissions."""
    with closing(_open(file)) as connection:
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if found != "ok":
            raise LedgerError(f"the copy is damaged ({found}), perhaps because the ledger is; nothing was written")
        if not {"schema_version", "submissions"} <= tables:
            raise LedgerError("this SQLite database is not a ledger; the one of a store is STORE/ledger.sqlite")
        (version,) = connection.execute("SELECT version FROM schema_version").fetchone()
        if version > len(MIGRATIONS):
            raise LedgerError(
                f"the ledger has schema version {version}, this bzstream knows {len(MIGRATIONS)}; back it up with the"
                " bzstream that the node runs"
            )
        return int(connection.execute("SELECT count(*) FROM submissions").fetchone()[0])


def _give_name(temporary: str, copy: Path) -> None:
    """The final name, never over a file that somebody made meanwhile."""
    try:
        os.link(temporary, copy)
    except FileExistsError:
        raise LedgerError(f"{copy} was made by somebody else meanwhile and is left alone; give a new name") from None
    except OSError:  # a file system without hard links, such as FAT
        if os.path.lexists(copy):
            raise LedgerError(f"{copy} exists already and is left alone; give the name of a new file") from None
        os.rename(temporary, copy)
