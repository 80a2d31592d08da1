"""JSON over HTTP with retries, from many threads, without a dependency."""

import http.client
import json
import random
import socket
import ssl
import threading
import urllib.parse
from typing import Any

from .engine import EngineError


# Seconds to connect; an address that nobody has must not cost the timeout of a long answer.
_CONNECT = 10.0
_LONGEST_PAUSE = 10.0


class Unanswered(EngineError):
    """No answer, or none that can be used, this time; the same request may be sent again.

    Attributes:
        refused: nobody listens.
    """

    def __init__(self, why: str, refused: bool = False):
        super().__init__(why)
        self.refused = refused


class Client:
    """Asks one server.

    Args:
        url: root of the API, without a slash at its end.
        timeout: seconds of silence after which a request has failed.
        retries: how often a request that failed is sent again.
        key: sent as a bearer token if it is not empty.
        closed: set when answers are not wanted any more.
    """

    def __init__(
        self, url: str, *, timeout: float, retries: int, key: str, closed: threading.Event
    ):
        self.url = url
        self.closed = closed
        self._timeout, self._retries, self._key = timeout, retries, key
        self._parts = urllib.parse.urlsplit(url)
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._mine = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def at(self, url: str, *, timeout: float) -> "Client":
        """One for another address, without retries."""
        return Client(url, timeout=timeout, retries=0, key=self._key, closed=self.closed)

    def ask(self, path: str, body: Any) -> Any:
        """The answer to a POST; sent again, later and later, while the fault may pass.

        Args:
            path: below the root.
            body: JSON.

        Raises:
            EngineError: if the server refuses, or has not answered the last retry.
        """
        last: Unanswered | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                pause = min(0.25 * 2 ** (attempt - 1), _LONGEST_PAUSE)
                # Jitter, so that what failed together does not come back together.
                self.closed.wait(pause * random.uniform(0.5, 1.5))
            try:
                return self.once(path, body)
            except Unanswered as error:
                last = error
        raise EngineError(
            f"{self.url}{path} gave no answer in {self._retries + 1} tries, at last: {last}; see "
            "the server's log, or raise retries= or timeout="
        )

    def once(self, path: str, body: Any = None) -> Any:
        """The answer to one request; a GET without a body.

        Raises:
            Unanswered: if it may work another time.
            EngineError: if the server refuses.
        """
        if self.closed.is_set():
            raise EngineError(f"the engine at {self.url} was closed before it had answered")
        try:
            status, content = self._exchange(path, body)
        except (OSError, http.client.HTTPException) as error:
            self.hang_up()
            if isinstance(error, ssl.SSLCertVerificationError):
                raise EngineError(f"{self.url} has no valid certificate: {error}") from None
            why = str(error) or type(error).__name__
            raise Unanswered(why, isinstance(error, ConnectionRefusedError)) from None
        if status == 429 or status >= 500:
            raise Unanswered(f"HTTP {status}: {_message(content)}")
        if status >= 300:
            raise EngineError(f"{self.url}{path} refused with HTTP {status}: {_message(content)}")
        try:
            return json.loads(content)
        except ValueError as error:
            self.hang_up()
            raise Unanswered(f"an answer that is no JSON ({error})") from None

    def close(self) -> None:
        """Ends all connections; threads that wait for an answer get an error."""
        with self._lock:
            for connection in self._open:
                try:
                    if connection.sock is not None:
                        connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def _exchange(self, path: str, body: Any) -> tuple[int, bytes]:
        connection = getattr(self._mine, "connection", None) or self._dial()
        data = None if body is None else json.dumps(body).encode()
        verb = "GET" if body is None else "POST"
        if connection.sock is None:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(self._timeout)
        connection.request(verb, self._parts.path + path, data, self._headers)
        response = connection.getresponse()
        return response.status, response.read()

    def _dial(self) -> http.client.HTTPConnection:
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        assert self._parts.hostname is not None
        connection = kind[self._parts.scheme](
            self._parts.hostname, self._parts.port, timeout=min(_CONNECT, self._timeout)
        )
        self._mine.connection = connection
        with self._lock:
            self._open.add(connection)
        return connection

    def hang_up(self) -> None:
        """Ends this thread's connection."""
        connection = getattr(self._mine, "connection", None)
        if connection is not None:
            with self._lock:
                self._open.discard(connection)
            connection.close()
            self._mine.connection = None


def _message(content: bytes) -> str:
    """What an error says, in whatever layout."""
    text = content.decode(errors="replace").strip()
    try:
        found = json.loads(text)
        found = found.get("error", found)
        return str(found.get("message", found) if isinstance(found, dict) else found)[:300]
    except (ValueError, AttributeError):
        return text[:300] or "(no reason given)"
