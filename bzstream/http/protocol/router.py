"""Paths to endpoints.

A pattern is a path whose segments are literal or a `{name}`. Segments are compared after percent-decoding, each by
itself, so that `%2F` never turns into a separator. `GET` brings `HEAD` with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote

from bzstream.http.protocol.messages import Endpoint, HttpError, Request, Response

__all__ = ["Router"]


@dataclass(slots=True)
class _Route:
    pattern: str
    segments: tuple[str, ...]
    endpoints: dict[str, Endpoint] = field(default_factory=dict)

    def match(self, segments: tuple[str, ...]) -> dict[str, str] | None:
        """The values of the pattern's names in a path of these decoded segments, or None when it is another path."""
        if len(segments) != len(self.segments):
            return None
        params: dict[str, str] = {}
        for wanted, given in zip(self.segments, segments, strict=True):
            if wanted.startswith("{"):
                if not given:
                    return None
                params[wanted[1:-1]] = given
            elif wanted != given:
                return None
        return params


class Router:
    """A table of routes; routes without names win over those with."""

    __slots__ = ("_routes",)

    def __init__(self) -> None:
        self._routes: dict[str, _Route] = {}

    def add(self, method: str, pattern: str, endpoint: Endpoint) -> None:
        """Route `method` of `pattern` (such as `/submissions/{id}`) to `endpoint`; for GET also HEAD."""
        assert pattern.startswith("/"), "a pattern is a path"
        route = self._routes.setdefault(pattern, _Route(pattern, tuple(pattern.split("/")[1:])))
        route.endpoints[method] = endpoint
        if method == "GET":
            route.endpoints["HEAD"] = endpoint

    def match(self, request: Request) -> Endpoint:
        """The endpoint for a request, whose `route` and `params` are filled in.

        Raises HttpError 404 for an unknown path and 405, with Allow, for a known path's unknown method.
        """
        if request.path == "*":
            request.route = "*"
            return Endpoint(self._options)
        route = self._routes.get(request.path)
        if route is None or "{" in request.path:
            route = self._find(request)
        request.route = route.pattern
        endpoint = route.endpoints.get(request.method)
        if endpoint is None:
            allow = ", ".join(sorted(route.endpoints))
            raise HttpError(405, "method_not_allowed", f"This path answers {allow}, nothing else.", (("Allow", allow),))
        return endpoint

    def _find(self, request: Request) -> _Route:
        """The route of a path by its decoded segments; fills in `params`."""
        segments = tuple(unquote(segment) for segment in request.path.split("/")[1:])
        for route in sorted(self._routes.values(), key=lambda route: "{" in route.pattern):
            if (params := route.match(segments)) is not None:
                request.params = params
                return route
        raise HttpError(404, "not_found", "There is nothing at this path.")

    def _options(self, request: Request) -> Response:
        """`OPTIONS *` (RFC 9110 9.3.7): what the server as a whole can do."""
        methods = sorted({method for route in self._routes.values() for method in route.endpoints} | {"OPTIONS"})
        return Response(204, (("Allow", ", ".join(methods)),))
