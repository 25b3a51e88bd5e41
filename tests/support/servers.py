"""A hub on this machine, for tests."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet")
COMMIT = "0123456789abcdef" * 2 + "01234567"

ROWS = {
    "bioinstruct": lambda i: {
        "instruction": f"Name vitamin {i}.",
        "input": "" if i % 2 else "Briefly.",
        "output": f"B{i}",
    },
    "wmt19_kk_en": lambda i: {"translation": {"kk": f"бұл {i} үй .", "en": f"this is house {i} ."}},
    "gsm8k": lambda i: {
        "question": f"What is {i} plus 1?",
        "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}",
    },
    "file": lambda i: {"prompt": f"Say {i}:", "answer": f"{i}"},
    "dialogsum": lambda i: {
        **dict.fromkeys(("id", "fname"), f"d{i}"),
        "dialogue": f"#Person1#: Is it {i}?",
        **dict.fromkeys(("summary", "summary1", "summary2", "summary3"), f"It is {i}."),
    },
}
"""Rows of the data sets of the shipped tasks, in their public schemas: DialogSum's of the hub and of its files."""


@dataclass
class Fault:
    """What goes wrong with the requests whose "METHOD path" matches, `times` times.

    Attributes:
        status, headers: the answer in place of the right one.
        delay: seconds before anything is answered.
        stall: seconds between the headers and the body.
        cut: bytes of the body after which the connection is closed.
        spoil: the body's first byte is another one.
        short: the body says that it ends after so many bytes.
    """

    match: str
    times: float = float("inf")
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    stall: float = 0.0
    cut: int | None = None
    spoil: bool = False
    short: int | None = None


@dataclass
class Hub:
    """What the server holds and was asked.

    Attributes:
        repositories: files by name, of "models/ORG/NAME" or "datasets/ORG/NAME".
        revisions: further branches and tags, with their commits.
        gated: repositories whose files are refused.
        requests: "METHOD path", and the range if there is one, of each request, in order.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, name: str, folder: Path) -> None:
        """Hold the files of a folder."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        self.repositories[name] = {str(file.relative_to(folder)): file.read_bytes() for file in files}

    def fault(self, request: str) -> Fault:
        """The fault that a request meets; one that changes nothing where all is well."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.match, request):
                fault.times -= 1
                return fault
        return Fault("")


@contextmanager
def serving() -> Iterator[Hub]:
    """An empty hub at a free port."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with _Server(("127.0.0.1", 0), Handler) as http:
        hub.endpoint = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield hub
        http.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *_: Any) -> None: ...  # the client has gone away


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{request} {self.headers.get('Range', '')}".strip())
        self._fault = self.hub.fault(request)
        time.sleep(self._fault.delay)
        if self._fault.status is not None:
            self._send(self._fault.status, {**self._fault.headers})
        elif found := re.fullmatch(
            r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path
        ):
            self._api(found[1], found[2], found[3], body)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(.+)", path):
            self._resolve(f"{found[1] or 'models/'}{found[2]}", found[3])
        else:
            self._send(404, {})

    do_GET = do_HEAD = do_POST = _answer

    def _api(self, name: str, what: str | None, rest: str | None, body: bytes) -> None:
        found = self._at(name, rest or "main")
        if found is None:
            return
        commit, files, _ = found
        if what == "tree":
            self._json([_entry(path, content) for path, content in files.items()])
        elif what == "paths-info":
            asked = re.findall(r"(?:^|&)paths=([^&]*)", body.decode())
            self._json([_entry(path, files[path]) for path in map(unquote, asked) if path in files])
        else:
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name.split("/", 1)[1], "sha": commit, "siblings": siblings, "tags": []})

    def _resolve(self, name: str, rest: str) -> None:
        found = self._at(name, rest)
        if found is None:
            return
        commit, files, path = found
        if name in self.hub.gated:
            self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        elif path not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        else:
            content = files[path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(path, content)}"', "Accept-Ranges": "bytes"}
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            part = content[int(start[1]) :] if start else content
            self._send(206 if start else 200, headers, part)

    def _at(self, name: str, rest: str) -> tuple[str, dict[str, bytes], str] | None:
        """Commit, files and remaining path; None where an error was answered."""
        files = self.hub.repositories.get(name)
        if files is None:
            return self._refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        known = {**self.hub.revisions, **{commit: commit for commit in self.hub.revisions.values()}}
        for revision, commit in known.items():
            if rest == revision or rest.startswith(f"{revision}/"):
                return commit, files, rest.removeprefix(revision).lstrip("/")
        return self._refuse(404, "RevisionNotFound")

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        fault = self._fault
        if self.command == "GET" and fault.spoil:
            body = bytes([body[0] ^ 1]) + body[1:]
        if self.command == "GET" and fault.short is not None:
            body = body[: fault.short]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            time.sleep(fault.stall)
            self.wfile.write(body if fault.cut is None else body[: fault.cut])
        if fault.cut is not None:
            self.close_connection = True


def _etag(path: str, content: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _etag("", content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _etag(path, content), "size": len(content), "pointerSize": 134}
    return entry


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
