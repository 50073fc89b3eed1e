"""A wandb server on the loopback interface: it keeps what it is sent, or is broken in some way."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Run:
    """What the server knows of a run."""

    def __init__(self):
        self.history: list[str] = []
        self.config: dict = {}
        self.files: dict[str, bytes] = {}

    def rows(self):
        return [json.loads(line) for line in self.history]


class WandbServer(ThreadingHTTPServer):
    """`mode`: sound | error (500) | silent (no answer) | dies (silent once a run has begun)."""

    daemon_threads = True

    def __init__(self, mode="sound"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.runs, self.asked = mode, {}, 0
        self.environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}",
            "WANDB_API_KEY": "5ec7e7" + "0" * 34,
        }
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.server
        server.asked += 1
        if server.mode == "silent" or (server.mode == "dies" and server.runs):
            time.sleep(3600)
        if server.mode == "error":
            return self.answer(500, {})
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            return self.answer(200, {"data": self.graphql(operation, asked.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            run = server.runs[self.path.split("/")[-2]]
            sent = (json.loads(body).get("files") or {}).get("wandb-history.jsonl")
            if sent:
                run.history[sent["offset"] :] = sent["content"]
        elif self.path.startswith("/upload/"):
            _, _, name, file = self.path.split("/", 3)
            server.runs[name].files[file] = body
        return self.answer(200, {})

    do_PUT = do_GET = do_POST

    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def graphql(self, operation, asked):
        runs, project = self.server.runs, {"name": "p", "entity": {"name": "e"}}
        if operation == "RunResumeStatus":
            known = runs.get(asked["name"])
            bucket = known and {
                "id": "r", "name": asked["name"], "displayName": "", "summaryMetrics": "{}",
                "logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(known.history),
                "historyTail": json.dumps(known.history[-1:]), "eventsTail": "[]",
                "config": json.dumps(known.config), "tags": [], "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return {"model": {"id": "m", **project, "bucket": bucket}}
        if operation == "UpsertBucket":
            run = runs.setdefault(asked["name"], Run())
            run.config = json.loads(asked.get("config") or "null") or run.config
            run.name = asked.get("displayName") or getattr(run, "name", None)
            run.group = asked.get("groupName") or getattr(run, "group", None)
            run.project = getattr(run, "project", None) or asked.get("project")  # the first time
            bucket = {"id": "r", "name": asked["name"], "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": not run.history}}
        if operation == "CreateRunFiles":
            base = f"{self.server.environment['WANDB_BASE_URL']}/upload/{asked['run']}/"
            files = [{"name": name, "uploadUrl": base + name} for name in asked["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def log_message(self, *_):
        pass
