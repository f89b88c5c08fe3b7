"""`bzstream publish`: make a checkpoint the store's current snapshot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bzstream.cli._options import AsJson, Config, SigningKey, Store, settings_of

if TYPE_CHECKING:
    from bzstream.model import ManifestSigner, Publication, PublishedUnit


def publish(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json and the .safetensors files.")],
    block: Annotated[int, typer.Option(min=0, help="Chain block at which the model was taken.")],
    version: Annotated[str, typer.Option(help="Name of this version, such as step_1000.")],
    store: Store = None,
    experts: Annotated[
        Path | None, typer.Option(help="Expert map: a JSON file or the subnet's folder of tasks.")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Instead of a map: split evenly into so many groups.")
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Versions that stay in the store.")] = None,
    key: SigningKey = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; say what would be written.")] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Slice a checkpoint into units, hash them, and make them the store's current snapshot."""
    if (experts is None) == (groups is None):
        raise typer.BadParameter("give either --experts PATH or --groups N")
    from bzstream import model
    from bzstream.cli._progress import progress_bar

    settings = settings_of(config, {"store.path": store, "store.keep": keep, "node.wallet": key})
    if settings.store.path is None:
        raise typer.BadParameter("give --store STORE (or the setting store.path)")
    with progress_bar("checking" if dry_run else "publishing") as progress:
        report = model.publish(
            checkpoint,
            Path(settings.store.path),
            block=block,
            version=version,
            experts=experts,
            groups=groups,
            keep=settings.store.keep,
            signer=_signer(settings.node.wallet),
            progress=progress,
            dry_run=dry_run,
        )
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)


def _signer(wallet: str | None) -> ManifestSigner | None:
    if wallet is None:
        return None
    from bzstream.chain.keys import load_key

    signer: ManifestSigner = load_key(wallet)
    return signer


def _print(report: Publication) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("unit", "size", "tensors", "extents"):
        table.add_column(heading, justify="left" if heading == "unit" else "right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("" if report.dry_run else "hash", no_wrap=True)
    for unit in report.units:
        table.add_row(
            unit.unit,
            f"{unit.size:,}",
            f"{unit.tensors:,}",
            f"{unit.extents:,}",
            _fate(unit, report.dry_run),
            unit.content_hash or "",
        )
    # A pipe has no width; the widest row must not be folded or cut in a log.
    Console(width=None if sys.stdout.isatty() else 200).print(table, highlight=False)
    print()
    will = "would write" if report.dry_run else "wrote"
    print(f"{report.version} at block {report.block}: {will} {report.bytes_written:,} bytes, ", end="")
    print(f"linked {report.bytes_linked:,} that did not change, {report.seconds:.1f} s")
    if report.bytes_repeated:
        print(f"{report.bytes_repeated:,} bytes are stored more than once: experts that several groups have")
    if report.retired:
        print(f"deleted: {', '.join(report.retired)}")


def _fate(unit: PublishedUnit, dry_run: bool) -> str:
    if unit.file is None:
        return "view"
    if unit.linked:
        return "unchanged" if dry_run else "linked"
    return "to write" if dry_run else "written"
