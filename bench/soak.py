"""Kill a real run again and again, and compare what it ends with to an uninterrupted run's.

    python bench/soak.py [--kills 20] [--seed 0] [--folder DIR]

Runs `experiment.py --out_dir=run_1` at smoke budget on the stand-in. One copy is left alone; the
other is killed (SIGKILL) at random times, and at random writes of files, its run folder is deleted
now and then, and it is started again with the same command until the kills are used up. Both
must end with the same bytes: weights, curves, results but for their times. Exit code 1 if not.
SAE_CACHE_DIR, if set, gives the downloads. What was done is kept in --folder: the soak itself may
be stopped and continued.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("timing", "datetime_epoch_millis")


class Study:
    """A folder with a run and a cache of its own."""

    def __init__(self, folder: Path, downloads: Path | None):
        self.folder, self.cache, self.run_folder = folder, folder / "cache", folder / "run_1"
        self.done = folder / "done.txt"  # a line a kill
        if not self.done.exists():
            self.fresh(downloads)
            self.done.touch()

    def fresh(self, downloads: Path | None) -> None:
        """Nothing here but the downloads, so that everything else is computed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.cache.mkdir(parents=True)
        for path in downloads.iterdir() if downloads else ():
            if path.name == "wheels" or path.name.startswith("model-") and path.is_dir():
                shutil.copytree(path, self.cache / path.name)

    def start(self) -> subprocess.Popen:
        settings = {"SAE_BUDGET": "smoke", "SAE_SUBSTRATE": "standin", "WANDB_MODE": "disabled",
                    "SAE_CACHE_DIR": str(self.cache)}
        command = [sys.executable, ROOT / "experiment.py", "--out_dir=run_1"]
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env={**os.environ, **settings},
                                    stdout=log, stderr=log)

    def finish(self) -> None:
        if code := self.start().wait():
            sys.exit(f"exit code {code}: {(self.folder / 'log.txt').read_text()[-2000:]}")

    def writing(self) -> list[Path]:
        """Files that are being written right now."""
        return [path for top in (self.cache, self.run_folder) for path in top.rglob("*.part")]

    def kill(self, rng: random.Random) -> str | None:
        """Start, kill at a random moment, say where; None if the run was finished before."""
        at_write, delay = rng.random() < 0.5, rng.uniform(3, 40)
        before, process, start = set(self.writing()), self.start(), time.monotonic()
        while process.poll() is None:
            fresh = [path for path in self.writing() if path not in before] if at_write else []
            if fresh and rng.random() < 0.3 or time.monotonic() - start > delay:
                process.kill()
                process.wait()
                place = f"writing {fresh[0].name}" if fresh else "at a random time"
                return f"{time.monotonic() - start:.1f} s, {place}"
            before.update(fresh)
            time.sleep(0.001 if at_write else 0.05)
        if process.returncode:
            sys.exit(f"exit code {process.returncode}, see {self.folder / 'log.txt'}")
        return None

    def contents(self) -> dict[str, bytes]:
        """Every file of the run folder, results without their times, by path."""
        found = {}
        for path in sorted(self.run_folder.rglob("*")):
            if path.is_file() and path.suffix != ".part":
                found[str(path.relative_to(self.run_folder))] = path.read_bytes()
        info = json.loads(found["final_info.json"])
        for key in TIMES:
            del info[key]
        return {**found, "final_info.json": json.dumps(info).encode()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps the uninterrupted run for the next time")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    downloads = os.environ.get("SAE_CACHE_DIR")
    whole = Study(folder / "whole", Path(downloads) if downloads else None)
    if not (whole.run_folder / "final_info.json").exists():
        whole.finish()
    killed = Study(folder / f"killed_{options.seed}", whole.cache)
    while (kills := len(killed.done.read_text().splitlines())) < options.kills:
        rng = random.Random(f"{options.seed}-{kills}-{time.time()}")
        if (place := killed.kill(rng)) is None:
            shutil.rmtree(killed.cache / "standin")  # finished: begin again
            continue
        if delete := rng.random() < 0.3 and killed.run_folder.exists():
            shutil.rmtree(killed.run_folder)
        line = f"kill {kills + 1}: after {place}{'; run folder deleted' if delete else ''}"
        print(line, flush=True)
        with open(killed.done, "a") as file:
            file.write(line + "\n")
    killed.finish()
    ours, theirs = whole.contents(), killed.contents()
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    deleted = killed.done.read_text().count("deleted")
    print(f"{kills} kills, run folder deleted {deleted} times; {len(ours)} files compared; "
          f"differing: {', '.join(differing) or 'none'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
