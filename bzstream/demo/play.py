"""The demo from its first to its last line: distribution and submissions, then a round of training and scoring."""

from __future__ import annotations

import importlib.util
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from bzstream.demo import distribution
from bzstream.demo.running_node import RunningNode
from bzstream.demo.stage import Stage

__all__ = ["play"]


def play(folder: Path | None, *, keep_serving: bool) -> None:
    """Run the demo in `folder`, or in a temporary one. Raises BzstreamError at the first thing that is not as promised.

    `keep_serving`: print commands to try and keep the first node running until SIGINT or SIGTERM.
    """
    with tempfile.TemporaryDirectory(prefix="bzstream-demo-") as temporary:
        started = time.monotonic()
        stage = Stage((folder or Path(temporary)).absolute())
        checkpoint = distribution.prepare(stage)
        stage.say("bzstream serve")
        with stage.node(distribution.BLOCK) as node:
            distribution.download(stage, node, checkpoint)
            distribution.show_refusals(stage, node)
            distribution.submit(stage, node)
            _train_and_score(stage)
            stage.console.print(f"\n[bold green]Everything held.[/] {time.monotonic() - started:.1f} s in all.")
            if keep_serving:
                ending = {signal.SIGINT, signal.SIGTERM}
                signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # sigwait needs them blocked (POSIX)
                _print_commands(stage, node)
                signal.sigwait(ending)


def _train_and_score(stage: Stage) -> None:
    """A round of training and scoring, where the libraries for it are installed."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        stage.say("A round of training and scoring")
        stage.console.print(f"  left out: {' and '.join(missing)} not installed (bzstream\\[validator] brings them)")
        return
    from bzstream.demo.scoring_round import play_round

    play_round(Stage(stage.folder / "round"))


def _print_commands(stage: Stage, node: RunningNode) -> None:
    """Commands that work when pasted."""
    header = f"-H 'Authorization: Bearer {stage.token}' -H 'X-Hotkey: {stage.miner.ss58_address}'"
    stage.say("The node keeps running; Ctrl-C ends it. Try:")
    for command in (
        f"curl -s {node.url}/health",
        f"curl -s {header} {node.url}/model",
        f"curl -s {header} -H 'X-Expert-Group: 0' '{node.url}/model/partial?format=safetensors' | sha256sum",
        f"curl -s {header} -H 'X-Expert-Group: 0' {node.url}/model/partial/manifest",
        f"BZ_AUTH_TOKEN={stage.token} {shlex.quote(sys.executable)} -m bzstream pull {node.url} --group 1 --shared "
        f"--hotkey {stage.miner.ss58_address} --out my-group",
    ):
        stage.console.print(f"  {command}", soft_wrap=True)
