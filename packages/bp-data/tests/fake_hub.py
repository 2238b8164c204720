"""A Hub on this machine, for the real client: one data set, `owner/chats`, at two commits, and a gated one."""

import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
CARD = """---
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/train*
  - split: test
    path: en/test.jsonl
- config_name: de
  data_files: de.jsonl
---
"""


def line(answer):
    return json.dumps({"prompt": "Q", "completion": answer}).encode() + b"\n"


FILES = {
    OLD: {
        "README.md": CARD.encode(),
        "en/train-0.jsonl": line("old"),
        "en/test.jsonl": line("t"),
        "de.jsonl": line("d"),
    },
    NEW: {
        "README.md": CARD.encode(),
        "en/train-0.jsonl": line("new 0"),
        "en/train-1.jsonl": line("new 1"),
        "en/test.jsonl": line("t"),
        "de.jsonl": line("d"),
        "weights.bin": b"never fetched",
    },
}
NAMES = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}


class _Answers(BaseHTTPRequestHandler):
    def log_message(self, *_args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if "owner/gated" in path:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "owner/chats" not in path:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        rest = path.split("owner/chats", 1)[1].strip("/").split("/")
        kind, name, inner = (*rest, "", "", "")[0], (*rest, "", "", "")[1], "/".join(rest[2:])
        commit = NAMES.get(name or "main")
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            return self._json([entry for entry in _entries(commit) if entry["path"].startswith(inner)])
        if kind == "paths-info":
            return self._json([])
        if kind == "resolve":
            time.sleep(self.server.delay)
            return self._file(commit, inner)
        siblings = [{"rfilename": path, "size": len(data)} for path, data in FILES[commit].items()]
        return self._json({"id": "owner/chats", "sha": commit, "siblings": siblings, "private": False, "gated": False})

    def _file(self, commit, path):
        data = FILES[commit].get(path)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _json(self, body):
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entries(commit):
    files = FILES[commit]
    folders = sorted({path.split("/")[0] for path in files if "/" in path})
    found = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
    return found + [
        {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
        for path, data in files.items()
    ]


@contextlib.contextmanager
def serve(delay=0.0):
    """The address, and the paths that were asked for; a file takes ``delay`` seconds."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.asked, server.delay = [], delay
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
