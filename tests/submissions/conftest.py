"""Real databases: SQLite files, and a private PostgreSQL server on loopback that lives as long as the test run."""

from __future__ import annotations

import glob
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bzstream.submissions.ledger import Ledger
from tests.nodes import free_port

_NUMBERS = itertools.count(1)
_MEMORY, _ROOM = Path("/dev/shm"), 2 << 30
"""A database takes 8 MB from the start, and a disk that is busy needs seconds to write and to remove a hundred of them.
Nothing here is to survive the machine."""


def postgres_programs() -> Path | None:
    """The folder of initdb and pg_ctl, which Debian keeps off the PATH."""
    found = shutil.which("initdb")
    candidates = [Path(found).parent] if found else []
    candidates += [Path(folder) for folder in sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    return next((folder for folder in candidates if (folder / "pg_ctl").exists()), None)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """`postgresql://postgres@127.0.0.1:PORT`, a fresh cluster run by an ordinary user."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server on this machine; apt-get install postgresql")
    # initdb refuses to run as root.
    owner = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    as_owner = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    in_memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _ROOM
    folder = Path(tempfile.mkdtemp(prefix="bzstream-postgres-", dir=_MEMORY if in_memory else None))
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    port = free_port()

    def run(*command: str) -> None:
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120, **as_owner)  # type: ignore[call-overload]

    data = str(folder / "data")
    try:
        run(str(programs / "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-N")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        control = str(programs / "pg_ctl")
        run(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}"
        finally:
            run(control, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a new ledger: a file, then a new database of the PostgreSQL server."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.sqlite")
    server: str = request.getfixturevalue("postgres_server")
    name = f"ledger{next(_NUMBERS)}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server}/{name}"


@pytest.fixture
def ledger(where: str) -> Iterator[Ledger]:
    opened = Ledger.open(where)
    yield opened
    opened.close()
