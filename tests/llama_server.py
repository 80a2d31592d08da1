"""The real HTTP server of llama.cpp, from the package xllamacpp, in a process of its own.

As a program it is that process: `python tests/llama_server.py FILE PORT SLOTS CONTEXT [exact]`.
"""

import http.client
import importlib
import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any


FOLDER = pathlib.Path(__file__).resolve().parent


def missing() -> str | None:
    """Why it cannot run here."""
    for name, extra in (("xllamacpp", "llama-cpp"), ("gguf", "test")):
        if importlib.util.find_spec(name) is None:
            return f"needs {name}: pip install -e '.[{extra}]'"
    return None


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LlamaServer:
    """Serves a GGUF file on a port of this machine, until the block ends.

    It also listens on a second port, `control`: whoever connects has the server restarted on the
    file as it is then, and reads "restarted". Nothing is served before the first of either.

    Args:
        file: the GGUF file.
        slots: requests at once.
        context: tokens of each.
        exact: keys and values in float32; llama.cpp's default is float16.
    """

    def __init__(self, file: pathlib.Path, *, slots: int = 4, context: int = 256, exact=True):
        self.file = pathlib.Path(file)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._options = [str(slots), str(context), *(["exact"] if exact else [])]
        self._child: subprocess.Popen | None = None
        self._log = tempfile.TemporaryFile()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.control = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> "LlamaServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.stop()
        self._log.close()

    def reload(self, *stop_ids: int) -> tuple[str, ...]:
        """The command that has it serve a checkpoint, for `OpenAI(reload=)`."""
        stops = [word for token in stop_ids for word in ("--stop", str(token))]
        script = str(FOLDER / "write_gguf.py")
        to = [str(self.file), *stops, "--restart", self.control]
        return (sys.executable, script, "{folder}", *to)

    def start(self) -> None:
        """Starts the server, and waits until it has loaded what it serves.

        Raises:
            RuntimeError: if it does not start.
        """
        # It ends when its standard input does, so also with a test run that is killed.
        self._child = subprocess.Popen(
            [sys.executable, __file__, str(self.file), str(self.port), *self._options],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 60
        while self._child.poll() is None and time.monotonic() < deadline:
            if self._healthy():
                return
            time.sleep(0.05)
        raise RuntimeError(f"llama.cpp does not start; it says: {self.log()[-1500:]}")

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """Kills it."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            assert self._child.stdin is not None
            self._child.stdin.close()
            self._child = None

    def log(self) -> str:
        """What it has said."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _listen(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            with channel:
                self.stop()
                try:
                    self.start()
                    channel.sendall(b"restarted")
                except RuntimeError:
                    channel.sendall(b"failed")


def main(file: str, port: int, slots: int, context: int, exact: bool) -> None:
    """Serves until its standard input ends."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.n_gpu_layers = 0
    # Two threads that wait for each other stand still where others want the cores.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.ctx_shift = False
    params.cache_ram_mib = 0
    params.fit_params = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    print("listening", server.listening_address, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # its threads would keep the interpreter from ending


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), exact="exact" in sys.argv)
