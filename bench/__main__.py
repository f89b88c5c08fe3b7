"""All benches under one roof: `python -m bench [--quick] [--only NAME,...] [--json FILE] [--plots FOLDER]`.

Each bench runs as a process of its own, `python -m bench.<name> --json FILE`, one after the other: its peak memory is
its own, and one that hangs or crashes costs only its own figures. What is not on this machine is said and left out.

The JSON is written anew after each, so that a run that is broken off keeps what it has; `bench.report` joins several.

`--quick` shows in less than three minutes that everything works. It judges nothing: its windows are too short.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from bench import machine, plots, report
from bench.rows import Outcome, read_outcome, unjudged

__all__ = ["BENCHES", "document_of", "gather", "main"]

BENCHES: dict[str, str] = {
    "serve": "Downloads: one worker beside its peers",
    "latency": "Under load: small requests, memory, fairness, crowds",
    "small": "Small requests: /health of the whole node",
    "first_byte": "The first byte of a download",
    "workers": "One worker and two",
    "tls": "Plain and TLS",
    "busy": "Beside a busy evaluator",
    "fleet": "The fleet: 256 miners in one window",
    "publish": "Publishing",
    "pull": "The miner's side",
    "coding": "Fewer bytes: the coding of chunks",
    "coding_link": "Fewer bytes: pulls over 100 Mbit/s",
    "submissions": "Submissions",
    "evaluate": "Evaluation: from file to loss",
    "micro": "The hot path, piece by piece",
}
"""Module of this package -> title, in the order in which they run."""

QUICK_ARGUMENTS: dict[str, tuple[str, ...]] = {"pull": ("--only", "disk,tensors")}
"""What a quick run leaves out: the wide-area link alone takes minutes."""

QUICK_LIMIT_S, LIMIT_S = 240.0, 1200.0
"""Seconds after which one bench is given up."""
LAST_WORDS = 3


def gather(name: str, *, quick: bool, limit: float) -> Outcome:
    """Run one bench. Never raises for what goes wrong inside it: the outcome says so."""
    if importlib.util.find_spec(f"bench.{name}") is None:
        return Outcome(name, "absent", f"there is no bench/{name}.py in this checkout")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as folder:
        result, said = Path(folder) / "result.json", Path(folder) / "said"
        command = [sys.executable, "-m", f"bench.{name}", "--json", str(result)]
        if quick:
            command += ["--quick", *QUICK_ARGUMENTS.get(name, ())]
        with said.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                reason = f"it was not done after {limit:.0f} s"
                return Outcome(name, "failed", reason, time.monotonic() - began)
            finally:
                _end(process)
        seconds = time.monotonic() - began
        # The exit status does not count: some benches report a missed target by it.
        if not result.exists():
            words = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_WORDS:]
            reason = f"exit status {process.returncode}: {' / '.join(words) or 'it said nothing'}"
            absent = any("ModuleNotFoundError" in line or "MissingPeer" in line for line in words)
            return Outcome(name, "absent" if absent else "failed", reason, seconds)
        try:
            return read_outcome(name, json.loads(result.read_text(encoding="utf-8")), seconds)
        except (ValueError, KeyError, TypeError) as error:
            return Outcome(name, "failed", f"its result cannot be read: {error!r}", seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a bench that is still running, with every server that it has started."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        for child in children:
            child.kill()
        process.kill()
        # What is killed still runs for an instant: the next bench begins when it is gone.
        psutil.wait_procs(children, timeout=5)
    process.wait()


def document_of(outcomes: Sequence[Outcome], *, quick: bool, date: str, seconds: float) -> dict[str, Any]:
    """The JSON of a run: date, machine, and every bench with its rows."""
    benches = [{**outcome.as_dict(), "title": BENCHES.get(outcome.bench, outcome.bench)} for outcome in outcomes]
    return {
        "date": date,
        "quick": quick,
        "seconds": round(seconds, 1),
        "commit": _commit(),
        "machine": machine.describe(),
        "benches": benches,
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    """Replace the file at once: whoever breaks the run off never finds half of one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a bench failed; a missed target or an absent bench is no failure."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less than three minutes, nothing is judged")
    parser.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(BENCHES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG and SVG there")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(BENCHES)
    if unknown := [name for name in names if name not in BENCHES]:
        parser.error(f"there is no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(machine.in_words(machine.describe()), markup=False)
    date, began = datetime.now(UTC).strftime("%Y-%m-%d"), time.monotonic()
    outcomes: list[Outcome] = []
    document: dict[str, Any] = {}
    for number, name in enumerate(names, 1):
        elapsed = time.strftime("%M:%S", time.gmtime(time.monotonic() - began))
        console.print(f"[dim]{elapsed}  {number}/{len(names)}  {BENCHES[name]} …[/]")
        outcome = gather(name, quick=options.quick, limit=QUICK_LIMIT_S if options.quick else LIMIT_S)
        console.print(f"[dim]       {outcome.status} after {outcome.seconds:.0f} s[/]")
        outcomes.append(unjudged(outcome) if options.quick else outcome)
        document = document_of(outcomes, quick=options.quick, date=date, seconds=time.monotonic() - began)
        if options.json:
            _write(options.json, document)
    report.show(outcomes, BENCHES, console)
    console.print(f"\n{document['seconds']:.0f} s in all.")
    if options.plots:
        try:
            drawn = plots.draw(document, options.plots)
        except ModuleNotFoundError:
            console.print("No plots: matplotlib is not installed; pip install 'bzstream\\[bench]'.")
        else:
            console.print(f"{len(drawn)} plots in {options.plots}.")
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
