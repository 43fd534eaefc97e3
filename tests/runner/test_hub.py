"""Uploads to a hub, of which a server on this machine plays the part."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from helpers import BASE, Ended, command, environment
from safetensors.torch import load_file

from hft_cli.run_dir import RunDir
from hft_cli.runner.deltas import materialize, publish


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's interface that an upload takes. `server.files` gets what is uploaded."""

    def do_POST(self) -> None:
        server: Any = self.server
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address, answer = f"http://127.0.0.1:{server.server_port}", {}
        server.requests.append((self.path, content))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(401, {"error": "Invalid credentials"})
            return
        if self.path.endswith("/repos/create"):
            answer = {"url": f"{address}/owner/name"}
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(content)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            answer = {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        elif self.path.endswith("/objects/batch"):
            objects = [
                {**part, "actions": {"upload": {"href": f"{address}/put/{part['oid']}", "header": {}}}}
                for part in json.loads(content)["objects"]
            ]
            answer = {"transfer": "basic", "objects": objects}
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    server.files[line["value"]["path"]] = server.objects[line["value"]["oid"]]
            answer = {"commitUrl": f"{address}/owner/name/commit/1", "commitOid": "1", "success": True}
        self.answer(200, answer)

    def do_PUT(self) -> None:
        server: Any = self.server
        server.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, {})

    def do_GET(self) -> None:
        self.answer(404 if self.path.startswith("/api/models/") else 200, {"error": "Repository not found"})

    def answer(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.objects, server.requests = {}, {}, []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def published(run: Path, out: Path, hub: Any, *more: str, token: str = "hf_right") -> Ended:
    """`hft publish --push` with the hub of this machine."""
    of_hub = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    words = command("publish", run, "--out", out, "--push", "owner/name", *more)
    done = subprocess.run(
        words, env={**environment(), **of_hub, "HF_TOKEN": token}, capture_output=True, text=True, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_delta_is_uploaded_file_by_file(two_rounds, tmp_path, hub):
    done = published(two_rounds, tmp_path / "delta", hub)
    assert done.status == 0, done.err
    assert done.out.endswith("/owner/name\n")
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "delta").iterdir()}
    (made,) = [json.loads(content) for path, content in hub.requests if path.endswith("/repos/create")]
    assert made["visibility"] == "private"


def test_a_public_repository_is_asked_for(two_rounds, tmp_path, hub):
    assert published(two_rounds, tmp_path / "delta", hub, "--public").status == 0
    (made,) = [json.loads(content) for path, content in hub.requests if path.endswith("/repos/create")]
    assert made["visibility"] != "private"


def test_without_the_right_the_delta_stays(two_rounds, tmp_path, hub):
    done = published(two_rounds, tmp_path / "delta", hub, token="hf_wrong")
    assert done.status == 2
    assert "was written, but could not be uploaded to owner/name" in done.err
    assert "hf upload owner/name" in done.err
    assert "Traceback" not in done.err
    assert (tmp_path / "delta" / "delta.safetensors").exists()
    assert not hub.files


def test_the_loader_of_the_card_gives_the_model(two_rounds, tmp_path):
    publish(RunDir(two_rounds), None, tmp_path / "delta")
    materialize(RunDir(two_rounds), None, tmp_path / "expected")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "delta" / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 15
    code = code.replace('"BASE"', repr(str(BASE)))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "delta", check=True, env=dict(os.environ))
    folders = (tmp_path / "expected", tmp_path / "delta" / "model")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
