"""A small hub on this machine: the few answers that an upload through huggingface_hub needs, and what it was sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from huggingface_hub import HfApi

TOKEN = "hub-test-token"


@dataclass
class HubServer:
    """What the hub holds and was asked.

    Attributes:
        address: of the server.
        private: by repository, whether it is private.
        files: by repository, the files there.
        branches: made.
        calls: method and path of every request.
        refuse: status code to answer every commit with; 0 for none.
    """

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    refuse: int = 0

    def api(self, token: str | bool = TOKEN) -> HfApi:
        """Return a client of this hub."""
        return HfApi(endpoint=self.address, token=token)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON for one request."""
        self.calls.append(f"{method} {path.split('?')[0]}")
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        parts = path.split("?")[0].strip("/").split("/")
        if parts[1] == "whoami-v2":
            return 200, {"name": "me", "type": "user", "auth": {}}
        if parts[1] == "validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if parts[1:3] == ["repos", "create"]:
            return self._create(json.loads(body))
        return self._of_repo("/".join(parts[2:4]), parts[4:], body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.private:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{repo}"}
        private = asked.get("private") or asked.get("visibility") == "private"
        self.private[repo], self.files[repo] = bool(private), {".gitattributes": b""}
        return 200, {"url": f"{self.address}/{repo}"}

    def _of_repo(self, repo: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in self.files[repo]]
            return 200, {"id": repo, "private": self.private[repo], "siblings": siblings, "sha": "0" * 40}
        if rest[0] == "tree":
            return 200, [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in self.files[repo].items()]
        if rest[0] == "branch":
            self.branches.append(rest[1])
            return 200, {}
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        if self.refuse:
            return self.refuse, {"error": "no"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "deletedFile":
                del self.files[repo][value["path"]]
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a hub on a free port for a while."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, data = hub.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
