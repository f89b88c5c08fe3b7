"""What the figures were measured on: processor, cores, memory, kernel, and the versions of every peer.

Names of hosts, users and folders are no part of it: the description is published.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["cpu_model", "describe", "in_words", "program_version"]

PROGRAMS: dict[str, tuple[str, ...]] = {
    "nginx": ("nginx", "-v"),
    "curl": ("curl", "--version"),
    "aria2c": ("aria2c", "--version"),
    "cc": ("cc", "--version"),
}
"""Peers that are programs, and how they say their version."""

PACKAGES = (
    "bzstream",
    "uvloop",
    "h11",
    "blake3",
    "fastapi",
    "uvicorn",
    "aiohttp",
    "granian",
    "huggingface-hub",
    "torch",
)
"""Peers, and what weighs most in bzstream itself."""

_VERSION = re.compile(r"[0-9]+\.[0-9]+(?:\.[0-9]+)*")


def describe() -> dict[str, object]:
    """The machine as JSON; a peer that is not there has the version None."""
    status = _read("/proc/cpuinfo")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: _package_version(name) for name in PACKAGES}
    versions |= {name: _ask_version(command) for name, command in PROGRAMS.items()}
    return {
        "cpu": cpu_model(status),
        "cores": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in status,
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "system": _os_name(_read("/etc/os-release")),
        "versions": versions,
    }


def in_words(machine: dict[str, object]) -> str:
    """One line for people."""
    kind = "shared, virtual " if machine.get("virtual") else ""
    return (
        f"{machine.get('cores')} {kind}cores of {machine.get('cpu')}, {machine.get('memory_gib')} GiB, "
        f"Linux {machine.get('kernel')}, {machine.get('system')}"
    )


def cpu_model(cpuinfo: str) -> str:
    """The model's name in the text of /proc/cpuinfo (x86 has a name; Arm only numbers)."""
    match = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return re.sub(r"\s+", " ", match[1]).strip() if match else platform.machine()


def program_version(said: str) -> str | None:
    """The first thing in a program's words that looks like a version."""
    match = _VERSION.search(said)
    return match[0] if match else None


def _os_name(release: str) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', release, re.MULTILINE)
    return match[1] if match else platform.system()


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_version(command: tuple[str, ...]) -> str | None:
    # Servers such as nginx lie in a folder that only administrators have in their path.
    program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return program_version(done.stdout or done.stderr)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
