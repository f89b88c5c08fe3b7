"""`python -m bench.micro [--quick] [--json FILE]`: run the micro-benchmarks under pytest-benchmark, in rows.

They lie outside `tests/`, so the ordinary test run never times anything. For pytest-benchmark's own options (comparing
with a saved run, histograms): `pytest bench/micro --benchmark-save=NAME`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.command import command
from bench.rows import row_of

HERE = Path(__file__).parent


def rows_from(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """pytest-benchmark's JSON as rows, in microseconds; where `extra_info` says `bytes`, in GB/s as well."""
    rows = []
    for bench in report["benchmarks"]:
        stats, size = bench["stats"], bench["extra_info"].get("bytes")
        name = bench["name"].removeprefix("test_").replace("_", " ")
        # The quartiles: the extremes of a hundred thousand calls are the machine's, not the code's.
        quartiles = [stats["q1"], stats["median"], stats["q3"]]
        rows.append(row_of(name, "µs", [seconds * 1e6 for seconds in quartiles]))
        if size:
            rows.append(row_of(name, "GB/s", [size / seconds / 1e9 for seconds in quartiles]))
    return rows


def measure(quick: bool = False) -> dict[str, Any]:
    """Run them all; rows. Raises RuntimeError when one fails."""
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
        return {"rows": rows_from(json.loads(report.read_text(encoding="utf-8")))}


def main() -> None:
    command("micro", __doc__, measure)


if __name__ == "__main__":
    main()
