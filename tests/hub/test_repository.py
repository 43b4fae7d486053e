"""Push to and import from a repository, with a server that implements the used part of the hub's API."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from bst_dist.cli import main

BST = Path(sys.executable).with_name("bst")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_local"


class Hub(ThreadingHTTPServer):
    """Hub server with repositories in memory: name -> path -> content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Do not print requests."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.server.repositories:
                return self.answer(
                    409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
                )
            self.server.repositories[name] = {}
            self.server.private[name] = asked.get("private", False) or asked.get("visibility") == "private"
            return self.answer(200, {"url": f"{self.endpoint}/{name}", "name": name, "id": name})
        name, what = self.repository()
        if what.startswith("preupload/"):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if what.startswith("commit/"):
            for line in body.decode().splitlines():
                found = json.loads(line)
                if found["key"] == "file":
                    content = base64.b64decode(found["value"]["content"])
                    self.server.repositories[name][found["value"]["path"]] = content
                if found["key"] == "deletedFile":
                    del self.server.repositories[name][found["value"]["path"]]
            url = f"{self.endpoint}/{name}/commit/{COMMIT}"
            return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})
        if what == "validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        return self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            name, _ = self.repository()
            if name not in self.server.repositories:
                return self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            files = sorted(self.server.repositories[name].items())
            if "/tree/" in self.path:
                return self.answer(
                    200,
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for path, data in files
                    ],
                )
            about = {
                "id": name,
                "modelId": name,
                "sha": COMMIT,
                "private": self.server.private[name],
                "tags": [],
                "siblings": [{"rfilename": path, "size": len(data)} for path, data in files],
            }
            return self.answer(200, about)
        return self.file()

    do_HEAD = do_GET

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def repository(self) -> tuple[str, str]:
        """Return OWNER/NAME, and the rest of the path /api/models/OWNER/NAME/..."""
        owner, name, *rest = unquote(self.path.partition("?")[0]).removeprefix("/api/models/").split("/")
        return f"{owner}/{name}", "/".join(rest)

    def file(self) -> None:
        owner, name, _, _, *path = unquote(self.path.partition("?")[0]).strip("/").split("/")
        data = self.server.repositories.get(f"{owner}/{name}", {}).get("/".join(path))
        if data is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        self.send_response(200)
        for key, value in {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(data)),
            "Accept-Ranges": "bytes",
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def bst(hub: Hub, home: Path, *words: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run `bst` in a process, because huggingface_hub reads its environment variables at import."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return subprocess.run([str(BST), *map(str, words)], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.ranks
def test_a_run_is_uploaded_to_a_repository_and_imported_again(hub, make_run, tmp_path):
    run_dir, out = make_run(), tmp_path / "out"
    done = bst(hub, tmp_path / "home", "export", run_dir, out, "--push", "me/model", "--private")
    assert done.returncode == 0, done.stderr
    assert f"uploaded to http://127.0.0.1:{hub.server_port}/me/model" in done.stdout
    assert hub.private == {"me/model": True}
    there = hub.repositories["me/model"]
    assert {path.name: path.read_bytes() for path in out.iterdir()}.items() <= there.items()
    assert b'from_pretrained("me/model", trust_remote_code=True)' in there["README.md"]

    done = bst(hub, tmp_path / "other", "import", "me/model", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    (weights,) = (tmp_path / "back" / "checkpoints").glob("*/weights-*")
    (own,) = (run_dir / "checkpoints").glob("*/weights-*")
    from safetensors.torch import load_file

    for name, tensor in load_file(own).items():
        assert load_file(weights)[name].equal(tensor)

    there["model.safetensors"] = there["model.safetensors"][:-1] + b"x"
    done = bst(hub, tmp_path / "third", "import", "me/model", tmp_path / "damaged")
    assert done.returncode == 2
    assert "model.safetensors: changed since the export" in done.stderr
    assert not (tmp_path / "damaged").exists()


@pytest.mark.ranks
def test_a_later_export_replaces_the_files_of_earlier_ones(hub, make_run, tmp_path):
    """transformers would load the older model.safetensors in place of new weights in several files."""
    run_dir = make_run()
    there = hub.repositories["me/model"] = {
        "model.safetensors": b"old, and missing in SHA256SUMS",
        "hub_older.py": b"",
        "SHA256SUMS": f"{hashlib.sha256(b'').hexdigest()}  hub_older.py\n".encode(),
        "README.md": b"edited",
        "LICENSE": b"mine",
        "adapter/adapter_model.safetensors": b"mine",
        ".gitattributes": b"*.safetensors filter=lfs",
    }
    hub.private["me/model"] = False
    mine = {name: there[name] for name in ("LICENSE", "adapter/adapter_model.safetensors", ".gitattributes")}
    out = tmp_path / "out"
    done = bst(hub, tmp_path / "home", "export", run_dir, out, "--push", "me/model", "--file-size", "3000")
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors.index.json").exists()
    assert there == {path.name: path.read_bytes() for path in out.iterdir()} | mine

    done = bst(hub, tmp_path / "home", "export", run_dir, tmp_path / "one", "--push", "me/model")
    assert done.returncode == 0, done.stderr
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} | mine


@pytest.mark.ranks
def test_a_private_export_is_not_uploaded_to_a_public_repository(hub, make_run, tmp_path):
    run_dir, home = make_run(), tmp_path / "home"
    hub.repositories["me/model"], hub.private["me/model"] = {}, False
    done = bst(hub, home, "export", run_dir, tmp_path / "a", "--push", "me/model", "--private")
    assert done.returncode == 2
    assert "me/model: not uploaded: it exists, and is public: make it private in its settings" in done.stderr
    assert hub.repositories["me/model"] == {}
    hub.private["me/model"] = True
    done = bst(hub, home, "export", run_dir, tmp_path / "b", "--push", "me/model", "--private")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.repositories["me/model"]


def test_invalid_hub_options_are_refused_in_one_line(make_run, tmp_path, capsys):
    run_dir = make_run()
    for words, said in (
        (["export", run_dir, tmp_path / "a", "--push", "model"], "model: not the id of a repository, OWNER/NAME"),
        (["export", run_dir, tmp_path / "a", "--private"], "--private means nothing without --push"),
        (["import", "nowhere", tmp_path / "b"], "nowhere: no such directory, and not the id of a repository"),
        (["import", run_dir, tmp_path / "b", "--revision", "main"], "--revision main is of a repository"),
    ):
        assert main(list(map(str, words))) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.ranks
def test_errors_of_the_hub_are_reported(hub, make_run, tmp_path):
    run_dir, home = make_run(), tmp_path / "home"
    for words, said in (
        (["export", run_dir, tmp_path / "a", "--push", "me/a b"], "me/a b: "),
        (["import", "me/none", tmp_path / "b"], "me/none: no such directory, and not downloaded as a repository: "),
    ):
        done = bst(hub, home, *words)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "a").exists()
    done = bst(hub, home, "export", run_dir, tmp_path / "a", "--push", "me/model", token="hf_wrong")
    assert done.returncode == 2
    assert "me/model: not uploaded: " in done.stderr
    assert f"{tmp_path / 'a'} is whole: upload it with `hf upload me/model {tmp_path / 'a'}`" in done.stderr
    assert (tmp_path / "a" / "model.safetensors").exists()
