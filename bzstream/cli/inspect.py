"""`bzstream inspect`: what a store or a file holds, and with --verify whether it is undamaged."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bzstream.cli._options import AsJson
from bzstream.errors import BzstreamError

if TYPE_CHECKING:
    from bzstream.model.inspection import FileReport, StoreReport


def inspect(
    path: Annotated[Path, typer.Argument(metavar="STORE|FILE", help="A store, or a downloaded file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every byte.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show snapshots, units, sizes and hashes; with --verify read and hash everything again."""
    from bzstream.cli._progress import progress_bar
    from bzstream.model.inspection import inspect_file, inspect_store, verify_store

    if path.is_dir():
        if verify:
            with progress_bar("verifying") as progress:
                report = verify_store(path, progress)
        else:
            report = inspect_store(path)
        if as_json:
            print(json.dumps(_store_json(report), indent=2))
        else:
            _print_store(report, verify)
        if report.findings:
            raise InspectionFailed(_summary(path, report))
        return
    file = inspect_file(path, verify=verify)
    if as_json:
        print(json.dumps(_file_json(file), indent=2))
    else:
        _print_file(path, file)
    if file.damaged:
        raise InspectionFailed(f"{path} is damaged: its payload does not have the hash that its envelope announces")


class InspectionFailed(BzstreamError):
    """What was inspected is not what was published."""


def _summary(path: Path, report: StoreReport) -> str:
    first = report.findings[0]
    more = f" (and {len(report.findings) - 1} more)" if len(report.findings) > 1 else ""
    place = ", ".join(part for part in (first.version, first.unit) if part)
    return f"{path} has a problem: {place}: {first.problem}{more}"


def _print_store(report: StoreReport, verified: bool) -> None:
    for record in report.snapshots:
        published = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.published_at))
        mark = "  (current)" if record.version == report.current else ""
        signed = f", signed by {record.hotkey}" if record.hotkey else ""
        print(f"{record.version}  block {record.block}, published {published}{signed}{mark}")
        bad = {finding.unit: finding.problem for finding in report.findings if finding.version == record.version}
        for unit in record.units:
            state = f"DAMAGED: {bad[unit.label]}" if unit.label in bad else "verified" if verified else ""
            print(f"  {unit.label:<12} {unit.size:>17,}  {unit.content_hash}  {state}".rstrip())
        print()
    for finding in report.findings:
        if finding.unit in ("snapshot.json", "current"):
            print(f"{finding.version or 'store'}: {finding.problem}")
    for name in report.leftovers:
        print(f"{name}: left by a publish that did not finish; the next publish removes it")


def _store_json(report: StoreReport) -> dict[str, Any]:
    return {
        "current": report.current,
        "snapshots": [
            {
                "model_version": record.version,
                "block_number": record.block,
                "published_at": record.published_at,
                "validator_hotkey": record.hotkey,
                "units": [
                    {
                        "unit": unit.kind,
                        "expert_group": unit.group,
                        "file": unit.file,
                        "size": unit.size,
                        "content_hash": unit.content_hash,
                        "chunks": len(unit.chunks),
                    }
                    for unit in record.units
                ],
            }
            for record in report.snapshots
        ],
        "problems": [{"model_version": f.version, "unit": f.unit, "problem": f.problem} for f in report.findings],
        "leftovers": list(report.leftovers),
    }


def _file_json(report: FileReport) -> dict[str, Any]:
    return {
        "envelope": report.envelope,
        "payload_offset": report.payload_offset,
        "size": report.size,
        "content_hash": report.sha256 and f"sha256:{report.sha256}",
        "damaged": report.damaged if report.sha256 else None,
        "metadata": report.head.metadata,
        "tensors": [
            {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in report.head.tensors
        ],
    }


def _print_file(path: Path, report: FileReport) -> None:
    print(f"{path}: safetensors, {report.size:,} bytes, {len(report.head.tensors):,} tensors")
    if report.envelope is not None:
        print(f"  envelope     {json.dumps(report.envelope)} ({report.payload_offset} bytes)")
    for name, value in report.head.metadata.items():
        print(f"  {name:<12} {value if len(value) <= 100 else value[:97] + '...'}")
    for tensor in report.head.tensors:
        print(f"  {tensor.dtype:<5} {'x'.join(map(str, tensor.shape)) or 'scalar':<20} {tensor.name}")
    if report.sha256 is not None:
        state = "" if report.envelope is None else "  DAMAGED" if report.damaged else "  as the envelope says"
        print(f"sha256:{report.sha256}{state}")
