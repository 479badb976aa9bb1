"""As much of the hub as reading a data set asks for, on this machine: ROOT/OWNER/NAME/COMMIT/ holds the files of a commit."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextmanager
def serving(root: Path, revisions: dict[str, str]):
    """Gives the address. revisions: names of commits, of every data set."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: _Handler(root, revisions, *given))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root, revisions, *given):
        self.root, self.revisions = root, revisions
        super().__init__(*given)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    do_GET = do_HEAD

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        is_api, (_, *parts) = path.startswith("/api/datasets/"), path.removeprefix("/api").split("/")
        if parts[0] != "datasets" or len(parts) < 3 or not (directory := self.root / parts[1] / parts[2]).is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        what, revision, *rest = parts[3:] or ("revision", "main")
        commit = self.revisions.get(revision, revision)
        if not (directory / commit).is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        place = directory / commit / "/".join(rest)
        if is_api:
            return self._send_json(what, directory / commit, place, f"{parts[1]}/{parts[2]}", commit)
        if not place.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._send_file(place, commit)

    def _send_json(self, what, top, place, name, commit):
        if what == "revision":
            files = [{"rfilename": str(path.relative_to(top))} for path in sorted(top.rglob("*")) if path.is_file()]
            answer = {"id": name, "sha": commit, "siblings": files, "private": False, "disabled": False, "gated": False, "tags": [],
                      "downloads": 0, "likes": 0}
        elif what == "tree":
            recursive = "recursive=true" in self.path.lower()
            if not place.is_dir():
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            answer = [_entry(path, top) for path in sorted(place.rglob("*") if recursive else place.iterdir())]
        else:  # paths-info
            body = self.body.decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else [unquote(pair.partition("=")[2]) for pair in body.split("&")]
            answer = [_entry(top / path, top) for path in wanted if (top / path).exists()]
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, place, commit):
        content = place.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(content), len(content))
            return self._send(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})
        return self._send(200, content, headers)

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path, top):
    name = str(path.relative_to(top))
    oid = hashlib.sha1(name.encode()).hexdigest()
    return {"type": "directory", "path": name, "oid": oid, "size": 0} if path.is_dir() else {
        "type": "file", "path": name, "oid": oid, "size": path.stat().st_size}
