"""`bzstream demo`: the whole loop on one machine, from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    serve: Annotated[bool, typer.Option("--serve", help="Keep the node running and print commands to try.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Work here and leave everything there.")] = None,
) -> None:
    """Publish a small model, serve it, download it, check every hash, submit, and see what is refused."""
    from bzstream.demo.play import play

    play(folder, keep_serving=serve)
