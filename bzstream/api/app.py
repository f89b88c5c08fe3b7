"""The application that the HTTP core serves: the token gate, the routes, the endpoints behind them."""

from __future__ import annotations

from importlib.metadata import version

from bzstream.api.downloads import Downloads
from bzstream.api.health import Healthy
from bzstream.api.identity import authenticate
from bzstream.api.openapi import document
from bzstream.api.operations import OPERATIONS
from bzstream.api.submissions import Submissions
from bzstream.api.view import View
from bzstream.http import Endpoint, Request, Response, Router

__all__ = ["Api"]


class Api:
    """`bzstream.http.Application` over one worker's view."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._openapi = Response.json(document(version("bzstream")))
        downloads, submissions = Downloads(view), Submissions(view)
        endpoints = {
            **downloads.endpoints(),
            **submissions.endpoints(),
            "health": Endpoint(Healthy(view).health, limited=False),
            "openapi": Endpoint(lambda _: self._openapi),
        }
        self._public = frozenset(operation.path for operation in OPERATIONS if operation.public)
        self._router = Router()
        for operation in OPERATIONS:
            self._router.add(operation.method, operation.path, endpoints[operation.name])

    def admit(self, request: Request) -> Endpoint:
        """401 first, for unknown paths too; then 404 and 405. Raises HttpError."""
        if request.path not in self._public:
            view = self._view
            request.context = authenticate(request, view.tokens.tokens, view.settings.node.hotkey, view.nonces)
        return self._router.match(request)
