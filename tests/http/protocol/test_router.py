"""Routes, and what a request says of itself."""

from __future__ import annotations

import pytest

from bzstream.http import Endpoint, Headers, HttpError, Request, Response, Router


def request(path: str, method: str = "GET", query: str = "") -> Request:
    return Request(method, path, path, query, Headers([]), "1.2.3.4", "1.2.3.4")


def test_routes() -> None:
    router, endpoint, named = Router(), Endpoint(lambda _: Response(200)), Endpoint(lambda _: Response(201))
    router.add("GET", "/a/b", endpoint)
    router.add("GET", "/a/{id}", named)
    router.add("POST", "/a/b", endpoint)
    assert router.match(request("/a/b")) is endpoint
    assert router.match(request("/a/%62", "HEAD")) is endpoint
    found = request("/a/x%2Fy")
    assert router.match(found) is named
    assert (found.params, found.route) == ({"id": "x/y"}, "/a/{id}")
    for unknown in ("/", "/a", "/a/", "/a/b/", "/a/b/c", "//a/b", "/A/b", "a/b", ""):
        with pytest.raises(HttpError) as refused:
            router.match(request(unknown))
        assert refused.value.status == 404
    with pytest.raises(HttpError) as refused:
        router.match(request("/a/b", "PUT"))
    assert (refused.value.status, refused.value.headers) == (405, (("Allow", "GET, HEAD, POST"),))


def test_query_and_headers() -> None:
    assert request("/", query="a=1&b=%C3%A9&c").query == {"a": "1", "b": "é", "c": ""}
    for bad in ("a=1&a=2", "a=%ff"):
        with pytest.raises(HttpError):
            _ = request("/", query=bad).query
    headers = Headers([("a", "1"), ("b", "2"), ("a", "3")])
    assert (headers.get("B"), headers.get("c"), headers.all("A"), headers.list("a")) == ("2", None, ("1", "3"), "1, 3")
    with pytest.raises(HttpError):
        headers.get("a")
