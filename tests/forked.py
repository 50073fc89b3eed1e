"""Processes that begin with experiment.py imported: forks of one that imported it once.

Else they are processes of their own. What is read while Python or a library starts (their settings,
the place in a torchrun) is as it was when the first one began. wandb shares a temporary folder that
the first to end removes: with it, start a process instead.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Forked:
    """`run` gives what subprocess.run gives, several at a time if need be."""

    def __init__(self, **environment):
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is pytest's
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment})
        self.lock = threading.Lock()
        atexit.register(self.close)

    def run(self, code, folder, environment, limit=600):
        """Python's `code` in `folder` with exactly this environment."""
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            asked = {"code": code, "folder": str(folder), "environment": environment,
                     "place": scratch}
            with self.lock:
                self.server.stdin.write(json.dumps(asked) + "\n")
                self.server.stdin.flush()
            end = time.monotonic() + limit
            while not (place / "status").exists():
                if time.monotonic() > end or self.server.poll() is not None:
                    raise TimeoutError((place / "stderr").read_text()[-3000:])
                time.sleep(0.01)
            return subprocess.CompletedProcess(
                code, int((place / "status").read_text()), (place / "stdout").read_text(),
                (place / "stderr").read_text())

    def close(self):
        if self.server.poll() is None:
            self.server.stdin.close()
            self.server.wait(10)


def detached():
    """True in a new process, for which the old one need not wait; False in the old one."""
    if child := os.fork():
        os.waitpid(child, 0)
        return False
    if os.fork():
        os._exit(0)
    return True


def serve():
    """The code to run, in a process of its own; nothing in the first one, at the end."""
    for line in sys.stdin:
        asked = json.loads(line)
        if not detached():
            continue
        place = Path(asked["place"])
        if worker := os.fork():
            _, status = os.waitpid(worker, 0)
            (place / "part").write_text(str(os.waitstatus_to_exitcode(status)))
            (place / "part").rename(place / "status")
            os._exit(0)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        for number, name in enumerate((os.devnull, place / "stdout", place / "stderr")):
            handle = os.open(name, os.O_RDWR | os.O_CREAT)
            os.dup2(handle, number)
            os.close(handle)
        return asked["code"]
    return ""


if __name__ == "__main__":
    import experiment  # noqa: F401 - what all the others begin with

    exec(serve())
