"""A small Hub that speaks the real protocol to the real library: create, preupload, LFS with hashes, commit, listing."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_" + "a" * 30
_REGULAR = 200  # bytes; larger files go by LFS, as binary ones do on the real one


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, data=None, headers=()):
        body = b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, words, code=None):
        self.reply(status, {"error": words}, [("X-Error-Message", words), *([("X-Error-Code", code)] if code else [])])

    def read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.calls.append(f"GET {path}")
        parts = path.split("/")
        repo = "/".join(parts[3:5])
        if path in ("/api/models/base/known", "/api/models/base/listed"):
            name = path.removeprefix("/api/models/")
            license = "apache-2.0" if name == "base/known" else ["mit", "apache-2.0"]
            return self.reply(
                200,
                {
                    "id": name,
                    "modelId": name,
                    "cardData": {"license": license},
                    "tags": [],
                    "siblings": [],
                },
            )
        if repo not in self.server.repos:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        files = self.server.repos[repo]
        if "/tree/" in path:
            return self.reply(
                200, [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
            )
        return self.reply(
            200,
            {
                "id": repo,
                "modelId": repo,
                "sha": self.server.sha(repo),
                "siblings": [{"rfilename": n} for n in files],
                "tags": [],
            },
        )

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.read()
        self.server.calls.append(f"POST {path}")
        if self.server.failure == "die":
            self.close_connection = True
            self.connection.close()
            return None
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        if not self.is_known():
            return self.refuse(401, "Invalid username or password.")
        if self.server.failure == "broken":
            return self.refuse(500 if "commit" in path else 400, "the disk is full")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > _REGULAR else "regular", "shouldIgnore": False}
                for f in files
            ]
            return self.reply(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if "/commit/" in path:
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        if "/branch/" in path:
            return self.reply(200)
        raise AssertionError(path)

    def do_PUT(self):
        oid, body = self.path.rpartition("/")[2], self.read()
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.reply(200)

    def validate(self, asked):
        """As the real one: a base that is no repository's name is an error."""
        head = asked["content"].split("---")[1]
        fields = dict(line.split(": ", 1) for line in head.strip().splitlines())
        errors = (
            []
            if "/" in json.loads(fields.get("base_model", '"a/b"'))
            else [{"message": '"base_model" is no repository'}]
        )
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, asked):
        repo = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        url = f"{self.server.url}/{repo}"
        if repo.startswith("other/"):
            return self.refuse(403, "You don't have the rights to create a model under the namespace")
        if repo in self.server.repos:
            return self.reply(409, {"url": url, "error": "You already created this model repo"})
        self.server.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs"}
        self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
        return self.reply(200, {"url": url, "id": repo})

    def batch(self, asked):
        assert asked["hash_algo"] == "sha256"
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in asked["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo, lines):
        assert lines[0]["key"] == "header"
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                body = self.server.objects[value["oid"]]
                assert len(body) == value["size"]
                self.server.repos[repo][value["path"]] = body
        self.server.messages.append(lines[0]["value"]["summary"])
        sha = self.server.sha(repo)
        self.reply(200, {"success": True, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.private, self.objects = {}, {}, {}
        self.calls, self.messages, self.failure = [], [], None

    def sha(self, repo):
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


@contextlib.contextmanager
def serve_hub():
    server = FakeHub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
