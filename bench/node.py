"""The node that the benches drive: a store of equal slices, `bzstream serve` as a process, and what it costs.

Everything is real: published by `publish_state_dict`, served by the supervisor with its worker and chain role, every
miner with a token bound to a hotkey of its own, so that the server takes it for a caller of its own.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bzstream.chain.keys import encode_hotkey
from bzstream.demo.running_node import BLOCK, RunningNode, running_node
from bzstream.model import publish_state_dict

__all__ = ["Cost", "Miner", "cost", "miners", "publish_slices", "serve"]

VERSION = "bench"


@dataclass(frozen=True, slots=True)
class Miner:
    """A caller: its token and the hotkey that the token is bound to."""

    token: str
    hotkey: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What a node's processes have used since they started. `cpu`: seconds, `memory`: bytes resident at most."""

    cpu: float
    memory: int


def miners(count: int) -> list[Miner]:
    """Callers with made-up hotkeys, always the same ones, and fresh tokens."""
    keys = (hashlib.sha256(f"bench miner {number}".encode()).digest() for number in range(count))
    return [Miner(secrets.token_hex(24), encode_hotkey(key)) for key in keys]


def publish_slices(store: Path, *, groups: int, slice_bytes: int) -> None:
    """Publish a model of one layer, whose `groups` experts are a group each and have about `slice_bytes`, of noise."""
    hidden = 1024
    inner = max(8, slice_bytes // (3 * hidden * 2))
    noise = np.random.default_rng(0)
    at = "model.language_model.layers.0"
    shapes = {
        f"{at}.mlp.experts.gate_up_proj": (groups, 2 * inner, hidden),
        f"{at}.mlp.experts.down_proj": (groups, hidden, inner),
        f"{at}.mlp.gate.weight": (groups, hidden),
    }
    text = {"model_type": "qwen3_vl_moe_text", "num_experts": groups, "hidden_size": hidden}
    publish_state_dict(
        {name: noise.integers(0, 1 << 16, shape, dtype=np.uint16) for name, shape in shapes.items()},
        {"model_type": "qwen3_vl_moe", "text_config": {**text, "moe_intermediate_size": inner}},
        store,
        block=BLOCK,
        version=VERSION,
        groups=groups,
    )


def cost(node: RunningNode) -> Cost:
    """CPU time and peak memory of the supervisor and its children together."""
    cpu, memory = 0.0, 0
    supervisor = psutil.Process(node.process.pid)
    for process in (supervisor, *supervisor.children(recursive=True)):
        with process.oneshot():
            times = process.cpu_times()
            cpu += times.user + times.system
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        memory += int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return Cost(cpu, memory)


@contextmanager
def serve(
    store: Path,
    *arguments: str,
    callers: Sequence[Miner] = (),
    environment: Mapping[str, str] | None = None,
    tls: tuple[Path, Path] | None = None,
    **options: Any,
) -> Iterator[RunningNode]:
    """Serve a store until the block ends. `environment` adds variables, `arguments` flags of `serve`.

    `tls`: certificate and key. `options`: further parameters of `running_node`. Several nodes may serve one store side
    by side, each with its own tokens and ledger.
    """
    folder = store.parent
    with running_node(
        folder,
        *("--ledger", str(folder / f"ledger-{secrets.token_hex(4)}.sqlite")),
        *(("--tls-cert", str(tls[0]), "--tls-key", str(tls[1])) if tls else ()),
        *arguments,
        store=store,
        bound_tokens={miner.token: miner.hotkey for miner in callers},
        environment={"BZ_LOG_LEVEL": "error", **(environment or {})},
        trusted=tls[0].read_text(encoding="ascii") if tls else None,
        **options,
    ) as node:
        yield node
