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

    def allow(self) -> str:
        """The value of an Allow field."""
        return ", ".join(sorted(self.endpoints))

    def match(self, segments: tuple[str, ...]) -> dict[str, str] | None:
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

    __slots__ = ("_as_written", "_literal", "_named")

    def __init__(self) -> None:
        self._literal: dict[tuple[str, ...], _Route] = {}
        self._as_written: dict[str, _Route] = {}
        self._named: list[_Route] = []

    def add(self, method: str, pattern: str, endpoint: Endpoint) -> None:
        """Route `method` of `pattern` (such as `/submissions/{id}`) to `endpoint`; for GET also HEAD."""
        assert pattern.startswith("/"), "a pattern is a path"
        segments = tuple(pattern.split("/")[1:])
        if "{" not in pattern:
            route = self._literal.setdefault(segments, _Route(pattern, segments))
            self._as_written[pattern] = route
        else:
            found = [route for route in self._named if route.pattern == pattern]
            route = found[0] if found else _Route(pattern, segments)
            if not found:
                self._named.append(route)
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
        route = self._as_written.get(request.path)
        if route is None:
            route = self._decoded(request)
        request.route = route.pattern
        endpoint = route.endpoints.get(request.method)
        if endpoint is None:
            allow = route.allow()
            raise HttpError(405, "method_not_allowed", f"This path answers {allow}, nothing else.", (("Allow", allow),))
        return endpoint

    def _decoded(self, request: Request) -> _Route:
        """The route of a path by its decoded segments; fills in `params`."""
        segments = tuple(unquote(segment) for segment in request.path.split("/")[1:])
        if (literal := self._literal.get(segments)) is not None:
            return literal
        for route in self._named:
            if (params := route.match(segments)) is not None:
                request.params = params
                return route
        raise HttpError(404, "not_found", "There is nothing at this path.")

    def _options(self, request: Request) -> Response:
        """`OPTIONS *` (RFC 9110 9.3.7): what the server as a whole can do."""
        routes = [*self._literal.values(), *self._named]
        methods = sorted({method for route in routes for method in route.endpoints} | {"OPTIONS"})
        return Response(204, (("Allow", ", ".join(methods)),))
