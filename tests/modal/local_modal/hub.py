"""A hub of models for one machine: folders as repositories over HTTP, whose connections stay open as the hub's do."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1" * 40


@contextmanager
def a_hub(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths that are asked for as they come."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, repositories, asked))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, repositories: Mapping[str, Path], asked: list[str], *rest: object) -> None:
        self._repositories = repositories
        self._asked = asked
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self._asked.append(path)
        for repo, folder in self._repositories.items():
            if path.startswith(f"/api/models/{repo}/tree/"):
                files = [
                    {"type": "file", "path": name, "size": one.stat().st_size, "oid": "0" * 40}
                    for name, one in _files(folder)
                ]
                return self._send(200, json.dumps(files).encode(), with_body, {"Content-Type": "application/json"})
            if path.startswith(f"/api/models/{repo}"):
                siblings = [{"rfilename": name, "size": one.stat().st_size} for name, one in _files(folder)]
                about = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                return self._send(200, json.dumps(about).encode(), with_body, {"Content-Type": "application/json"})
            file = folder / "/".join(path.split("/")[5:])
            if path.startswith(f"/{repo}/resolve/") and file.is_file():
                data = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                return self._send(200, data, with_body, headers)
        is_known = any(path.startswith(f"/{repo}/resolve/") for repo in self._repositories)
        missing = "EntryNotFound" if is_known else "RepoNotFound"
        return self._send(404, b"", with_body, {"X-Error-Code": missing})

    def _send(self, status: int, data: bytes, with_body: bool, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def _files(folder: Path) -> list[tuple[str, Path]]:
    return sorted((one.relative_to(folder).as_posix(), one) for one in folder.rglob("*") if one.is_file())
