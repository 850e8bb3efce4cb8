"""A stand-in for the Hugging Face hub: enough of its HTTP API to take a model, in memory.

What is pushed is checked as the hub checks it: tokens, front matter, sizes and digests of large files.
"""

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_" + "standin" * 5


class Hub:
    """Repositories, and what the hub would say.

    Attributes:
        refuses: Status with which it answers requests whose path contains a text.
        pages: What it answers, with 200 and as it is, to requests whose path contains a text.
        silent: Seconds before each answer.
        role: Of the token.
        scopes: Of the token, if it is a fine-grained one.
        lab_role: Of its owner in the organization ``lab``.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuses: dict[str, int] = {}
        self.pages: dict[str, bytes] = {}
        self.silent = 0.0
        self.role = "write"
        self.scopes: list[dict[str, Any]] | None = None
        self.lab_role = "write"
        self.address = ""

    def make(self, name: str, *, private: bool = True, **files: bytes) -> None:
        """Make a repository that was there before."""
        self.files[name], self.private[name], self.commits[name] = dict(files), private, ["before"]

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and contents of an answer."""
        place, *parts = path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[1:3])
        match [method, place, *parts]:
            case ["GET", "api", "whoami-v2"]:
                token: dict[str, Any] = {"role": self.role}
                if self.scopes is not None:
                    token["fineGrained"] = {"global": [], "scoped": self.scopes}
                orgs = [{"name": "lab", "roleInOrg": self.lab_role}]
                return 200, {"name": "ada", "orgs": orgs, "auth": {"accessToken": token}}
            case ["POST", "api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["POST", "api", "validate-yaml"]:
                return self._validate(json.loads(body)["content"])
            case ["PUT", "blobs", oid]:
                self.blobs[oid] = body
                return 200, {}
            case ["POST", owner, _, "info", "lfs", "objects", "batch"] if owner:
                return 200, {"objects": [self._slot(o) for o in json.loads(body)["objects"]]}
            case ["GET" | "POST", "api", "models", *_] if name not in self.files:
                return 404, {"error": "Repository not found"}
            case ["GET", "api", "models", _, _]:
                return 200, {"id": name, "private": self.private[name], "siblings": [], "sha": "0"}
            case ["GET", "api", "models", _, _, "tree", "main"]:
                return 200, [
                    {"type": "file", "path": path, "size": len(data), "oid": "0"}
                    for path, data in self.files[name].items()
                ]
            case ["POST", "api", "models", _, _, "preupload", "main"]:
                modes = [_mode(file["path"]) for file in json.loads(body)["files"]]
                return 200, {"files": modes}
            case ["POST", "api", "models", _, _, "commit", "main"]:
                return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return 400, {"error": f"the stand-in knows no {method} {path}"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        address = {"url": f"{self.address}/{name}"}
        if name in self.files:
            return 409, address
        self.make(
            name, private=wanted.get("visibility") == "private" or wanted.get("private", False)
        )
        self.commits[name] = []
        return 200, address

    def _validate(self, card: str) -> tuple[int, Any]:
        front = yaml.safe_load(card.split("---")[1])
        errors = [] if isinstance(front["tags"], list) else [{"message": "tags is no list"}]
        return 400 if errors else 200, {"errors": errors, "warnings": []}

    def _slot(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.address}/blobs/{wanted['oid']}"}
        return wanted | ({} if wanted["oid"] in self.blobs else {"actions": {"upload": upload}})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = dict(self.files[name])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    self.commits[name].append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    data = self.blobs[value["oid"]]
                    whole = hashlib.sha256(data).hexdigest() == value["oid"]
                    if not whole or len(data) != value["size"]:
                        return 400, {"error": "the large file is not what was announced"}
                    files[value["path"]] = data
                case "deletedFile":
                    del files[value["path"]]
        self.files[name] = files
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1"}


def _mode(path: str) -> dict[str, Any]:
    large = path.endswith((".safetensors", ".bin"))
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a stand-in on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {self.path}")
            time.sleep(hub.silent)
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, answer = hub.answer(self.command, self.path, body)
            if not known and not self.path.startswith("/blobs"):
                status, answer = 401, {"error": "Invalid username or password."}
            for part, refusal in hub.refuses.items():
                if part in self.path:
                    status, answer = refusal, {"error": f"refused with {refusal}"}
            data = json.dumps(answer).encode()
            for part, page in hub.pages.items():
                if part in self.path:
                    status, data = 200, page
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
