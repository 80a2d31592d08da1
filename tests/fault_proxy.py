"""A proxy on this machine that breaks what passes through it, as a script says."""

import http.client
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any


class FaultProxy:
    """Stands before a server; the first completions that are asked meet one fault each.

    Faults: "drop" ends the connection unheard; "lose" hears, and ends it without the answer;
    "slow" answers after `delay`; "cut" sends half of the promised bytes; "half" sends half of the
    JSON as if it were all; a number is that HTTP status.

    Args:
        port: of the server.
        faults: in the order of arrival; `None` is none.
        delay: seconds of "slow".
        asks: changes each completion's request.
        answers: changes each completion's answer.

    Attributes:
        asked: a row a completion that was asked: its prompt, its seed, the fault or `None`.
    """

    def __init__(
        self,
        port: int,
        faults: Iterable[str | int | None] = (),
        *,
        delay: float = 1.0,
        asks: Callable[[dict], dict] = lambda body: body,
        answers: Callable[[dict], dict] = lambda answer: answer,
    ):
        self.asked: list[tuple[tuple[int, ...], int, str | int | None]] = []
        self._faults = list(faults)
        self._lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._answer(200, _ask(port, "GET", self.path, None))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fault = proxy._next(body)
                if fault == "drop":
                    self.close_connection = True
                elif isinstance(fault, int):
                    self._answer(fault, {"error": {"message": "not now"}})
                else:
                    answer = _ask(port, "POST", self.path, asks(body))
                    self._pass_on(fault, answers(answer) if "choices" in answer else answer)

            def _pass_on(self, fault, answer):
                if fault == "lose":
                    self.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(delay)
                try:
                    self._answer(200 if "choices" in answer else 400, answer, fault)
                except OSError:
                    self.close_connection = True  # who asked is gone

            def _answer(self, status: int, answer: Any, fault=None):
                content = json.dumps(answer).encode()
                half = content[: len(content) // 2]
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(half if fault == "half" else content)))
                self.end_headers()
                self.wfile.write(half if fault in ("half", "cut") else content)
                self.close_connection = self.close_connection or fault == "cut"

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def _next(self, body: dict) -> str | int | None:
        with self._lock:
            # A question of one token is the engine's, whether the server is there.
            of_row = body["max_tokens"] > 1
            fault = self._faults.pop(0) if of_row and self._faults else None
            if of_row:
                self.asked.append((tuple(body["prompt"]), body["seed"], fault))
            return fault

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


def _ask(port: int, verb: str, path: str, body: dict | None) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(verb, path, data, {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()
