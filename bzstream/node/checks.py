"""Finds before the start what would make a child fail later, again and again.

Called by the supervisor in its only thread, before any child runs. Each check raises with one sentence that says what
is wrong and what to do.
"""

from __future__ import annotations

from importlib.util import find_spec
from ipaddress import ip_network

import structlog

from bzstream.config import Settings
from bzstream.http import Certificate
from bzstream.node.child import Role
from bzstream.node.errors import NodeError

__all__ = ["check"]


def check(settings: Settings, roles: frozenset[Role]) -> frozenset[Role]:
    """The roles that will run. Raises BzstreamError for what keeps one of them from working."""
    settings.store_path().mkdir(parents=True, exist_ok=True)
    if "http" in roles:
        from bzstream.api.access import AccessFiles

        AccessFiles(settings.auth, warn=structlog.get_logger("supervisor").warning)
        cert, key = settings.http.tls_cert, settings.http.tls_key
        if (cert is None) != (key is None):
            raise NodeError("a certificate and its key go together; give both --tls-cert and --tls-key")
        if cert is not None and key is not None:
            Certificate(cert, key)
        for network in settings.http.trusted_proxies:
            try:
                ip_network(network)
            except ValueError as error:
                raise NodeError(f"http.trusted_proxies: {error}; name networks such as 10.0.0.0/8") from None
    if "evaluator" not in roles or not settings.evaluation.enabled:
        return roles - {"evaluator"}
    if settings.evaluation.data is None:
        structlog.get_logger("supervisor").warning(
            "nothing will be scored: set evaluation.data, or say --no-evaluator to mean it"
        )
        return roles - {"evaluator"}
    from bzstream.evaluation.scoring.data import require_data

    require_data(settings.evaluation.data)
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise NodeError(f"scoring needs {' and '.join(missing)}; install bzstream[validator], or say --no-evaluator")
    return roles
