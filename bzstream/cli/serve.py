"""`bzstream serve`: the validator's node."""

from __future__ import annotations

import functools
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bzstream.cli._options import Config, LedgerFile, Store, settings_of

__all__ = ["serve"]


class RoleName(StrEnum):
    http = "http"
    chain = "chain"
    evaluator = "evaluator"


def serve(
    store: Store = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. Default 8000.")] = None,
    workers: Annotated[int | None, typer.Option(help="HTTP processes that share the port. Default 1.")] = None,
    chain_file: Annotated[Path | None, typer.Option(help="Simulated chain (JSON) instead of a real one.")] = None,
    ledger: LedgerFile = None,
    no_evaluator: Annotated[bool, typer.Option("--no-evaluator", help="Take submissions, score none.")] = False,
    role: Annotated[list[RoleName] | None, typer.Option(help="Run only this role (may repeat). Default: all.")] = None,
    config: Config = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain; with --tls-key serves HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Serve Prometheus /metrics on this port.")] = None,
    take_over: Annotated[
        Path | None,
        typer.Option(metavar="SOCKET", help="Succeed the node that listens on this Unix socket, if any; listen there."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Find what would keep the node from running, then exit with 0 or 1.")
    ] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log JSON objects instead of readable lines.")] = False,
) -> None:
    """Serve the published model, take in submissions and score them.

    The shared token comes from BZ_AUTH_TOKEN (at least 32 characters). SIGTERM drains, SIGHUP reads the settings again.
    """
    from bzstream import node
    from bzstream.node.child import Role

    flags = {
        "store.path": store,
        "http.host": host,
        "http.port": port,
        "http.workers": workers,
        "chain.file": chain_file,
        "ledger.url": ledger,
        "evaluation.enabled": False if no_evaluator else None,
        "http.tls_cert": tls_cert,
        "http.tls_key": tls_key,
        "metrics.port": metrics_port,
        "log.json": True if log_json else None,
    }

    roles: frozenset[Role] = frozenset(r.value for r in role) if role else frozenset(("http", "chain", "evaluator"))
    status = node.serve(roles, functools.partial(settings_of, config, flags), take_over=take_over, check_only=check)
    if check:
        print("nothing keeps this node from running")
    sys.exit(status)
