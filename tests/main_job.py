"""The real main job on the stand-in at smoke budget, by its command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3600  # seconds


class MainJob:
    """A run in a folder; `wait` gives the exit code, what it printed is in its files.

    One that runs already, started by another process with the same folder, is not started again.
    """

    def __init__(self, folder, out_dir, **environment):
        self.folder, self.stdout, self.stderr = folder, folder / "stdout", folder / "stderr"
        self.code, self.process = folder / "code", None
        try:
            self.stdout.touch(exist_ok=False)
        except FileExistsError:
            return
        settings = {"SAE_BUDGET": "smoke", "SAE_SUBSTRATE": "standin", "WANDB_MODE": "offline"}
        command = '"$@" > stdout 2> stderr; echo $? > part; mv part code'
        self.process = subprocess.Popen(
            ["sh", "-c", command, "sh", sys.executable, ROOT / "experiment.py",
             f"--out_dir={out_dir}"], cwd=folder, start_new_session=True,
            env={**os.environ, **settings, **environment})

    def wait(self):
        end = time.monotonic() + LIMIT
        while not self.code.exists():
            assert time.monotonic() < end, f"the main job took more than {LIMIT} s"
            time.sleep(0.1)
        return int(self.code.read_text())

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()
