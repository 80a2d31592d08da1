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
        fault: "address" if time does not mend it (no such host, no TLS); "silent" if there was no
            connection; "strange" if what answered does not speak this API; "" otherwise.
    """

    def __init__(self, why: str, fault: str = ""):
        super().__init__(why)
        self.fault = fault


class Refused(EngineError):
    """An answer that says no.

    Attributes:
        status: of HTTP.
        path: that was asked for.
    """

    def __init__(self, url: str, path: str, status: int, why: str):
        super().__init__(f"{url}{path} refused with HTTP {status}: {why}")
        self.status, self.path = status, path


class Client:
    """Asks one server.

    Args:
        url: root of the API, without a slash at its end.
        timeout: seconds without a byte of the answer, after which a request has failed.
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
        """One for another address, without retries; `close` ends its connections too.

        The key goes along to the same host only, and never from https to http.
        """
        new = urllib.parse.urlsplit(url)
        old = self._parts
        trusted = new.hostname == old.hostname and (new.scheme == "https" or old.scheme == "http")
        key = self._key if trusted else ""
        there = Client(url, timeout=timeout, retries=0, key=key, closed=self.closed)
        there._open, there._lock = self._open, self._lock
        return there

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
            if self.closed.is_set():
                raise EngineError(
                    f"the engine at {self.url} was closed before it had answered"
                ) from None
            raise self._unanswered(error) from None
        if status == 429 or (status >= 500 and status != 501):
            raise Unanswered(f"HTTP {status}: {_message(content)}")
        if status >= 300:
            raise Refused(self.url, path, status, _message(content))
        try:
            return json.loads(content)
        except ValueError as error:
            self.hang_up()
            what = "a page of HTML" if content.lstrip()[:1] == b"<" else f"no JSON ({error})"
            raise Unanswered(f"it answered {path} with {what}", "strange") from None

    def close(self) -> None:
        """Ends all connections; threads that wait for an answer get an error."""
        with self._lock:
            for connection in self._open:
                try:
                    if connection.sock is not None:
                        connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def _unanswered(self, error: Exception) -> Unanswered:
        if isinstance(error, socket.gaierror):
            host = self._parts.hostname
            return Unanswered(f"no host is known as {host} ({error.strerror})", "address")
        if isinstance(error, ssl.SSLError):
            why = getattr(error, "verify_message", "") or error.reason or str(error)
            return Unanswered(f"its TLS fails ({why})", "address")
        if isinstance(error, _NoConnection):
            return Unanswered(str(error), "silent")
        # An end without an answer counts as one of these, and is the network's fault.
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
            return Unanswered("what it answers is not HTTP", "strange")
        return Unanswered(str(error) or type(error).__name__)

    def _exchange(self, path: str, body: Any) -> tuple[int, bytes]:
        connection = getattr(self._mine, "connection", None) or self._dial()
        data = None if body is None else json.dumps(body).encode()
        verb = "GET" if body is None else "POST"
        if connection.sock is None:
            try:
                connection.connect()
            except (socket.gaierror, ssl.SSLError):
                raise
            except OSError as error:
                raise _NoConnection(str(error) or type(error).__name__) from None
            assert connection.sock is not None
            connection.sock.settimeout(self._timeout)
            if self.closed.is_set():  # a moment ago, when there was nothing to end yet
                raise OSError("closed")
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


class _NoConnection(OSError):
    """Nobody took the call."""


def _message(content: bytes) -> str:
    """What an error says, in whatever layout, on one short line."""
    text = content.decode(errors="replace").strip()
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        text = "(a page of HTML)" if text.startswith("<") else text
    return " ".join(text.split())[:150] or "(no reason given)"
