"""A Hub on loopback that speaks as much of the commit API as pushing and downloading a model takes.

`with Hub() as hub:` gives its address as `hub.endpoint` (for `HF_ENDPOINT`), its only good token as `hub.token`, and
what was pushed as `hub.files[repository][path]`; `hub.datasets[repository]` is what it tells of a data set.
`hub.break_after = n` closes the connection in the middle of the n-th upload of a large file from now on, once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "LoopBackToken0123456789"
LARGE = 5_000
"""Bytes from which a file goes the way of large ones."""


class Hub:
    def __init__(self) -> None:
        self.token = TOKEN
        self.files: dict[str, dict[str, bytes]] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.requests: list[str] = []
        self.uploads = 0
        self.break_after: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def head(self, repository: str) -> str:
        """The commit that a repository stands at."""
        made = [message for repo, message, _ in self.commits if repo == repository]
        return hashlib.sha1(f"{repository}{len(made)}".encode()).hexdigest()

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        self.hub.requests.append(f"{self.command} {urlsplit(self.path).path}")

    # Answers

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), Content_Type="application/json")

    def _missing(self, what: str) -> None:
        self._send(404, b"{}", X_Error_Code=what, Content_Type="application/json")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._body()
        self._send(
            401, b'{"error": "Invalid credentials"}', Content_Type="application/json", X_Error_Message="Invalid token"
        )
        return False

    # Requests

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not self._known():
            return
        if path == "/api/whoami-v2":
            self._json({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._info(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            files = self.hub.files.get(found[1], {})
            under = (found[2] or "").strip("/")
            listed = {name: data for name, data in files.items() if not under or name.startswith(f"{under}/")}
            self._json([self._entry(name, data) for name, data in listed.items()])
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)", path):
            told = self.hub.datasets.get(found[1])
            self._json({"id": found[1], **told}) if told is not None else self._missing("RepoNotFound")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(found[1], found[2])
        else:
            self._missing("EntryNotFound")

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _info(self, repository: str) -> None:
        files = self.hub.files.get(repository)
        if files is None:
            return self._missing("RepoNotFound")
        siblings = [{"rfilename": name} for name in files]
        self._json({"id": repository, "sha": self.hub.head(repository), "siblings": siblings, "private": False})

    def _file(self, repository: str, name: str) -> None:
        data = self.hub.files.get(repository, {}).get(name)
        if data is None:
            return self._missing("EntryNotFound")
        etag = hashlib.sha256(data).hexdigest()
        self._send(200, data, ETag=f'"{etag}"', X_Repo_Commit=self.hub.head(repository))

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not self._known():
            return
        body = self._body()
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.hub.files.setdefault(name, {".gitattributes": b""})
            self._json({"url": f"{self.hub.endpoint}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": modes})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = []
            for entry in json.loads(body)["objects"]:
                there = entry["oid"] in self.hub.objects
                actions = (
                    {} if there else {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}", "header": {}}}
                )
                objects.append({**entry, **({"actions": actions} if actions else {})})
            self._json({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self._commit(found[1], body)
        else:
            self._missing("EntryNotFound")

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.hub.files.setdefault(repository, {})
        message, changed = "", []
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                continue
            changed.append(value["path"])
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._json({"error": f"{value['path']} was never uploaded"}, 400)
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.hub.commits.append((repository, message, changed))
        sha = self.hub.head(repository)
        self._json({"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repository}/commit/{sha}"})

    def do_PUT(self) -> None:
        # Where large files go is signed by itself on the real one: no token is sent there.
        oid = urlsplit(self.path).path.removeprefix("/lfs/")
        self.hub.uploads += 1
        if self.hub.break_after is not None and self.hub.uploads > self.hub.break_after:
            self.hub.break_after = None
            self.rfile.read(100)
            self.close_connection = True
            return self.connection.close()
        data = self._body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self._json({"error": "the content is not what was announced"}, 400)
        self.hub.objects[oid] = data
        self._send(200)
