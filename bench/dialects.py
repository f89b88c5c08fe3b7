"""What single benches write in forms of their own, put into rows: the servers' bench, latency, and the evaluator's.

The figures stay theirs; what is added is the comparison with peers and the project's targets for it. A ratio is the
median of the ratios of single rounds, in which the two took turns, so that a slow spell of the machine hits both.

Everything here is pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.rows import quantile, row_of

__all__ = ["translate"]

Rows = list[dict[str, Any]]
OURS, LIMIT, FASTAPI, NGINX = "bzstream", "C sendfile", "FastAPI", "nginx"


def translate(bench: str, document: Any) -> Any:
    """A bench's JSON in the form that `rows.read_outcome` takes; of a bench that uses it already, as it is."""
    dialect = _DIALECTS.get(bench)
    return document if dialect is None else dialect(document)


def serve(document: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`bench.serve`: one object per server, number of connections and kind of client, with lists of rounds."""
    rows: Rows = []
    missing = [f"{raw['server']}: {raw['error']}" for raw in document if raw.get("error")]
    found = {(raw["client"], raw["connections"], raw["server"]): raw for raw in document if raw.get("rates")}
    for (client, connections, server), raw in found.items():
        health = client == "health"
        name = "/health, keep-alive" if health else f"{connections} connections, {client}ing client"
        facts = {"connections": connections, "client": client, "peak_mib": raw.get("peak_mib")}
        if raw.get("jain"):
            facts["jain"] = min(raw["jain"])
        rows.append({**row_of(name, "1/s" if health else "GB/s", raw["rates"], subject=server), "more": facts})
        unit = "s/1000" if health else "s/GB"
        rows.append({**row_of(f"{name}: server CPU", unit, raw["costs"], subject=server), "more": facts})
    rows += _serve_targets(found)
    return {"rows": rows, "missing": missing}


_Found = Mapping[tuple[str, int, str], Mapping[str, Any]]


def _serve_targets(found: _Found) -> Rows:
    rows: Rows = []

    def compare(
        name: str,
        what: str,
        client: str,
        connections: int,
        peer: str,
        target: str,
        *,
        at: int | None = None,
        subject: str = OURS,
    ) -> None:
        ours, theirs = found.get((client, connections, subject)), found.get((client, at or connections, peer))
        if ours is not None and theirs is not None:
            unit = {"rates": "1/s" if client == "health" else "GB/s", "costs": "s/GB"}[what]
            label = peer if at is None else f"its own at {at}"
            ratio = _ratio(ours[what], theirs[what])
            rows.append(row_of(name, unit, ours[what], subject=subject, peer=label, ratio=ratio, target=target))

    best = max(
        (server for client, count, server in found if (client, count) == ("discard", 8) and server.startswith(NGINX)),
        key=lambda server: quantile(found["discard", 8, server]["rates"], 0.5),
        default=NGINX,
    )
    compare("speed at 8 connections", "rates", "discard", 8, LIMIT, ">= 0.95")
    compare("speed at 8 connections", "rates", "discard", 8, best, ">= 1.2")
    # What the limit has over nginx, so that one sees how much of that can be reached.
    compare("speed at 8 connections", "rates", "discard", 8, best, "", subject=LIMIT)
    compare("speed at 8 connections", "rates", "discard", 8, FASTAPI, ">= 5")
    compare("speed at 256 connections", "rates", "discard", 256, OURS, ">= 0.9", at=8)
    compare("speed at 1,000 connections", "rates", "discard", 1000, OURS, ">= 0.8", at=8)
    compare("server CPU at 8 connections", "costs", "discard", 8, LIMIT, "<= 1.1")
    compare("server CPU at 8 connections", "costs", "discard", 8, FASTAPI, "<= 0.5")
    return rows


def latency(document: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`bench.latency`: one object per question, named by its member `what`."""
    rows: Rows = []
    missing = [f"{raw['server']}: {raw['error']}" for raw in document if raw.get("error")]
    speeds = {
        (raw["server"], raw["downloads"]): _rounds(raw["gb_s"])
        for raw in document
        if raw.get("what") == "health" and raw.get("cold") and not raw.get("error")
    }
    for raw in document:
        if not raw.get("error"):
            rows += _latency_row(raw, speeds)
    return {"rows": rows, "missing": missing}


def _rounds(value: Any) -> list[float]:
    """A value a round, or the only one."""
    return list(value) if isinstance(value, Sequence) else [value]


def _latency_row(raw: Mapping[str, Any], speeds: Mapping[tuple[str, int], list[float]]) -> Rows:
    what = raw.get("what")
    if what == "health":
        server, ours = raw["server"], raw["server"] == OURS
        label = f"beside {raw['downloads']} downloads, {'cold' if raw['cold'] else 'warm'}"
        rows = [
            row_of(f"/health p50 {label}", "ms", _rounds(raw["p50"]), subject=server),
            row_of(f"/health p99 {label}", "ms", _rounds(raw["p99"]), subject=server, target="<= 20" if ours else ""),
        ]
        speed, peer = _rounds(raw["gb_s"]), speeds.get(("nginx aio", raw["downloads"]))
        compared = ours and raw["cold"] and peer
        rows.append(
            row_of(
                f"downloads {label}",
                "GB/s",
                speed,
                subject=server,
                peer="nginx aio" if compared else "",
                ratio=_ratio(speed, peer) if compared and peer else None,
                target=">= 0.9" if compared else "",
            )
        )
        if "stall_ms" in raw:
            rows.append(row_of(f"longest stall of the loop {label}", "ms", _rounds(raw["stall_ms"]), target="<= 20"))
        if "nap_ms" in raw:
            rows.append(row_of(f"machine: longest oversleep {label}", "ms", _rounds(raw["nap_ms"]), subject=server))
            rows.append(row_of(f"machine: stolen {label}", "share", _rounds(raw["steal"]), subject=server))
        return rows
    if what == "memory":
        return [
            row_of("memory of an idle connection", "KiB", [raw["idle_kib"]], target="<= 24"),
            row_of("memory of a download", "KiB", [raw["download_kib"]], target="<= 48"),
            row_of("memory of a worker with 500 downloads", "MiB", [raw["worker_mib_500_downloads"]], target="< 80"),
        ]
    if what == "fairness":
        name = "64 miners, half with 1 connection, half with 16: Jain's index"
        return [
            row_of(name, "", raw["jain"], target=">= 0.97"),
            row_of(f"{name} when they are one caller", "", raw["nameless"]),
        ]
    if what == "crowd":
        label = f"beside {raw['connections']:,} silent connections"
        shares, waits = raw.get("shares") or [raw["downloads_of_alone"]], raw.get("p99s") or [raw["p99"]]
        rows = [
            row_of(f"downloads {label}, of those alone", "x", shares, target=">= 0.95"),
            row_of(f"/health p99 {label}", "ms", waits, target="<= 20"),
        ]
        if "gone_after_s" in raw:
            crowd = f"{raw['connections']:,} silent connections"
            rows.append(row_of(f"{crowd}: the last was closed after", "s", [raw["gone_after_s"]]))
            rows.append(row_of(f"{crowd}: descriptors left then", "", [raw["descriptors_left"]], target="<= 100"))
        if "nap_ms" in raw:
            rows.append(row_of(f"machine: longest oversleep {label}", "ms", [raw["nap_ms"]]))
        return rows
    # A question that is new here: its figures as they are.
    numbers = {name: value for name, value in raw.items() if isinstance(value, (int, float))}
    return [row_of(f"{what}: {name}", "", [value]) for name, value in numbers.items() if not isinstance(value, bool)]


_REACH, _UNDER = re.compile(r"to reach: ([0-9.]+)"), re.compile(r"to stay under: ([0-9.]+)")


def evaluate(document: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`bench.evaluate`: rows whose target, if any, stands in a note."""
    rows: Rows = []
    for raw in document:
        note = str(raw.get("note", ""))
        reach, under = _REACH.search(note), _UNDER.search(note)
        target = f">= {reach[1]}" if reach else f"< {under[1]}" if under else ""
        rows.append({**raw, "what": str(raw["what"]).strip(), "target": raw.get("target") or target})
    return {"rows": rows}


_DIALECTS: dict[str, Callable[[Any], dict[str, Any]]] = {"serve": serve, "latency": latency, "evaluate": evaluate}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios; a round that only one of them finished is left out."""
    return quantile([one / other for one, other in zip(ours, theirs, strict=False) if other], 0.5)
