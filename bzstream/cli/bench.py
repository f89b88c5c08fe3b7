"""`bzstream bench`: what a link and a validator really give."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bzstream.cli._options import AsJson, CaFile, ProofKey, Receiver, Url, caller, client_command

if TYPE_CHECKING:
    from bzstream.client import LinkReport, Sweep

__all__ = ["bench"]


def bench(
    url: Url,
    group: Annotated[
        int | None, typer.Option(min=0, help="Expert group to download. Default: the shared tensors.")
    ] = None,
    connections: Annotated[str, typer.Option(help="Numbers of connections to try, with commas.")] = "1,8,64",
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds for each of them.")] = 5.0,
    hotkey: Annotated[
        str | None, typer.Option(help="SS58 address to ask in the name of. Default: a made-up one.")
    ] = None,
    key: ProofKey = None,
    validator_hotkey: Annotated[str | None, typer.Option(help="SS58 address of the validator.")] = None,
    receiver: Receiver = None,
    ca_file: CaFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep into this PNG file (needs matplotlib).")] = None,
    as_json: AsJson = False,
) -> None:
    """Download for some seconds with each number of connections; nothing is written to disk.

    Shows the speed, the time to the first byte, how evenly the connections are served, and how long a small range
    takes. The token comes from BZ_AUTH_TOKEN.
    """
    try:
        counts = [int(text) for text in connections.split(",")]
    except ValueError:
        raise typer.BadParameter("--connections is a list of numbers such as 1,8,64") from None
    from bzstream import client

    hotkey, key = caller(hotkey, key)
    if hotkey is None and key is None:
        from bzstream.chain.keys import encode_hotkey

        # An address that nobody has the key of: the slice needs a claim, the measurement no identity.
        hotkey = encode_hotkey(b"bzstream bench".ljust(32, b"\0"))
    with client_command("stopped"):
        report = client.measure(
            url,
            group=group,
            connections=counts,
            seconds=seconds,
            hotkey=hotkey,
            key=key,
            validator_hotkey=validator_hotkey,
            receiver=receiver,
            ca_file=ca_file,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _print(report)
    if plot is not None:
        _plot(report, plot)


def _print(report: LinkReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("connections", "GB/s", "Gbit/s", "first byte p50", "p99", "fairness", "slowest", "fastest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for sweep in report.sweeps:
        table.add_row(*_row(sweep))
    # A pipe has no width; the widest row must not be folded or cut in a log.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(f"{report.url}, {report.label} of {report.version} ({report.size / 1e9:.2f} GB)", soft_wrap=True)
    console.print(table)
    console.print(
        f"round trip {report.rtt * 1e3:.2f} ms; a 64 KiB range takes {report.range_p50 * 1e3:.2f} ms (p50), "
        f"{report.range_p99 * 1e3:.2f} ms (p99)"
    )


def _row(sweep: Sweep) -> tuple[str, ...]:
    return (
        str(sweep.connections),
        f"{sweep.rate / 1e9:.3f}",
        f"{sweep.rate * 8 / 1e9:.2f}",
        f"{sweep.first_byte_p50 * 1e3:.1f} ms",
        f"{sweep.first_byte_p99 * 1e3:.1f} ms",
        f"{sweep.fairness:.3f}",
        f"{sweep.slowest / 1e6:.1f} MB/s",
        f"{sweep.fastest / 1e6:.1f} MB/s",
    )


def _plot(report: LinkReport, path: Path) -> None:
    from bzstream.client import ClientError

    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ClientError("--plot needs matplotlib; install it with: pip install 'bzstream[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = [str(sweep.connections) for sweep in report.sweeps]
    figure, (speed, latency) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    speed.bar(counts, [sweep.rate / 1e9 for sweep in report.sweeps])
    speed.set(xlabel="connections", ylabel="GB/s", title="speed")
    latency.plot(counts, [sweep.first_byte_p50 * 1e3 for sweep in report.sweeps], "o-", label="p50")
    latency.plot(counts, [sweep.first_byte_p99 * 1e3 for sweep in report.sweeps], "o-", label="p99")
    latency.set(xlabel="connections", ylabel="ms", title="time to first byte", ylim=(0, None))
    latency.legend()
    figure.suptitle(f"{report.url}, {report.label} of {report.version}")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ClientError(f"the plot cannot be written to {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
