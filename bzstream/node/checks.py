"""Finds before the start what would make a child fail later, again and again, or work with something else than meant.

Called by the supervisor in its only thread, before any child runs. Each check raises with one sentence that says what
is wrong and what to do.
"""

from __future__ import annotations

from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path

import structlog

from bzstream.config import EvaluationSettings, HttpSettings, Settings
from bzstream.http import Certificate
from bzstream.node.child import Role
from bzstream.node.errors import NodeError

__all__ = ["check"]


def check(settings: Settings, roles: frozenset[Role]) -> frozenset[Role]:
    """The roles that will run. Raises BzstreamError for what keeps one of them from working."""
    store = settings.store_path()
    if not store.is_dir():
        raise NodeError(f"there is no store {store}; give --store, the folder that `bzstream publish` writes")
    if "evaluator" in roles and not _can_evaluate(settings.evaluation):
        roles -= {"evaluator"}
        if not roles:
            raise NodeError("nothing would run: the evaluator needs evaluation.data, and must not be switched off")
    if "http" in roles:
        from bzstream.api.access import AccessFiles

        AccessFiles(settings.auth, warn=structlog.get_logger("supervisor").warning)
        _check_http(settings.http)
    if "chain" in roles:
        _check_chain(settings)
    if roles & {"chain", "evaluator"}:
        from bzstream.submissions.ledger import Ledger

        Ledger.open(settings.ledger_location()).close()
    if settings.node.wallet is not None:
        from bzstream.chain.keys import load_key

        load_key(settings.node.wallet)
    return roles


def _check_http(settings: HttpSettings) -> None:
    cert, key = settings.tls_cert, settings.tls_key
    if (cert is None) != (key is None):
        raise NodeError("a certificate and its key go together; give both --tls-cert and --tls-key")
    if cert is not None and key is not None:
        Certificate(cert, key)
    for network in settings.trusted_proxies:
        try:
            ip_network(network)
        except ValueError as error:
            raise NodeError(f"http.trusted_proxies: {error}; name networks such as 10.0.0.0/8") from None


def _check_chain(settings: Settings) -> None:
    from bzstream.chain.keys import is_hotkey

    chain = settings.chain
    if chain.burn not in (None, "owner") and not is_hotkey(chain.burn):
        raise NodeError("chain.burn is neither a hotkey (SS58) nor owner; name where unearned weight goes")
    for hotkey in chain.validators_allowed:
        if not is_hotkey(hotkey):
            raise NodeError(f"chain.validators_allowed: {hotkey!r:.80} is not a hotkey (SS58)")
    if chain.file is not None:
        if not Path(chain.file).exists():
            raise NodeError(f"there is no chain file {chain.file}; check --chain-file")
    elif not chain.endpoint or chain.netuid is None:
        structlog.get_logger("supervisor").warning(
            "no chain is configured, so nothing can be submitted; set chain.endpoint and chain.netuid, or chain.file"
        )
    else:
        _require("following the chain", "bittensor")
        if chain.set_weights and settings.node.wallet is None:
            raise NodeError("chain.set_weights needs node.wallet, the hotkey that signs the weights")
        if chain.announce:
            _check_announcement(settings)


def _check_announcement(settings: Settings) -> None:
    chain = settings.chain
    if chain.external_host is None or chain.external_port is None or settings.node.wallet is None:
        raise NodeError("chain.announce needs chain.external_host, chain.external_port and node.wallet, which signs it")
    try:
        ip_address(chain.external_host)
    except ValueError:
        raise NodeError("chain.external_host is not an IP address; the chain keeps no names") from None


def _can_evaluate(settings: EvaluationSettings) -> bool:
    if not settings.enabled:
        return False
    if settings.data is None:
        structlog.get_logger("supervisor").warning(
            "nothing will be scored: set evaluation.data, or say --no-evaluator to mean it"
        )
        return False
    from bzstream.evaluation.scoring.data import require_data

    require_data(settings.data)
    _require("scoring", "torch", "transformers")
    return True


def _require(purpose: str, *modules: str) -> None:
    if missing := [name for name in modules if find_spec(name) is None]:
        raise NodeError(f"{purpose} needs {' and '.join(missing)}; install it with: pip install 'bzstream[validator]'")
