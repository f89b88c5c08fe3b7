"""`bzstream submit`: hand in a trained checkpoint, signed, and follow what becomes of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bzstream.cli._options import CaFile, Netuid, Network, UrlIfKnown, client_command, locate

if TYPE_CHECKING:
    from bzstream.client import SubmissionStatus

__all__ = ["submit"]

_MEANING = {
    "queued": "waiting for its turn",
    "fetching": "the validator is downloading the checkpoint",
    "verifying": "the file is being read and checked",
    "evaluating": "the model is being scored",
    "scored": "done",
    "rejected": "refused: score 0",
    "failed": "the validator could not score it; that is not your fault",
}


def submit(
    url: UrlIfKnown = None,
    *,
    key: Annotated[str, typer.Option(envvar="BZSTREAM_KEY", help="Key file or wallet (<wallet>/<hotkey>) that signs.")],
    group: Annotated[int, typer.Option(min=0, help="Expert group that the checkpoint was trained for.")],
    checkpoint_url: Annotated[str, typer.Option(help="Where the validator can fetch the checkpoint.")],
    block: Annotated[
        int | None, typer.Option(min=0, help="Block at which the training cycle ended. Default: the current one.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The file behind the URL: its hash is signed too, as proof of being first.")
    ] = None,
    network: Network = None,
    netuid: Netuid = None,
    validator_hotkey: Annotated[str | None, typer.Option(help="SS58 address to find there.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the evaluation to its end.")] = False,
    ca_file: CaFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer, and each state, as a line of JSON.")
    ] = False,
) -> None:
    """Submit a checkpoint in the submit phase. Safe to repeat: the same submission counts once.

    The token comes from BZ_AUTH_TOKEN. With --wait the exit status is 0 only if the checkpoint was scored.
    """
    from bzstream import client

    last: SubmissionStatus | None = None
    with client_command("stopped; what was accepted stays accepted"):
        (found,) = locate([url] if url else [], network, netuid, validator_hotkey)
        report = client.submit(
            found,
            key=key,
            group=group,
            checkpoint_url=checkpoint_url,
            block=block,
            checkpoint=checkpoint,
            ca_file=ca_file,
            notify=lambda text: print(f"bzstream: {text}", file=sys.stderr),
        )
        if as_json:
            print(json.dumps(dataclasses.asdict(report)), flush=True)
        else:
            again = " (the validator had it already)" if report.already else ""
            eta = f", evaluation in about {report.evaluation_eta_blocks} blocks" if report.evaluation_eta_blocks else ""
            print(f"accepted as {report.submission_id} for block {report.block_number}{eta}{again}", flush=True)
        if not wait:
            return
        for last in client.follow(found, report.submission_id, ca_file=ca_file):
            _show(last, as_json)
    if last is None or last.status != "scored":
        raise client.ClientError("the checkpoint was not scored" + (f": {last.reason}" if last and last.reason else ""))


def _show(state: SubmissionStatus, as_json: bool) -> None:
    if as_json:
        import msgspec

        print(msgspec.json.encode(state).decode(), flush=True)
        return
    line = f"{state.status}: {_MEANING[state.status]}"
    if state.reason:
        line += f" ({state.reason})"
    if state.status == "scored":
        line += f", loss {state.loss} against {state.baseline_loss}, score {state.score}"
    print(line, flush=True)
