"""`bzstream info`: what a node has, and how it is."""

from __future__ import annotations

from bzstream.cli._options import AsJson, CaFile, Hotkey, Url, client_command

__all__ = ["info"]


def info(url: Url, hotkey: Hotkey = None, ca_file: CaFile = None, as_json: AsJson = False) -> None:
    """Show whose node it is, its block and phase, and its versions with every unit's size and hash.

    The token comes from BZ_AUTH_TOKEN; the URL from BZSTREAM_URL when none is given.
    """
    from bzstream import client

    with client_command("stopped"):
        found = client.info(url, hotkey=hotkey, ca_file=ca_file)
    if as_json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    print(
        f"validator {found.validator_hotkey or 'unknown'}, {found.status}, block {found.current_block}, {found.phase}"
    )
    for reason in found.reasons:
        print(f"  {reason}")
    from rich.console import Console
    from rich.table import Table

    table = Table("version", "block", "published", "signed", "unit", "bytes", "content hash", box=None)
    for version in found.versions:
        name = version.model_version + (" (current)" if version.model_version == found.current else "")
        begin = (name, str(version.block_number), version.published_at, "yes" if version.signed else "no")
        for unit in version.units:
            which = unit.unit if unit.expert_group is None else f"group {unit.expert_group}"
            table.add_row(*begin, which, f"{unit.size:,}", unit.content_hash)
            begin = ("", "", "", "")
    Console(width=None if Console().is_terminal else 200, highlight=False, markup=False).print(table)
