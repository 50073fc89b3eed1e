"""The main job with a tiny random model and texts in local files: every phase, in seconds.

    python tests/small.py FOLDER EVENT CALL OF --out_dir=run_1

FOLDER is what `local_hub` made. At the CALL-th call of the function OF (a name in
experiment.py, or `os.fsync`, which every file that is written goes through) EVENT happens: a
signal by its name, or `vanish`, which removes the cache. OF may be `never`. Under torchrun it
happens to the process SMALL_RANK.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import experiment as ex

TINY = dict(
    expansion=2, steps=24, batch_size=256, warmup_steps=4, n_seeds=2, learn_tokens=6_000,
    regroup_every=6, resample_every=6, checkpoint_every=6, log_every=3, frequency_tokens=1_000,
    target_l0=10.0, heldout_contexts=8, frontier_contexts=2, question_candidates=8, questions=3,
    probe_train=40, probe_test=20,
)


def local_hub(folder):
    """A model, a tokenizer and rows for every data set, all in local files."""
    rows = {
        "Salesforce/wikitext": [
            {
                "text": f" The {w} of the old town stood by the river until {i}, "
                "when the council took it down and built a market there ."
            }
            for i, w in enumerate(["church", "bridge", "tower", "school"] * 60)
        ],
        "cais/wmdp": [
            {
                "question": f"Which part of the cell number {i} turns sugar into energy?",
                "choices": ["the wall", "the mitochondrion", "water", "salt"],
                "answer": 1,
            }
            for i in range(120)
        ],
        "cais/mmlu": [
            {
                "question": f"In which century was treaty {i} signed?",
                "subject": "history",
                "choices": ["first", "tenth", "last", "none"],
                "answer": i % 4,
            }
            for i in range(20)
        ],
        "fancyzhx/ag_news": [
            {"text": f"News item {i} about topic {i % 4} and what it means today", "label": i % 4}
            for i in range(400)
        ],
    }
    for name, items in rows.items():
        path = folder / f"{name.replace('/', '_')}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator([str(items) for items in rows.values()], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )
    config = transformers.GPTNeoXConfig(
        vocab_size=400,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=256,
    )
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config)
    model.save_pretrained(folder / "model")
    wrapped.save_pretrained(folder / "model")


def load_local(folder):
    """`datasets.load_dataset` for the files in `folder` alone."""
    load = ex.datasets.load_dataset

    def load_dataset(path, streaming=False, **_):
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
        (ex.Pythia, "check", lambda self: None),
        (ex.Pythia, "fetch", lambda self: None),
        (ex, "BUDGETS", {"smoke": TINY}),
        (ex, "MULTIPLIERS", (2.0, 8.0)),
        (ex, "THRESHOLDS", (0.01, 0.9)),
    ):
        patch(owner, name, value)


def inherited():
    """The environment, without the wandb service that a job in this process has left behind."""
    return {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}


def child(hub, folder, event="x", call=0, of="never", **environment):
    """The job in a process of its own, with `folder` as the working directory."""
    environment = {
        "SAE_SUBSTRATE": "pythia",
        "SAE_BUDGET": "smoke",
        "SAE_CACHE_DIR": str(folder / "cache"),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **environment,
    }
    return subprocess.run(
        [sys.executable, __file__, str(hub), event, str(call), of, "--out_dir=run_1"],
        cwd=folder,
        env={**inherited(), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


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
    if of != "never" and os.environ.get("RANK", "0") == os.environ.get("SMALL_RANK", "0"):
        at_call(event, int(call), of)
    sys.exit(ex.main(arguments))
