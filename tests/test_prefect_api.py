"""Prefect asked over HTTP: what goes wrong on the way, and whose process a run's number names."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from endoprint.services.prefect_api import Prefect


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server that gives one answer to whatever is asked; yields its API's address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api"
    finally:
        server.shutdown()
        server.server_close()


def saying(status: int, text: str, *, n_promised: int = 0) -> Callable[..., None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-length", str(n_promised or len(text)))
        handler.end_headers()
        handler.wfile.write(text.encode())

    return answer


def test_an_answer_that_breaks_off_is_as_none() -> None:
    with serving(saying(200, "[1", n_promised=1000)) as url:
        assert not Prefect(url).is_healthy()
        with pytest.raises(OSError, match="IncompleteRead"):
            Prefect(url).deployments()


def test_a_proxy_is_asked_for_other_machines_and_never_for_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def proxy(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        saying(200, "true")(handler)

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(saying(200, "true")) as url, serving(proxy) as between:
        monkeypatch.setenv("http_proxy", between.removesuffix("/api"))
        assert Prefect(url).is_healthy()
        assert Prefect(url.replace("127.0.0.1", "localhost")).is_healthy()
        Prefect(url.replace("127.0.0.1", platform.node())).is_healthy()  # it listens on loopback
        assert asked == []
        assert Prefect("http://lab.invalid:4200/api").is_healthy()
        assert asked == ["http://lab.invalid:4200/api/health"]
