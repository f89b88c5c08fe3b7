"""`python -m bench.micro [--quick] [--json FILE]`: run the micro-benchmarks under pytest-benchmark, in rows.

They lie outside `tests/`, so the ordinary test run never times anything. For pytest-benchmark's own options (comparing
with a saved run, histograms): `pytest bench/micro --benchmark-save=NAME`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def rows_from(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """pytest-benchmark's JSON as rows, in microseconds; where `extra_info` says `bytes`, in GB/s as well."""
    rows = []
    for bench in report["benchmarks"]:
        stats, size = bench["stats"], bench["extra_info"].get("bytes")
        name = bench["name"].removeprefix("test_").replace("_", " ")
        row = {"name": name, "subject": "bzstream", "unit": "µs", "median": stats["median"] * 1e6}
        # The quartiles: the extremes of a hundred thousand calls are the machine's, not the code's.
        rows.append({**row, "low": stats["q1"] * 1e6, "high": stats["q3"] * 1e6})
        if size:
            speeds = {
                part: size / stats[of] / 1e9 for part, of in (("median", "median"), ("low", "q3"), ("high", "q1"))
            }
            rows.append({"name": name, "subject": "bzstream", "unit": "GB/s", **speeds})
    return rows


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Run them all. Raises RuntimeError when one fails."""
    with tempfile.TemporaryDirectory(prefix="bzstream-bench-") as folder:
        report = Path(folder) / "report.json"
        seconds = "0.05" if quick else "1.0"
        status = pytest.main(
            [
                *(str(HERE), "-q", "-p", "no:cacheprovider", f"--benchmark-json={report}"),
                *(f"--benchmark-max-time={seconds}", "--benchmark-min-rounds=5", "--benchmark-disable-gc"),
                *("--benchmark-columns=median,iqr,ops", "--benchmark-sort=name"),
            ]
        )
        if status != 0:
            raise RuntimeError(f"pytest ended with {status!r}")
        return rows_from(json.loads(report.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = run(arguments.quick)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
