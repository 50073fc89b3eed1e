"""The real main job on the stand-in at smoke budget, by its command."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3600  # seconds


class MainJob:
    """A run in a folder; `wait` gives the exit code, what it printed is in its files."""

    def __init__(self, folder, out_dir, **environment):
        self.folder, self.stdout, self.stderr = folder, folder / "stdout", folder / "stderr"
        settings = {"SAE_BUDGET": "smoke", "SAE_SUBSTRATE": "standin", "WANDB_MODE": "offline"}
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "experiment.py", f"--out_dir={out_dir}"], cwd=folder,
                env={**os.environ, **settings, **environment}, stdout=out, stderr=err)

    def wait(self):
        return self.process.wait(LIMIT)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.wait()
