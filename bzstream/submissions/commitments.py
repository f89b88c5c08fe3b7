"""Commitments in the ledger: kept for their round, and told of every submission whose file they are about.

A file is fetched before or after its round's commitments are known, so both operations look for the other. The ledger's
writer thread runs them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select, update

from bzstream.chain.commitments import RoundCommitments, commitment_text
from bzstream.submissions.schema import commitments, submissions

__all__ = ["committed_block", "write_all"]


def committed_block(connection: Connection, round_: int, hotkey: str, content_hash: str) -> int | None:
    """The block of the hotkey's commitment in a round, if it is to the file of this hash (`sha256:<hex>`)."""
    c = commitments.c
    held = connection.execute(select(c.text, c.block).where(c.round == round_, c.hotkey == hotkey)).one_or_none()
    if held is None or held.text != commitment_text(hotkey, content_hash.removeprefix("sha256:")):
        return None
    return int(held.block)


def write_all(connection: Connection, rounds: Sequence[RoundCommitments]) -> Sequence[None]:
    """Keep the commitments of rounds, in place of those that were known, and apply them to what was fetched already."""
    table = submissions.c
    for round_, by_hotkey in rounds:
        connection.execute(delete(commitments).where(commitments.c.round == round_))
        for hotkey, commitment in by_hotkey.items():
            connection.execute(insert(commitments).values(round=round_, hotkey=hotkey, **commitment._asdict()))
        fetched = select(table.submission_id, table.hotkey, table.content_hash).where(
            table.round == round_, table.content_hash.is_not(None)
        )
        for submission_id, hotkey, content_hash in connection.execute(fetched).all():
            block = committed_block(connection, round_, hotkey, content_hash)
            connection.execute(
                update(submissions).where(table.submission_id == submission_id).values(committed_block=block)
            )
    return [None] * len(rounds)
