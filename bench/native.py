"""Small C programs, compiled on the spot: drivers that must cost less than what they measure.

A program is compiled once and kept under the name of its text's hash, so that a change is never overlooked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["MissingPeer", "compiled"]

_FLAGS = ("-O2", "-Wall", "-Wextra")


class MissingPeer(Exception):
    """A program that a bench needs is not on this machine; the text says which and how to get it."""


def compiled(source: Path, *libraries: str) -> Path:
    """The program that `source` compiles to, linked with `libraries` ("ssl" for -lssl).

    Raises MissingPeer without a C compiler or a library's headers, CalledProcessError for bad C.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise MissingPeer("no C compiler is here; install one with: apt-get install gcc libc6-dev")
    linked = [f"-l{library}" for library in libraries]
    name = hashlib.sha256(source.read_bytes() + " ".join([*_FLAGS, *linked]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"bzstream-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else; remove it")
    program = folder / f"{source.stem}-{name}"
    if not program.exists():
        fresh = program.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [compiler, *_FLAGS, "-o", str(fresh), str(source), *linked], check=False, capture_output=True, text=True
        )
        if linked and "fatal error" in done.stderr and "No such file" in done.stderr:
            raise MissingPeer(f"{source.name} needs the headers of {', '.join(libraries)}; for ssl: libssl-dev")
        sys.stderr.write(done.stderr)
        done.check_returncode()
        fresh.replace(program)
    return program
