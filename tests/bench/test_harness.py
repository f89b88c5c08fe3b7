"""The pure parts of the benches: rows, tables, the machine's description, plots, and benches as processes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from rich.console import Console

from bench import __main__ as harness
from bench import fleet, latency, machine, plots, report, watch
from bench.micro.__main__ import rows_from
from bench.rows import Outcome, Row, margin, read_outcome, read_row, row_of, unjudged
from bench.serve import Measurement
from bench.serve import report as served_report

POSITIVE = st.floats(1e-3, 1e9)


def test_a_row_is_judged_by_its_ratio_where_there_is_one() -> None:
    assert row_of("speed", "GB/s", [5.0, 6.0, 7.0], peer="nginx", ratio=1.1, target=">= 1.2")["met"] is False
    assert row_of("speed", "GB/s", [5.0, 6.0, 7.0], peer="nginx", ratio=1.2, target=">= 1.2")["met"] is True
    assert row_of("stall", "ms", [19.0, 21.0, 20.0], target="<= 20")["met"] is True
    assert row_of("stall", "ms", [19.0, 21.0, 20.0], target="< 20")["met"] is False
    assert row_of("speed", "GB/s", [5.0])["met"] is None


def test_a_row_keeps_the_spread_of_several_rounds_only() -> None:
    several, one = row_of("x", "s", [3.0, 1.0, 2.0]), row_of("x", "s", [3.0])
    assert (several["median"], several["low"], several["high"]) == (2.0, 1.0, 3.0)
    assert (one["median"], one["low"], one["high"]) == (3.0, None, None)


def test_a_row_of_another_form_is_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        read_row("new", {**row_of("x", "s", [1.0]), "colour": "red"})


def test_a_row_survives_json() -> None:
    row = read_row("fleet", row_of("x", "s", [1.0, 2.0], peer="cp", ratio=2.0, target="<= 3"))
    assert read_row("fleet", json.loads(json.dumps(row.as_dict()))) == row


def test_no_values_are_no_figure() -> None:
    row = read_row("x", row_of("x", "s", [], target=">= 1"))
    assert (row.median, row.met) == (None, None)


def test_a_quick_run_judges_nothing() -> None:
    outcome = read_outcome("x", {"rows": [row_of("x", "s", [1.0], target="< 0.5")]}, 1.0)
    assert outcome.rows[0].met is False
    assert [(row.target, row.met) for row in unjudged(outcome).rows] == [("", None)]


def test_margin_is_how_far_a_figure_lies_beyond_its_target() -> None:
    assert margin(read_row("x", row_of("x", "x", [1.0], ratio=2.4, target=">= 1.2"))) == pytest.approx(2.0)
    assert margin(read_row("x", row_of("x", "ms", [40.0], target="<= 20"))) == pytest.approx(0.5)
    assert margin(read_row("x", {**row_of("x", "x", [1.0], target="only its file"), "met": True})) is None


# Rows of single benches.


def served(server: str, connections: int, rates: list[float], costs: list[float], error: str = "") -> Measurement:
    return Measurement(server, connections, "discard", rates, costs, [1.0] * len(rates), 50.0, error)


SERVED = served_report(
    [
        served("bzstream", 8, [6.0, 3.0, 6.0], [0.1, 0.2, 0.1]),
        served("C sendfile", 8, [6.0, 3.0, 6.0], [0.1, 0.2, 0.1]),
        served("nginx sendfile", 8, [3.0, 1.5, 3.0], [0.2, 0.4, 0.2]),
        served("nginx aio", 8, [4.0, 2.0, 4.0], [0.2, 0.4, 0.2]),
        served("FastAPI", 8, [0.8, 0.4, 0.8], [1.0, 2.0, 1.0]),
        served("bzstream", 256, [4.8, 2.4, 4.8], [0.1, 0.2, 0.1]),
        served("granian", 0, [], [], "not installed"),
    ]
)


def test_the_servers_bench_is_compared_round_by_round_with_the_best_of_nginx() -> None:
    outcome = read_outcome("serve", SERVED, 1.0)
    judged: dict[object, object] = {(row.name, row.peer): (row.ratio, row.met) for row in outcome.rows if row.target}
    assert judged == {
        ("speed at 8 connections", "C sendfile"): (pytest.approx(1.0), True),
        ("speed at 8 connections", "nginx aio"): (pytest.approx(1.5), True),
        ("speed at 8 connections", "FastAPI"): (pytest.approx(7.5), True),
        ("speed at 256 connections", "its own at 8"): (pytest.approx(0.8), False),
        ("server CPU at 8 connections", "C sendfile"): (pytest.approx(1.0), True),
        ("server CPU at 8 connections", "FastAPI"): (pytest.approx(0.1), True),
    }
    limit: list[object] = [
        (row.ratio, row.target) for row in outcome.rows if (row.subject, row.peer) == ("C sendfile", "nginx aio")
    ]
    assert limit == [(pytest.approx(1.5), "")], "what anybody could have over nginx"
    assert outcome.missing == ("granian: not installed",)


def test_latency_is_judged_for_us_alone() -> None:
    window = {"p50": 1.0, "p99": 30.0, "max": 40.0}
    ours, theirs = [{**window, "gb_s": 1.9, "stall_ms": 5.0}], [{**window, "gb_s": 2.0}]
    rows = latency.load_rows("cold", ours, theirs) + latency.load_rows("cold", theirs, [], subject="nginx aio")
    judged = {row["name"]: (row["subject"], row["met"]) for row in rows if row["target"]}
    assert judged == {
        "/health p99 cold": ("bzstream", False),
        "downloads cold": ("bzstream", True),
        "longest stall of the loop cold": ("bzstream", True),
    }
    assert latency.load_rows("cold", [], []) == []


def test_what_the_machine_added_stands_beside_a_stall() -> None:
    window = {"p50": 1.0, "p99": 3.0, "gb_s": 2.0, "steal": 0.1}
    windows = [{**window, "stall_ms": stall, "nap_ms": nap} for stall, nap in ((25.0, 24.0), (30.0, 31.0), (9.0, 3.0))]
    rows = {row["name"]: row for row in latency.load_rows("warm", windows, [])}
    stall = rows["longest stall of the loop warm"]
    assert (stall["median"], stall["low"], stall["high"], stall["met"]) == (25.0, 9.0, 30.0, False)
    assert rows["machine: longest oversleep warm"]["median"] == 24.0
    assert rows["machine: stolen warm"]["median"] == 0.1
    share, wait, nap = latency.crowd_rows(10_000, [0.9, 0.99, 1.0], [8.0, 9.0, 30.0], [3.0, 2.0])
    assert share["name"] == "downloads beside 10,000 silent connections, of those alone"
    assert (share["median"], share["met"], wait["median"], wait["met"], nap["median"]) == (0.99, True, 9.0, True, 3.0)


def test_stolen_time_is_read_from_the_kernels_words() -> None:
    import os

    assert watch.stolen("cpu  1 2 3 4 5 6 7 800 9 10\ncpu0 1\n") == 800 / os.sysconf("SC_CLK_TCK")
    with watch.watching(0.05) as figures:
        assert figures == {}
    assert figures["nap_ms"] > 0
    assert 0 <= figures["steal"] <= 1


def test_micro_benchmarks_become_rows() -> None:
    stats = {"median": 2e-3, "q1": 1e-3, "q3": 4e-3}
    time, speed = rows_from({"benchmarks": [{"name": "test_a_b", "stats": stats, "extra_info": {"bytes": 8_000_000}}]})
    assert (time["name"], time["median"], time["low"], time["high"]) == ("a b", 2000.0, 1000.0, 4000.0)
    assert (speed["median"], speed["low"], speed["high"]) == (4.0, 2.0, 8.0)


# The fleet's arithmetic.


def test_habits_have_their_shares_and_are_the_same_for_the_same_seed() -> None:
    found = fleet.habits(256, 0.05, 3)
    names = [habit for habit, _ in found]
    assert (names.count("stall"), names.count("drop")) == (13, 13)
    assert all(0.1 <= depth <= 0.9 for _, depth in found)
    assert found == fleet.habits(256, 0.05, 3) != fleet.habits(256, 0.05, 4)
    assert {habit for habit, _ in fleet.habits(256, 0.0, 3)} == {"plain"}


def test_the_mission_on_paper() -> None:
    text = fleet.extrapolate(rate=5e9, cpu_per_gb=0.1)
    assert "256 x 3.62 GB = 927 GB in 240 s = 3.86 GB/s = 30.9 Gbit/s" in text
    assert "100 / 8 x 1448 / 1538 = 11.77 GB/s" in text
    assert "927 / 11.77 = 79 s" in text
    assert "185 s, 77% of the phase" in text
    assert "0.100 s/GB x 927 GB / 240 s = 0.39 cores" in text


# What people see.


def document() -> dict[str, object]:
    outcomes = [
        read_outcome("serve", SERVED, 12.0),
        Outcome("pull", "absent", "there is no bench/pull.py in this checkout"),
        read_outcome(
            "fleet",
            {
                "rows": [row_of("slowest | median", "x", [1.4], target="<= 1.3")],
                "notes": "on paper",
                "series": {"slice_mb": 8.0, "clean_s": [1.0, 1.1], "misbehaving_s": [1.0, 1.3]},
            },
            3.0,
        ),
    ]
    return json.loads(json.dumps(harness.document_of(outcomes, quick=False, date="2026-11-22", seconds=15.0)))  # type: ignore[no-any-return]


def test_the_json_of_a_run() -> None:
    found = document()
    assert found["date"] == "2026-11-22"
    assert found["quick"] is False
    benches = found["benches"]
    assert isinstance(benches, list)
    assert [(bench["bench"], bench["status"]) for bench in benches] == [
        ("serve", "done"),
        ("pull", "absent"),
        ("fleet", "done"),
    ]
    assert set(benches[0]["rows"][0]) == {
        "bench", "name", "unit", "median", "subject", "low", "high", "peer", "ratio", "target", "met", "more",
    }  # fmt: skip
    assert found["machine"]["cores"] >= 1  # type: ignore[index]


def test_markdown_has_every_row_and_says_what_is_missing() -> None:
    text = report.markdown(document())
    assert text.startswith("Measured 2026-11-22 on ")
    assert "| 8 connections, discarding client | nginx aio | 4 GB/s | 2 – 4 |  |  |  |" in text
    assert "| speed at 8 connections | bzstream | 6 GB/s | 3 – 6 | 1.50x nginx aio | >= 1.2 | met |" in text
    assert "Not measured: there is no bench/pull.py in this checkout" in text
    assert "Not measured: granian: not installed" in text
    assert r"| slowest \| median | bzstream | 1.40 x |  |  | <= 1.3 | not met |" in text
    only = report.markdown(document(), only_targets=True)
    assert "discarding client" not in only
    assert "1.50x nginx aio" in only


def test_runs_are_joined_the_last_that_was_done_counts() -> None:
    def of(date: str, *outcomes: Outcome) -> dict[str, Any]:
        return harness.document_of(outcomes, quick=False, date=date, seconds=10.0)

    early, late = Row("serve", "early", "GB/s", 1.0), Row("serve", "late", "GB/s", 2.0)
    first = of("2026-11-22", Outcome("serve", "done", rows=(early,)), Outcome("fleet", "failed", "it broke"))
    second = of("2026-11-23", Outcome("fleet", "done"), Outcome("serve", "done", rows=(late,)))
    third = of("2026-11-23", Outcome("serve", "failed", "no luck"), Outcome("pull", "absent", "not here"))
    joined = report.join([first, second, third])
    assert [(one["bench"], one["status"]) for one in joined["benches"]] == [
        ("serve", "done"),
        ("fleet", "done"),
        ("pull", "absent"),
    ]
    assert joined["benches"][0]["rows"][0]["name"] == "late"
    assert (joined["date"], joined["seconds"]) == ("2026-11-22 to 2026-11-23", 30.0)
    assert "| late |" in report.markdown(joined)
    with pytest.raises(ValueError, match="different machines"):
        report.join([first, {**second, "machine": {**second["machine"], "cores": 999}}])


def test_the_table_on_a_terminal() -> None:
    with Path("/dev/null").open("w") as nowhere:
        console = Console(width=160, record=True, file=nowhere)
        rows = (Row("x", "speed", "GB/s", 5.0, low=4.0, high=6.0, target=">= 4", met=True),)
        outcomes = [Outcome("x", "done", rows=rows, missing=("nginx [apt]",)), Outcome("y", "failed", "it [broke]")]
        report.show(outcomes, {"x": "A title"}, console)
        text = console.export_text()
    assert re.search(r"speed\s+5 GB/s\s+4 – 6\s+>= 4\s+met", text)
    assert "not here: nginx [apt]" in text
    assert "failed: it [broke]" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (1234567.8, "1,234,568"), (12.34, "12.3"), (1.234, "1.23"), (0.0123, "0.012"), (3, "3")],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert report.figure(value) == text


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    files = plots.draw(document(), tmp_path)
    assert {file.name for file in files} == {
        f"{name}.{kind}" for name in ("throughput", "cost", "fleet", "targets") for kind in ("png", "svg")
    }
    assert all(file.stat().st_size > 1000 for file in files)
    nothing = {**document(), "benches": []}
    assert plots.draw(nothing, tmp_path / "nothing") == []


# The machine.


def test_the_machine_is_described_without_naming_it() -> None:
    found = machine.describe()
    versions = found["versions"]
    assert isinstance(versions, dict)
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    import socket

    assert socket.gethostname() not in json.dumps(found)
    assert str(found["cpu"]) in machine.in_words(found)


def test_processors_and_versions_are_read_from_what_is_said() -> None:
    assert machine.cpu_model("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\nflags\t: fpu") == "Some CPU @ 2 GHz"
    assert machine.cpu_model("processor : 0") != ""
    assert machine.program_version("nginx version: nginx/1.22.1") == "1.22.1"
    assert machine.program_version("none") is None


# Benches as processes.


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose `pretended_*.py` are benches: part of the package `bench` for this test's processes too."""
    import bench

    monkeypatch.setattr(bench, "__path__", [*bench.__path__, str(tmp_path)])
    package = tmp_path / "bench"
    package.symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_bench_that_works_and_misses_its_target_is_done(pretended: Path) -> None:
    row = {"name": "x", "unit": "", "median": 1, "target": "> 2", "met": False}
    (pretended / "pretended_good.py").write_text(
        f"import sys, pathlib\npathlib.Path(sys.argv[2]).write_text({json.dumps({'rows': [row]})!r})\nsys.exit(1)\n"
    )
    outcome = harness.gather("pretended_good", quick=False, limit=60)
    assert (outcome.status, outcome.rows[0].met) == ("done", False)


