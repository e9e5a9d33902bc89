"""As much of W&B's HTTP interface as its client needs to upload runs and to read them back, on this machine.

Covered: UpsertBucket, CreateRunFiles, the file stream (summary and history), uploads of files, and the query for the
runs of a project. The answers are what the pinned client asks for, no more.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Backend:
    """What was received.

    Attributes:
        runs: Name of a run → what is known of it.
        requests: Operation or path of every request.
        released: Set where a hanging server may answer.
    """

    url: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def graphql(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        """Answer one operation."""
        if "viewer {" in query:
            names = {"id": "u", "entity": "me", "username": "me", "name": "me", "email": "", "flags": "{}"}
            return {"viewer": names | {"teams": {"edges": []}}}
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(values), "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in values["files"]]
            return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:  # the table of sites; as if it were there already, so that nothing is sent
            sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        if "runs(" in query:
            return {"project": self._project(query)}
        if "run(" in query:
            return {"project": {"internalId": "1", "run": self._node(values["name"], query)}}
        return {}

    def _upsert(self, values: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(values["name"], {"summary": {}, "history": {}})
        run.update({key: values[key] for key in ("project", "groupName", "displayName", "tags") if values.get(key)})
        project = {"id": "p", "name": values["project"], "entity": {"id": "e", "name": "me"}}
        return {"id": values["name"], "name": values["name"], "project": project, "historyLineCount": 0}

    def stream(self, name: str, files: dict[str, Any]) -> None:
        """Take a piece of a run's files."""
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.runs[name]["summary"] = json.loads(line)
        history = files.get("wandb-history.jsonl", {})
        for number, line in enumerate(history.get("content", []), history.get("offset", 0)):
            self.runs[name]["history"][number] = json.loads(line)

    def _project(self, query: str) -> dict[str, Any]:
        edges = [{"node": self._node(name, query), "cursor": name} for name in sorted(self.runs)]
        page = {"endCursor": None, "hasNextPage": False}
        return {
            "runCount": len(edges),
            "internalId": "1",
            "readOnly": False,
            "runs": {"edges": edges, "pageInfo": page},
        }

    def _node(self, name: str, query: str) -> dict[str, Any]:
        """What is asked for of a run."""
        run = self.runs[name]
        known = {
            "id": name,
            "name": name,
            "displayName": run.get("displayName", name),
            "state": "finished",
            "config": "{}",
            "group": run.get("groupName"),
            "tags": run.get("tags", []),
            "sweepName": None,
            "jobType": None,
            "commit": None,
            "readOnly": False,
            "createdAt": "2024-01-01T00:00:00",
            "heartbeatAt": "2024-01-01T00:00:00",
            "description": "",
            "notes": "",
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run["summary"]),
            "historyLineCount": len(run["history"]),
            "historyKeys": None,
            "projectId": "1",
            "user": {"name": "me", "username": "me"},
        }
        return {key: value for key, value in known.items() if re.search(rf"\b{key}\b", query)}


def handler(backend: Backend, *, hang: bool) -> type[BaseHTTPRequestHandler]:
    """A request handler for a backend."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._answer()

        do_POST = do_PUT = do_GET  # noqa: N815

        def _answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                raw = gzip.decompress(raw)
            backend.requests.append(f"{self.path} {raw[:2000].decode(errors='replace')}")
            if hang:
                backend.released.wait()
                return
            reply: dict[str, Any] = {}
            if self.path.endswith("/graphql"):
                body = json.loads(raw)
                reply = {"data": backend.graphql(body["query"], body.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                backend.stream(self.path.split("/")[-2], json.loads(raw).get("files", {}))
            text = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


@contextmanager
def serve(*, hang: bool = False) -> Iterator[Backend]:
    """A backend that listens; where it hangs, it takes every request and answers none."""
    backend = Backend()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(backend, hang=hang))
    server.daemon_threads = True
    backend.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield backend
    finally:
        backend.released.set()
        server.shutdown()
        server.server_close()
