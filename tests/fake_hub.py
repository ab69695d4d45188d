"""A small stand-in for the Hugging Face Hub, on this machine, for tests that read from it or push to it.

It serves folders: `ROOT/models/gpt2/…` is the model `gpt2`, `ROOT/datasets/nlphuji/flickr30k/…` the dataset of that
name, both at the revision `main`. Another revision is the same folder name with `@` and the revision, its slashes
written as underscores: `flickr30k@refs_convert_parquet`. What is pushed is written into the folders, so a test looks at
the result on disk. Any token is accepted; nothing is stored as LFS.

huggingface_hub reads its settings once, when it is imported: give `hub_environment(url, home)` to a fresh process.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>.+?)"
    r"(?:/(?P<action>revision|tree|paths-info|preupload|commit)/(?P<rest>.+))?"
)
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """The environment of a process that takes `url` for the Hub and keeps its caches in the empty folder `home`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    return environment | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_any",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@contextmanager
def start_fake_hub(root: Path) -> Iterator[str]:
    """Serve the folder `root` as a Hub while the block runs; gives the Hub's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": Path(root)}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if found := FILE.fullmatch(path):
            folder = self._folder(found["kind"] or "models", found["repo"], found["revision"])
            return self._file(folder, unquote(found["path"]))
        if found := API.fullmatch(path):
            revision, _, inside = (found["rest"] or "main").partition("/")
            folder = self._folder(found["kind"], found["repo"], revision)
            if folder is None:
                return self._missing("RevisionNotFound" if found["action"] else "RepoNotFound")
            if found["action"] == "tree":
                inside = unquote(inside)
                if inside and not (folder / inside).is_dir():
                    return self._missing("EntryNotFound")
                return self._json(_tree(folder, inside, recursive="recursive=true" in self.path.lower()))
            return self._json(_info(found["kind"], unquote(found["repo"]), folder))
        self._missing("EntryNotFound")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self._chunk, b""))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            kind = f"{asked.get('type') or 'model'}s"
            (self.root / kind / name).mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        found = API.fullmatch(path)
        if not found or not found["action"]:
            return self._missing("EntryNotFound")
        revision, _, _ = found["rest"].partition("/")
        folder = self._folder(found["kind"], found["repo"], revision)
        if folder is None:
            return self._missing("RepoNotFound")
        if found["action"] == "paths-info":
            wanted = json.loads(body)["paths"]
            return self._json([entry for entry in _tree(folder, "", recursive=True) if entry["path"] in wanted])
        if found["action"] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        for line in body.splitlines():
            step = json.loads(line)
            if step["key"] == "file":
                target = folder / step["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(step["value"]["content"]))
            elif step["key"] == "deletedFile":
                (folder / step["value"]["path"]).unlink(missing_ok=True)
        commit = _commit(folder)
        self._json({"commitUrl": f"http://{self.headers['Host']}/{found['repo']}/commit/{commit}", "commitOid": commit})

    def _folder(self, kind: str, repo: str, revision: str) -> Path | None:
        """The folder of a repository at a revision, which may also be the commit that stands for one."""
        base = self.root / kind.strip("/") / unquote(repo)
        revision = unquote(revision)
        if re.fullmatch("[0-9a-f]{40}", revision):
            folders = [base, *base.parent.glob(f"{base.name}@*")]
            return next((folder for folder in folders if folder.is_dir() and _commit(folder) == revision), None)
        folder = base if revision == "main" else base.with_name(f"{base.name}@{revision.replace('/', '_')}")
        return folder if folder.is_dir() else None

    def _file(self, folder: Path | None, path: str) -> None:
        if folder is None:
            return self._missing("RepoNotFound")
        if not (folder / path).is_file():
            return self._missing("EntryNotFound", {"X-Repo-Commit": _commit(folder)})
        content = (folder / path).read_bytes()
        self._answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": _commit(folder)})

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    def log_message(self, format: str, *args: object) -> None:
        if os.environ.get("FAKE_HUB_LOG"):
            super().log_message(format, *args)


def _tree(folder: Path, inside: str, recursive: bool) -> list[dict]:
    found = sorted((folder / inside).rglob("*") if recursive else (folder / inside).iterdir())
    return [
        {
            "type": "directory" if path.is_dir() else "file",
            "path": path.relative_to(folder).as_posix(),
            "oid": hashlib.sha1(str(path).encode()).hexdigest(),
            "size": 0 if path.is_dir() else path.stat().st_size,
        }
        for path in found
    ]


def _commit(folder: Path) -> str:
    """40 hexadecimal digits that change when a file is written."""
    state = [(str(path), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
    return hashlib.sha1(repr((str(folder), state)).encode()).hexdigest()


def _info(kind: str, repo: str, folder: Path) -> dict:
    files = [{"rfilename": path.relative_to(folder).as_posix()} for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "id": repo,
        "modelId": repo,
        "sha": _commit(folder),
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": files,
        "lastModified": "2024-01-01T00:00:00.000Z",
    }
