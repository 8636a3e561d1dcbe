"""Servers of tests: a real one of MLflow behind a gate that can fail, and others that are no MLflow."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from warm_processes import warm_children, warm_python

State = Literal["open", "silent", "closed"]


def free_port(highest: int = 65535) -> int:
    """Return a port of this machine that nobody uses now, at most `highest`."""
    while True:
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            port = int(opened.getsockname()[1])
        if port <= highest:
            return port


@contextmanager
def mlflow_server(
    folder: Path, store: str | None = None, files: str | None = None, variables: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run `mlflow server`, and yield its port.

    Args:
        folder: for its log and, unless they are named, its database and its files.
        store: URI of its database.
        files: URI of a folder for the files of runs.
        variables: of its environment, for access to these.
    """
    port, store = free_port(), store or f"sqlite:///{folder}/server.db"
    command = [warm_python(), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", store, "--artifacts-destination", files or str(folder / "files")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= warm_children() | (variables or {})
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # nine more processes, for evaluations by the server
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*command, *stores], stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers.

    Raises:
        RuntimeError: it has ended, or not answered for two minutes.
    """
    until_s = time.monotonic() + 120  # it takes seconds; the machine may be shared
    while time.monotonic() < until_s and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"expected an answer of {url}, got none")


class Gate:
    """Passes connections on to a server, or refuses them (`closed`), or accepts and never answers (`silent`)."""

    def __init__(self, upstream_port: int) -> None:
        self.port = free_port()
        self._upstream_port = upstream_port
        self._state: State = "closed"
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []
        self.set("open")

    @property
    def uri(self) -> str:
        """The address, with a password that must not be seen."""
        return f"http://user:pa55word@127.0.0.1:{self.port}"

    def set(self, state: State) -> None:
        """Change the state; connections that are open end, as with a server that dies."""
        self._state = state
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._connections.clear()
        if state == "closed" and self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        elif state != "closed" and self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._connections.append(client)
                if self._state == "open":
                    server = socket.create_connection(("127.0.0.1", self._upstream_port))
                    self._connections.append(server)
                    for ends in ((client, server), (server, client)):
                        threading.Thread(target=_pump, args=ends, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """Run a server with the same answer to every request, and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:pa55word@127.0.0.1:{server.server_port}"
        server.shutdown()
