"""A loopback Hugging Face Hub: as much of its HTTP interface as its clients use here.

It serves repositories from memory on 127.0.0.1, each at one commit, and can be told to fail. What
it answers was taken from what huggingface_hub, transformers and datasets ask for and read.
"""

import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests ("GET /path") that `pattern` is found in, how many times."""

    pattern: str
    kind: str  # a status such as "429" | gated | absent | stall | hang up | cut | short | broken
    times: int = 1_000_000

    def hits(self, request):
        found = self.times > 0 and re.search(self.pattern, request) is not None
        self.times -= found
        return found


@dataclasses.dataclass
class Repository:
    files: dict[str, bytes]
    commit: str
    branch: str = "main"


def linked(content):
    """Whether the Hub would keep a file in its large file storage."""
    return len(content) > 1_000_000


def blob(content):
    """The id of a file: git's for a small one, SHA-256 for a large one."""
    if linked(content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; `with Hub() as hub` runs it, `hub.faults` and `hub.requests` may be changed."""

    daemon_threads = True
    patience = 30.0  # seconds that a stalled answer takes: longer than any client here waits

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[tuple[str, str], list[Repository]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.closing = threading.Event()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, kind, name, files, commit=None, branch="main"):
        """A repository (`kind` is models or datasets) whose branch and commit hold `files`."""
        commit = commit or hashlib.sha1(f"{kind}/{name}/{branch}".encode()).hexdigest()
        self.repositories.setdefault((kind, name), []).append(Repository(files, commit, branch))

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests, not news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        request = f"{self.command} {unquote(self.path)}"
        self.server.requests.append(request)
        fault = next((f.kind for f in self.server.faults if f.hits(request)), "")
        if fault == "hang up":
            self.close_connection = True
        elif fault == "stall":
            self.server.closing.wait(self.server.patience)
            self.close_connection = True
        elif fault == "gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif fault == "absent":
            self.missing("RepoNotFound")
        elif fault.isdigit():
            self.answer(int(fault), b"the fault that was asked for", {"Retry-After": "0"})
        else:
            self.route(fault)

    do_HEAD = do_GET  # noqa: N815

    def route(self, fault):
        url = urlsplit(self.path)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)/([^/]+)/?(.*))?",
                           url.path)
        file = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path)
        if not (api or file):
            self.answer(404, b"")
            return
        if file:
            kind, name, revision, path = file[1] or "models", file[2], file[3], unquote(file[4])
        else:
            kind, name, revision, path = api[1], api[2], api[4] or "main", unquote(api[5] or "")
        repositories = self.server.repositories.get((kind, name))
        if not repositories:
            self.missing("RepoNotFound")
            return
        wanted = unquote(revision)
        found = next((r for r in repositories if wanted in (r.branch, r.commit)), None)
        if found is None:
            self.missing("RevisionNotFound")
        elif file:
            self.send_file(found, path, fault)
        elif api[3] == "tree":
            recursive = parse_qs(url.query).get("recursive") in (["True"], ["true"])
            self.send_tree(found, path, recursive)
        else:
            siblings = [{"rfilename": path} for path in found.files]
            self.send_json({"id": name, "sha": found.commit, "private": False, "tags": [],
                            "downloads": 0, "likes": 0, "siblings": siblings})

    def send_tree(self, found, folder, recursive):
        start = f"{folder}/" if folder else ""
        inside = [path for path in found.files if path.startswith(start)]
        if not inside:
            self.missing("EntryNotFound", found)
            return
        folders = {start + path[len(start):].split("/")[0] for path in inside
                   if "/" in path[len(start):]}
        files = inside if recursive else [p for p in inside if "/" not in p[len(start):]]
        self.send_json(
            [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(),
              "size": 0} for path in sorted(folders)]
            + [entry(found, path) for path in files])

    def send_file(self, found, path, fault):
        content = found.files.get(path)
        if content is None:
            self.missing("EntryNotFound", found)
            return
        headers = {"X-Repo-Commit": found.commit, "ETag": f'"{blob(content)}"',
                   "Accept-Ranges": "bytes"}
        if linked(content):
            headers["X-Linked-ETag"] = headers["ETag"]
        if fault == "short":  # and says so: no length in the answer shows that the rest is missing
            content = content[: len(content) * 2 // 3]
        if fault == "broken":  # as it was put there
            content = content[:-8] + b"a fault."
        if "X-Linked-ETag" in headers:
            headers["X-Linked-Size"] = str(len(content))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, part = 200, content
        if asked:
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            if start >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status, part = 206, content[start:stop]
            end = start + len(part) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(status, part, headers, cut=fault == "cut")

    def send_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def missing(self, code, found=None):
        commit = {"X-Repo-Commit": found.commit} if found else {}
        self.answer(404, b"", {"X-Error-Code": code, **commit})

    def answer(self, status, content, headers=None, cut=False):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection |= cut


def entry(found, path):
    """What a listing says of a file."""
    content = found.files[path]
    about = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
    if linked(content):
        about["lfs"] = {"oid": blob(content), "size": len(content), "pointerSize": 134}
    return about
