"""A hub for tests: a server that answers as the Hugging Face hub does, and the cache that its client keeps.

with HubServer({"owner/name": {"main": {"config.json": b"{}"}}}) as hub: hub.asked
cache_repository(cache, "owner/name", folder, revision="main")
"""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

import pytest

Repositories = Mapping[str, Mapping[str, Mapping[str, bytes]]]
"""Contents of files by repository, revision and path."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commit_of(files: Mapping[str, bytes]) -> str:
    """Forty hexadecimal digits, the same for the same files."""
    return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


def cache_repository(cache: Path, repo: str, files: Path | Mapping[str, bytes], revision: str = "main") -> Path:
    """Lay files into the hub client's cache as if they had been downloaded; returns the snapshot's folder."""
    contents = files_of(files) if isinstance(files, Path) else files
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit_of(contents)
    for name, content in contents.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    ref = root / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(snapshot.name)
    return snapshot


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, *, offline: bool = True) -> None:
    """The hub's client keeps and finds its files in `cache`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


class HubServer:
    """Answers what the client asks of the hub: listings, revisions and files; `asked` is what was asked for."""

    def __init__(self, repositories: Repositories) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        hub = self

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def fetched(self) -> set[str]:
        """The files whose contents were sent."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for path in self.asked
            if path.startswith("GET /") and "/resolve/" in path
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """The hub's client asks this server."""
        from huggingface_hub import constants

        use_cache(monkeypatch, cache, offline=False)
        monkeypatch.setattr(constants, "ENDPOINT", self.address)
        template = self.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def answer(self, request: http.server.BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        if path == "/":
            return _send(request, b"", with_body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?", path):
            repo, what, revision = found[1], found[2] or "revision", found[3] or "main"
            if (files := self._files(repo, revision)) is None:
                return _refuse(request, "RepoNotFound" if repo not in self.repositories else "RevisionNotFound")
            body = _tree(files) if what == "tree" else _information(repo, files)
            return _send(request, json.dumps(body).encode(), with_body, {"Content-Type": "application/json"})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self._files(found[1], found[2])
            if files is None or found[3] not in files:
                return _refuse(request, "EntryNotFound")
            content = files[found[3]]
            about = {"X-Repo-Commit": commit_of(files), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return _send(request, content, with_body, about)
        return _refuse(request, "RepoNotFound")

    def _files(self, repo: str, revision: str) -> Mapping[str, bytes] | None:
        revisions = self.repositories.get(repo, {})
        return revisions.get(revision) or next((f for f in revisions.values() if commit_of(f) == revision), None)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _information(repo: str, files: Mapping[str, bytes]) -> dict[str, object]:
    return {"id": repo, "sha": commit_of(files), "siblings": [{"rfilename": name} for name in files]}


def _tree(files: Mapping[str, bytes]) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()[:40]}
        for name, content in files.items()
    ]


def _send(
    request: http.server.BaseHTTPRequestHandler, content: bytes, with_body: bool, about: Mapping[str, str] | None = None
) -> None:
    request.send_response(200)
    for name, value in {**(about or {}), "Content-Length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if with_body:
        request.wfile.write(content)


def _refuse(request: http.server.BaseHTTPRequestHandler, code: str) -> None:
    request.send_response(404)
    request.send_header("X-Error-Code", code)
    request.send_header("X-Error-Message", code)
    request.send_header("Content-Length", "0")
    request.end_headers()
