"""The main job with a tiny random model and texts in local files: every phase, in seconds.

    python tests/small.py FOLDER EVENT CALL OF --out_dir=run_1

FOLDER is what `test_main.local_hub` made. At the CALL-th call of the function OF (a name in
experiment.py, or `os.fsync`, which every file that is written goes through) EVENT happens: a
signal by its name, or `vanish`, which removes the cache. OF may be `never`.
"""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import experiment as ex

TINY = dict(
    expansion=2, steps=24, batch_size=256, warmup_steps=4, n_seeds=2, learn_tokens=6_000,
    regroup_every=6, resample_every=6, checkpoint_every=6, log_every=3, frequency_tokens=1_000,
    target_l0=10.0, heldout_contexts=8, frontier_contexts=2, question_candidates=8, questions=3,
    probe_train=40, probe_test=20,
)


def load_local(folder):
    """`datasets.load_dataset` for the files in `folder` alone."""
    load = ex.datasets.load_dataset

    def load_dataset(path, config=None, split=None, revision=None, streaming=False):
        file = folder / f"{path.replace('/', '_')}.jsonl"
        if not file.exists():
            raise FileNotFoundError(f"no {path} here")
        return load("json", data_files=str(file), split="train", streaming=streaming)

    return load_dataset


def prepare(folder, patch=setattr):
    """Pythia's code on the model and texts in `folder`, at a tiny budget."""
    for owner, name, value in (
        (ex.datasets, "load_dataset", load_local(folder)),
        (ex.Pythia, "model_name", str(folder / "model")),
        (ex.Pythia, "revisions", {str(folder / "model"): "main"}),
        (ex.Pythia, "available", lambda self: None),
        (ex.Pythia, "fetch", lambda self: None),
        (ex, "BUDGETS", {"smoke": TINY}),
        (ex, "MULTIPLIERS", (2.0, 8.0)),
        (ex, "THRESHOLDS", (0.01, 0.9)),
    ):
        patch(owner, name, value)


def happen(event):
    if event == "vanish":
        shutil.rmtree(os.environ["SAE_CACHE_DIR"])
    elif event == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    else:  # a moment later, so that it comes in the middle of something
        number = getattr(signal, event)
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def at_call(event, call, of, patch=setattr):
    """Let `event` happen at the `call`-th call of the function named `of`."""
    owner, calls = ex, 0
    *path, name = of.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            happen(event)
        return function(*arguments, **options)

    patch(owner, name, counted)


if __name__ == "__main__":
    hub, event, call, of, *arguments = sys.argv[1:]
    prepare(Path(hub))
    if of != "never":
        at_call(event, int(call), of)
    sys.exit(ex.main(arguments))
