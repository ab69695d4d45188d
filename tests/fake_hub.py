"""A small stand-in for the Hugging Face Hub, on this machine, for tests that read from it or push to it.

It serves folders: `ROOT/models/gpt2/…` is the model `gpt2`, `ROOT/datasets/nlphuji/flickr30k/…` the dataset of that
name, both at the revision `main`. Another revision is the same folder name with `@` and the revision, its slashes
written as underscores: `flickr30k@refs_convert_parquet`. What is pushed is written into the folders, so a test looks at
the result on disk: small texts within a commit, all else by the way of large files. Any token is accepted. The metadata
of a card are held against the rules of the Hub that its documentation and its messages tell.

huggingface_hub reads its settings once, when it is imported: give `hub_environment(url, home)` to a fresh process.
"""

import base64
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>.+?)"
    r"(?:/(?P<action>revision|tree|paths-info|preupload|commit|branch)/(?P<rest>.+))?"
)
LARGE = re.compile(r"/(?:datasets/)?.+\.git/info/lfs/objects/batch")
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
            wrong = [{"message": fault} for fault in faults_of_card(json.loads(body)["content"])]
            return self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        if LARGE.fullmatch(path):
            objects = json.loads(body)["objects"]
            return self._json({"transfer": "basic", "objects": [self._large(**large) for large in objects]})
        found = API.fullmatch(path)
        if not found or not found["action"]:
            return self._missing("EntryNotFound")
        revision, _, _ = found["rest"].partition("/")
        if found["action"] == "branch":
            main, branch = self._folder(found["kind"], found["repo"], "main"), unquote(revision).replace("/", "_")
            if main.with_name(f"{main.name}@{branch}").exists():
                return self._json({}, 409)
            shutil.copytree(main, main.with_name(f"{main.name}@{branch}"))
            return self._json({})
        folder = self._folder(found["kind"], found["repo"], revision)
        if folder is None:
            main = self._folder(found["kind"], found["repo"], "main")
            return self._missing("RepoNotFound" if main is None else "RevisionNotFound")
        if found["action"] == "paths-info":
            wanted = json.loads(body)["paths"]
            return self._json([entry for entry in _tree(folder, "", recursive=True) if entry["path"] in wanted])
        if found["action"] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "regular" if file["path"].endswith(TEXTS) else "lfs",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        for line in body.splitlines():
            step = json.loads(line)
            if step["key"] == "file":
                target = folder / step["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(step["value"]["content"]))
            elif step["key"] == "lfsFile":
                target = folder / step["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / "large" / step["value"]["oid"], target)
            elif step["key"] == "deletedFile":
                (folder / step["value"]["path"]).unlink(missing_ok=True)
        commit = _commit(folder)
        self._json({"commitUrl": f"http://{self.headers['Host']}/{found['repo']}/commit/{commit}", "commitOid": commit})

    def do_PUT(self):
        """A large file, under the digest of its content."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = urlsplit(self.path).path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == name
        (self.root / "large").mkdir(exist_ok=True)
        (self.root / "large" / name).write_bytes(content)
        self._answer(200, b"", {})

    def _large(self, oid: str, size: int) -> dict[str, Any]:
        """Where a large file is to be put; nowhere, if it is there."""
        if (self.root / "large" / oid).is_file():
            return {"oid": oid, "size": size}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"http://{self.headers['Host']}/large/{oid}"}}}

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

    def _json(self, content: object, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

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


TEXTS = (".json", ".md", ".py", ".jinja", ".txt", ".yaml")
LICENCES = {
    "apache-2.0", "mit", "openrail", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0", "llama2",
    "llama3.2", "gemma", "unknown", "other",
}  # fmt: skip
NAME = re.compile(r"(?:[\w-]+/)?[\w\-.]+")
METADATA = re.compile(r"\A\s*---[^\S\r\n]*\r?\n(.*?\r?\n)---", re.DOTALL)


def faults_of_card(content: str) -> list[str]:
    """What the Hub would refuse of a card's metadata; its rules as far as they are known, a part of the licences."""
    if (block := METADATA.match(content)) is None:
        return []
    data = yaml.safe_load(block[1])
    if not isinstance(data, dict):
        return ["metadata should be an object"]
    wrong = []
    for key in ("base_model", "datasets", "tags", "license", "metrics", "language"):
        values = data.get(key, [])
        values = values if isinstance(values, list) else [values]
        wrong += [f'"{key}" has {value!r}, no text' for value in values if not isinstance(value, str) or not value]
        if key in ("base_model", "datasets"):
            wrong += [f'"{key}" has {value!r}, no name' for value in values if not NAME.fullmatch(str(value))]
        if key == "license":
            wrong += [f'"license" has {value!r}, none of the list' for value in values if value not in LICENCES]
    for key in ("library_name", "pipeline_tag", "license_name", "base_model_relation"):
        if key in data and not re.fullmatch(r"[\w\-.]+", str(data[key])):
            wrong.append(f'"{key}" is {data[key]!r}')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            wrong.append('"model-index" has no name or no results')
        for result in model.get("results", []):
            found = result.get("dataset", {})
            if not isinstance(result.get("task", {}).get("type"), str) or not isinstance(found.get("name"), str):
                wrong.append('"model-index" has a result without a task or the name of a data set')
            if not NAME.fullmatch(str(found.get("type", ""))):
                wrong.append(f'"model-index" has the data set {found.get("type")!r}')
            for key in ("config", "split", "revision"):
                if not isinstance(found.get(key, ""), str):
                    wrong.append(f'"model-index" has {key} {found[key]!r}')
            for metric in result.get("metrics", []):
                value = metric.get("value")
                if not isinstance(metric.get("type"), str) or value is None:
                    wrong.append(f'"model-index" has the metric {metric!r}')
                if isinstance(value, float) and not math.isfinite(value):
                    wrong.append(f'"model-index" has the value {value}')
    return wrong


def told_in(folder: Path, words: list[str]) -> Iterator[str]:
    """Where words stand in a folder: in names, or in what files hold."""
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        yield from (f"{word}: the name {name}" for word in words if word in name)
        if file.is_file():
            yield from held_in(file, words)


def held_in(file: Path, words: list[str]) -> Iterator[str]:
    """Where words stand in the bytes of a file and of what is packed in it."""
    for place, content in _contents(file):
        for form in ("utf-8", "utf-16-le"):
            yield from (f"{word}: {file}, {place}" for word in words if word.encode(form) in content)


def _contents(file: Path) -> Iterator[tuple[str, bytes]]:
    content = file.read_bytes()
    yield "itself", content
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            yield from ((name, packed.read(name)) for name in packed.namelist())
    if content.startswith(b"\x1f\x8b"):
        yield "unpacked", gzip.decompress(content)


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
