"""What the start of a command costs: the help of all commands loads none of the libraries that a command works with."""

from __future__ import annotations

import subprocess
import sys

NEVER = ("asyncio", "blake3", "bzstream.config", "h11", "msgspec", "numpy", "sqlalchemy", "ssl", "structlog")


def test_help_loads_nothing_that_a_command_works_with() -> None:
    program = (
        "import sys, atexit; from bzstream.cli import main; sys.argv = ['bzstream', '--help']\n"
        f"atexit.register(lambda: print([name for name in {NEVER!r} if name in sys.modules], file=sys.stderr))\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "serve" in result.stdout
    assert result.stderr == "[]\n"
