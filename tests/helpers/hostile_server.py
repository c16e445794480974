"""An OpenAI-compatible server on loopback that fails on purpose, in a way that its seed decides."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    "429",
    "429 without Retry-After",
    "500",
    "503",
    "reset",
    "reset in the body",
    "hang",
    "broken JSON",
    "HTML",
    "no choices",
    "null content",
    "empty content",
    "list",
    "broken off",
)


def draw(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class HostileServer(ThreadingHTTPServer):
    """Answers chat completions. What the n-th sending of a request gets depends on seed and n.

    Args:
        faults: share of sendings that fail.
        kinds: what happens to these.
        hang: seconds after which a hanging request is dropped.
        storms: ranges of the number of requests so far in which all get 429.
        delay: seconds of each answer.
        cut: share of questions whose answer is cut (finish_reason length).
        key: if given, a request without it gets 401, which shows the key that was sent.
        write: (model, last message) -> the answer.

    Attributes:
        sent: request -> how often it came.
        answered: request -> how often it got a whole answer.
        repeated: requests that came again after a whole answer.
        most: most requests at the same time.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        *,
        seed: int = 0,
        faults: float = 0.0,
        kinds: Sequence[str] = FAULTS,
        hang: float = 2.0,
        storms: Sequence[range] = (),
        delay: float = 0.0,
        cut: float = 0.0,
        key: str | None = None,
        write: Callable[[str, str], str] = lambda model, question: solve(question),
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.write = write
        self.seed, self.faults, self.kinds, self.hang = seed, faults, tuple(kinds), hang
        self.storms, self.delay, self.cut, self.key = storms, delay, cut, key
        self.lock = threading.Lock()
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.given: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most = self.requests = self.repeated = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed close their connections; that is no news."""

    def fate(self, body: dict[str, Any]) -> tuple[str, str]:
        """(name of the request, what happens to it)."""
        name = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            self.bodies.append(body)
            self.sent[name] += 1
            self.repeated += self.answered[name] > 0
            number, self.requests = self.requests, self.requests + 1
            fault = "ok"
            if any(number in storm for storm in self.storms):
                fault = "429"
            elif draw(self.seed, name, self.sent[name]) < self.faults:
                place = draw(self.seed, name, self.sent[name], "kind")
                fault = self.kinds[int(place * len(self.kinds))]
            self.given[fault] += 1
        return name, fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HostileServer

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            self._reply(body)
        finally:
            with server.lock:
                server.running -= 1

    def _reply(self, body: dict[str, Any]) -> None:
        server = self.server
        sent = self.headers.get("Authorization", "")
        if server.key is not None and sent != f"Bearer {server.key}":
            self._send(401, {"error": {"message": f"Incorrect API key provided: {sent}"}})
            return
        name, fault = server.fate(body)
        time.sleep(server.delay)
        usage = {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}
        reply: dict[str, Any] = {"id": "x", "model": body["model"], "usage": usage}
        question = body["messages"][-1]["content"]
        if fault == "ok":
            cut = draw(server.seed, question, "cut") < server.cut
            message = {"role": "assistant", "content": server.write(body["model"], question)}
            finish = "length" if cut else "stop"
            reply["choices"] = [{"index": 0, "message": message, "finish_reason": finish}]
            self._send(200, reply, answered=name)
        elif fault == "429":
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
        elif fault == "429 without Retry-After":
            self._send(429, {"error": {"message": "slow down"}})
        elif fault == "too long":
            self._send(400, {"error": {"message": "the prompt is longer than the context"}})
        elif fault == "broken off":
            message = {"role": "assistant", "content": "2 + 3 = 5, and then"}
            choice = {"index": 0, "message": message, "finish_reason": "abort"}
            self._send(200, reply | {"choices": [choice]})
        elif fault in ("500", "503"):
            # It shows the key that was sent, as a careless proxy might.
            self._send(int(fault), {"error": {"message": f"oops {sent}"}})
        elif fault == "reset":
            self._reset()
        elif fault == "reset in the body":
            self._head(200, 5000)
            self.wfile.write(b'{"id": "x", "choices": [{"index": 0, "mess')
            self.wfile.flush()
            self._reset()
        elif fault == "hang":
            time.sleep(server.hang)
            self._reset()
        elif fault == "HTML":
            self._write(200, b"<html>Bad gateway</html>", "text/html")
        elif fault == "broken JSON":
            self._write(200, b'{"id": "x", "choices": [{"message"', "application/json")
        elif fault == "no choices":
            self._send(200, reply | {"choices": []})
        elif fault == "list":
            self._send(200, [reply])
        else:
            content = None if fault == "null content" else " "
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._send(200, reply | {"choices": [choice]})

    def _send(
        self,
        status: int,
        value: Any,
        headers: dict[str, str] | None = None,
        answered: str | None = None,
    ) -> None:
        if answered is not None:
            with self.server.lock:
                self.server.answered[answered] += 1
        self._write(status, json.dumps(value).encode(), "application/json", headers)

    def _write(
        self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self._head(status, len(content), kind, headers)
        self.wfile.write(content)
        self.wfile.flush()

    def _head(
        self,
        status: int,
        length: int,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def _reset(self) -> None:
        """Ends the connection with RST."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True


def solve(question: str) -> str:
    """Adds the first two numbers of a question; every seventh sum is one too high."""
    a, b = (int(word) for word in re.findall(r"\d+", question)[:2])
    found = a + b + (draw(question) < 1 / 7)
    return f"{a} and {b} make {found}. The answer is {found}"


@contextmanager
def hostile_server(**settings: Any) -> Iterator[HostileServer]:
    """A server that runs while the context lasts."""
    server = HostileServer(**settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
