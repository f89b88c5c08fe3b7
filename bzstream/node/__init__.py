"""`bzstream serve` as processes: a supervisor, which starts the roles as child processes and starts again what dies.

supervisor      the process that the operator starts and signals
checks          what can be known to be wrong before anything runs
listeners       the sockets that clients connect to, opened once and handed down to the HTTP workers
succession      hands these sockets from a running node to the next one, or takes them from systemd
metrics_folder  where all processes of a node keep their Prometheus counters
child           a child process: its pipe to the supervisor, its signals, its role

May import every package but `cli` and `demo`. Heavy libraries are loaded by the child that needs them, never here.
"""

from __future__ import annotations

from bzstream.node.errors import NodeError
from bzstream.node.supervisor import serve

__all__ = ["NodeError", "serve"]
