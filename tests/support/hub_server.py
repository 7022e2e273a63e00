"""A small model hub on loopback that answers what huggingface_hub asks: a model's commit, its
files, their sizes and hashes, and their bytes, also from the middle.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants

_API = re.compile(r"/api/models/([^/]+/[^/]+)/revision/([^/?]+)")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")


class Hub:
    """What the hub holds, and the requests that it got.

    folders: model id -> {revision: local folder}; gated: ids whose files are refused; requests:
    (method, path, Range) of each; break_after: bytes of a file after which the connection is cut,
    once for each number in the list.
    """

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.folders: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.break_after: list[int] = []

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were requested, in order."""
        found = [(method, _RESOLVE.match(path)) for method, path, _ in self.requests]
        return [match[3] for method, match in found if match and method == "GET"]

    def folder(self, repo: str, revision: str) -> tuple[Path, str] | None:
        """(folder, commit) of a revision, which may be the commit itself."""
        for name, folder in self.folders.get(repo, {}).items():
            commit = hashlib.sha1(f"{repo}@{name}".encode()).hexdigest()
            if revision in (name, commit):
                return folder, commit
        return None


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Yields a hub that answers at `hub.endpoint` until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_to(endpoint: str, cache: Path, monkeypatch) -> None:
    """Makes the huggingface_hub of this process use an endpoint and a cache folder, as it does in
    one that starts with HF_ENDPOINT and HF_HUB_CACHE.
    """
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def end_headers(self):
        self.send_header("Connection", "close")  # an idle connection would outlive the hub
        super().end_headers()

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        hub, path = self.server.hub, unquote(self.path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        match = _API.match(path) or _TREE.match(path) or _RESOLVE.match(path)
        if match is None or match[1] not in hub.folders:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif (found := hub.folder(match[1], match[2])) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {match[2]}")
        elif _API.match(path):
            files = [{"rfilename": name} for name in _names(found[0])]
            self._send_json({"id": match[1], "sha": found[1], "siblings": files})
        elif _TREE.match(path):
            self._send_json([_entry(found[0], name) for name in _names(found[0])])
        elif match[1] in hub.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif match[3] not in _names(found[0]):
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._send_file((found[0] / match[3]).read_bytes(), found[1])

    def _refuse(self, status, code, message):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, data, commit):
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = self.server.hub.break_after
        if breaks and len(data) - first > breaks[0]:
            self.wfile.write(data[first : first + breaks.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data[first:])


def _names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _entry(folder, name):
    data = (folder / name).read_bytes()
    entry = {"type": "file", "path": name, "size": len(data)}
    return entry | {"oid": hashlib.sha1(data).hexdigest()}
