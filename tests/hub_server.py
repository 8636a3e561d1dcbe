"""A Hugging Face hub on this machine, with one repository: what huggingface_hub asks of the real one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Answer = tuple[int, bytes, Mapping[str, str]]


@dataclass
class Repository:
    """A repository.

    Attributes:
        folder: with its files.
        refuse: error code for every request, such as "GatedRepo"; None for none.
        downloaded: the files that were sent.
    """

    folder: Path
    refuse: str | None = None
    downloaded: list[str] = field(default_factory=list)

    def answer(self, path: str) -> Answer:
        """Return status, body and headers for a path."""
        if self.refuse is not None:
            return 403, b"{}", {"X-Error-Code": self.refuse}
        if path.startswith("api/models/owner/name"):
            return 200, json.dumps(self.tree() if "/tree/" in path else self.info()).encode(), {}
        if path.startswith("owner/name/resolve/"):
            file = self.folder / path.split("/", 4)[4]
            return 200, file.read_bytes(), {"ETag": f'"{_oid(file)}"'}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def files(self) -> dict[str, Path]:
        """Return name -> file."""
        return {f.relative_to(self.folder).as_posix(): f for f in sorted(self.folder.rglob("*")) if f.is_file()}

    def tree(self) -> list[dict[str, object]]:
        """Return what the hub says of the files."""
        return [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
            for name, file in self.files().items()
        ]

    def info(self) -> dict[str, object]:
        """Return what the hub says of the repository."""
        return {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files()]}


@contextmanager
def hub_server(folder: Path, refuse: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve the files in `folder` as `owner/name`; yield the address, and the list of files that are downloaded."""
    repository = Repository(folder, refuse)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            path = self.answer()
            if "/resolve/" in path:
                repository.downloaded.append(path.split("/", 4)[4])

        def answer(self) -> str:
            path = unquote(urlsplit(self.path).path).strip("/")
            status, body, headers = repository.answer(path)
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            return path

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repository.downloaded
    finally:
        server.shutdown()
        server.server_close()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
