"""The application that the HTTP core serves: the token gate, the routes, and the checks that endpoints share.

The HTTP server calls all of it on the worker's event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import replace
from importlib.metadata import version
from inspect import iscoroutinefunction
from typing import Any, NamedTuple

from bzstream.api.downloads import Downloads
from bzstream.api.health import HealthEndpoint
from bzstream.api.identity import Credentials, authenticate, authorise, spend_proof
from bzstream.api.openapi import document
from bzstream.api.operations import OPERATIONS, Operation
from bzstream.api.peers import Peers
from bzstream.api.state import WorkerState, unavailable
from bzstream.api.submissions import Submissions
from bzstream.http import Endpoint, HttpError, Representation, Request, Response, Result, Router

__all__ = ["Api"]


class _Checked(NamedTuple):
    """What the first half of a guarded endpoint found out for the second."""

    wanted: Any
    """What the endpoint's own `check` returned."""
    credentials: Credentials
    undecided: bool
    """It is for validators alone, and the chain that lists them is not known."""


class Api:
    """`bzstream.http.Application` over one worker's state."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        openapi = Response.json(document(version("bzstream")))
        endpoints = {
            **Downloads(state).endpoints(),
            **Submissions(state).endpoints(),
            **Peers(state).endpoints(),
            **HealthEndpoint(state).endpoints(),
            "openapi": Endpoint(lambda _: openapi),
        }
        self._public = frozenset(operation.path for operation in OPERATIONS if operation.public)
        self._router = Router()
        for operation in OPERATIONS:
            self._router.add(operation.method, operation.path, self._guarded(operation, endpoints[operation.name]))

    def admit(self, request: Request) -> Endpoint:
        """401 first, for unknown paths too; then 404 and 405. Raises HttpError."""
        if request.path not in self._public:
            request.context = authenticate(request, self._state)
        return self._router.match(request)

    def _guarded(self, operation: Operation, endpoint: Endpoint) -> Endpoint:
        """The endpoint with what every one that needs a token has in common.

        Its own 400s come first, then those of X-Hotkey, then 403. A proof is used up when its request was answered:
        one that was refused, at whatever point, may be sent again. (Proofs authorise GET and HEAD alone, and the other
        methods have an order of checks of their own.)
        """
        if operation.public or operation.method != "GET":
            return endpoint

        def check(request: Request) -> _Checked:
            wanted = endpoint.check(request)
            credentials = authorise(request, self._state)
            return _Checked(wanted, credentials, operation.validators and not self._is_validator(credentials))

        def begin(checked: _Checked) -> Result | Awaitable[Result]:
            if checked.undecided:
                raise unavailable("chain_unknown", "the chain is not known yet; try again later")
            return endpoint.handle(checked.wanted)

        def handle(checked: _Checked) -> Result:
            result = begin(checked)
            assert isinstance(result, Response | Representation)
            spend_proof(checked.credentials, self._state)
            return result

        async def handle_later(checked: _Checked) -> Result:
            pending = begin(checked)
            assert isinstance(pending, Awaitable)
            result: Result = await pending
            spend_proof(checked.credentials, self._state)
            return result

        return replace(endpoint, check=check, handle=handle_later if iscoroutinefunction(endpoint.handle) else handle)

    def _is_validator(self, credentials: Credentials) -> bool:
        """True: the chain lists the caller as a validator. False: the chain is not known. Raises HttpError 403."""
        hotkey = credentials.hotkey
        if hotkey is None and self._state.settings.auth.trust_claimed_hotkey:
            hotkey = credentials.claimed
        if hotkey is None:
            raise HttpError(403, "validators_only", "this is for validators; use a token bound to your hotkey or sign")
        if self._state.chain is None:
            return False
        if not self._state.chain.is_validator(hotkey):
            raise HttpError(403, "validators_only", "the chain does not list this hotkey as a validator")
        return True
