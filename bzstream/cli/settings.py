"""`bzstream settings`: every setting with its default, its unit and the reason."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bzstream.cli._options import AsJson


def settings(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/settings.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """List every setting: name, default, unit, environment variable and reason. Values in force are not shown."""
    from bzstream.cli._settings_reference import as_markdown, as_text, settings_reference

    if markdown and as_json:
        raise typer.BadParameter("give --markdown or --json, not both")
    sections = settings_reference()
    if as_json:
        print(json.dumps([setting._asdict() for section in sections for setting in section.settings], indent=2))
    else:
        print("\n".join((as_markdown if markdown else as_text)(sections)))