def test_a_bench_that_breaks_says_its_last_words(pretended: Path) -> None:
    (pretended / "pretended_bad.py").write_text("raise RuntimeError('no such luck')\n")
    outcome = harness.gather("pretended_bad", quick=True, limit=60)
    assert outcome.status == "failed"
    assert "no such luck" in outcome.reason


def test_a_bench_whose_peer_is_missing_is_absent(pretended: Path) -> None:
    (pretended / "pretended_lonely.py").write_text("import a_module_that_is_not_there\n")
    assert harness.gather("pretended_lonely", quick=True, limit=60).status == "absent"


def test_a_bench_that_hangs_is_ended_with_all_that_it_started(pretended: Path) -> None:
    (pretended / "pretended_slow.py").write_text(
        "import subprocess, time, pathlib\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "pathlib.Path('child').write_text(str(child.pid))\ntime.sleep(600)\n"
    )
    outcome = harness.gather("pretended_slow", quick=True, limit=2)
    assert (outcome.status, outcome.reason) == ("failed", "it was not done after 2 s")
    child = Path(f"/proc/{(pretended / 'child').read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_what_was_measured_before_a_run_is_broken_off_is_kept(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.dumps({"rows": [{"name": "x", "unit": "", "median": 1}]})
    (pretended / "pretended_good.py").write_text(
        f"import sys, pathlib\npathlib.Path(sys.argv[2]).write_text({rows!r})\n"
    )
    monkeypatch.setattr(harness, "BENCHES", {"pretended_good": "A bench", "pretended_next": "The next"})
    real = harness.gather

    def gather(name: str, *, quick: bool, limit: float) -> Outcome:
        if name == "pretended_next":
            raise KeyboardInterrupt
        return real(name, quick=quick, limit=limit)

    monkeypatch.setattr(harness, "gather", gather)
    with pytest.raises(KeyboardInterrupt):
        harness.main(["--json", "out.json"])
    (kept,) = json.loads(Path("out.json").read_text())["benches"]
    assert (kept["bench"], kept["rows"][0]["median"]) == ("pretended_good", 1)


def test_a_bench_that_is_not_there_is_absent() -> None:
    assert harness.gather("no_such_bench", quick=True, limit=1).status == "absent"


def test_an_unknown_name_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        harness.main(["--only", "flet"])
    assert ended.value.code == 2
    assert "flet" in capsys.readouterr().err
