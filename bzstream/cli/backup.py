"""`bzstream backup`: a consistent copy of the ledger, beside a running node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def backup(
    ledger: Annotated[str, typer.Argument(metavar="LEDGER", help="SQLite file, such as STORE/ledger.sqlite.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The copy. It must not exist yet.")],
) -> None:
    """Copy the ledger, with all that was accepted until now, while nodes use it. `cp` would miss the newest part."""
    from bzstream.submissions.backup import back_up

    print(f"{file}: {back_up(ledger, file):,} submissions")
