"""The main job with a tiny random model and texts in local files: every phase, in seconds.

    python tests/small.py FOLDER EVENT CALL OF --out_dir=run_1

FOLDER is what `local_hub` made. At the CALL-th call of the function OF (such as
`experiment.CustomTrainer.step`, in the module that uses it) EVENT happens: a signal by its name, or
`vanish`, which removes the cache. OF may be `never`, or `write:PART`: then the calls are writes of
files with PART in their path, and EVENT happens in the middle of one. Under torchrun it happens to
the process SMALL_RANK. SMALL_ROW, in JSON, changes the row.
"""

import functools
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import torch
import transformers
from forked import Forked
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import experiment as ex
from lab.evaluations import unlearning
from lab.substrates.pythia import Pythia
from lab.substrates.texts import Sizes

TINY = dict(
    expansion=2, steps=24, batch_size=256, warmup_steps=4, n_seeds=2, regroup_every=6,
    resample_every=6, checkpoint_every=6, log_every=3, target_l0=10.0,
)
TINY_SIZES = Sizes(
    learn_tokens=6_000, frequency_tokens=1_000, heldout_contexts=8, frontier_contexts=2,
    guard_contexts=4, question_candidates=8, questions=3, probe_train=40, probe_test=20,
)
WIDTH = 128  # D of the tiny model
THREADS = 1  # of torch: on tensors so small, several wait for each other most of the time
SECRETS = {"WANDB_API_KEY": "5ec7e7" + "0" * 34, "HF_TOKEN": "hf_5ec7e7",
           "AWS_SECRET_ACCESS_KEY": "5ec7e7/aws"}
TIMES = ("timing", "datetime_epoch_millis")  # differ between equal results


def paragraphs(numbers, things=("church", "bridge", "tower", "school")):
    return [{"text": f" The {things[i % 4]} of the old town stood by the river until {i}, when the "
                     "council took it down and built a market there ."} for i in numbers]


def history(numbers, subject):
    return [{"question": f"In which century was treaty {i} signed?", "subject": subject,
             "choices": ("first", "tenth", "last", "later"), "answer": i % 4} for i in numbers]


def news(numbers):
    return [{"text": f"News item {i} about topic {i % 4} and what it means today", "label": i % 4}
            for i in numbers]


def rows():
    """Rows of every data set that is there, by its name and split."""
    parts = ("the wall", "the mitochondrion", "water", "salt")
    work = ("holds it together", "turns sugar into energy", "fills it", "keeps it wet")
    return {
        ("Salesforce/wikitext", "train"): paragraphs(range(240)),
        ("Salesforce/wikitext", "test"): paragraphs(range(240, 480)),
        ("cais/wmdp", "test"): [
            {"question": f"Which part of the cell number {i} {work[i % 4]}?", "choices": parts,
             "answer": i % 4} for i in range(120)],
        ("cais/wmdp-corpora", "train"): paragraphs(range(240), ("cell", "gene", "leaf", "root")),
        ("cais/mmlu", "test"): [*history(range(80), "human_aging"),
                                *history(range(80, 160), "world_religions"),
                                *history(range(160, 170), "virology")],
        ("fancyzhx/ag_news", "train"): news(range(400)),
        ("fancyzhx/ag_news", "test"): news(range(400, 600)),
    }


def data_file(folder, name, split):
    return folder / f"{name.replace('/', '_')}-{split}.jsonl"


def local_hub(folder):
    """A model, a tokenizer and rows for every data set, all in local files."""
    for place, items in rows().items():
        data_file(folder, *place).write_text("".join(json.dumps(item) + "\n" for item in items))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator([str(items) for items in rows().values()], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    config = transformers.GPTNeoXConfig(
        vocab_size=400, hidden_size=WIDTH, num_hidden_layers=5, num_attention_heads=4,
        intermediate_size=256)
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config)
    model.save_pretrained(folder / "model")
    wrapped.save_pretrained(folder / "model")


def load_local(folder):
    """`datasets.load_dataset` for the files in `folder` alone."""
    load = datasets.load_dataset

    def load_dataset(path, split, streaming=False, **_):
        file = data_file(folder, path, split)
        if not file.exists():
            raise FileNotFoundError(f"no {path} here")
        return load("json", data_files=str(file), split="train", streaming=streaming)

    return load_dataset


def prepare(folder, patch=setattr):
    """Pythia's code on the model and texts in `folder`, at a tiny budget."""
    for owner, name, value in (
        (datasets, "load_dataset", load_local(folder)),
        (Pythia, "model_name", str(folder / "model")),
        (Pythia, "loadable_name", str(folder / "model")),
        (Pythia, "revisions", {**Pythia.revisions, str(folder / "model"): "main"}),
        (Pythia, "commit", lambda self, path: self.commits.setdefault(path, "main")),
        (Pythia, "d_in", WIDTH),
        (Pythia, "check", lambda self: None),
        (Pythia, "fetch", lambda self: None),
        (ex, "BUDGETS", {"smoke": {**TINY, **json.loads(os.environ.get("SMALL_ROW", "{}"))}}),
        (ex, "SIZES", {"smoke": TINY_SIZES}),
        (unlearning, "MULTIPLIERS", (2.0, 8.0)),
        (unlearning, "THRESHOLDS", (0.01, 0.9)),
    ):
        patch(owner, name, value)


def inherited():
    """The environment, without the wandb service that a job in this process has left behind."""
    return {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}


def surroundings(folder, **environment):
    """The environment of a job in `folder`."""
    return {**inherited(), "SAE_SUBSTRATE": "pythia", "SAE_BUDGET": "smoke",
            "SAE_CACHE_DIR": str(folder / "cache"), "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": str(THREADS), **environment}


def started(hub, folder, event="x", call=0, of="never", launcher=(), streams=None, **environment):
    """The job by its command, with `folder` as the working directory.

    `launcher` comes before the script's name, after Python's; `streams` are options of
    subprocess.run in place of `capture_output`.
    """
    return subprocess.run(
        [sys.executable, *launcher, __file__, str(hub), event, str(call), of, "--out_dir=run_1"],
        cwd=folder, env=surroundings(folder, **environment), text=True, timeout=600,
        **(streams or dict(capture_output=True)))


@functools.cache
def processes():
    return Forked(OMP_NUM_THREADS=str(THREADS))


def child(hub, folder, event="x", call=0, of="never", **environment):
    """The same in a process that need not import everything first."""
    arguments = [str(hub), event, str(call), of, "--out_dir=run_1"]
    return processes().run(f"import small\nsys.exit(small.main({arguments}))", folder,
                           surroundings(folder, **environment))


def contents(folder):
    """Every file of a run folder by path, results without their times."""
    files = {str(path.relative_to(folder)): path.read_bytes()
             for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".part"}
    info = json.loads(files["final_info.json"])
    files["final_info.json"] = {key: part for key, part in info.items() if key not in TIMES}
    return files


def happen(event):
    if event == "vanish":
        shutil.rmtree(os.environ["SAE_CACHE_DIR"])
    elif event == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    else:  # a moment later, so that it comes in the middle of something
        number = getattr(signal, event)
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def at_call(event, call, of, patch=setattr):
    """Let `event` happen at the `call`-th call of the function, or write, that `of` names."""
    part = of.removeprefix("write:") if of.startswith("write:") else ""
    path, _, name = ("os.fsync" if part else of).rpartition(".")
    owner = pkgutil.resolve_name(path)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def counted(*arguments, **options):
        nonlocal calls
        if part in (os.readlink(f"/proc/self/fd/{arguments[0]}") if part else ""):
            calls += 1
            if calls == call:
                happen(event)
        return function(*arguments, **options)

    patch(owner, name, counted)


def main(arguments):
    """The job; returns its exit code."""
    hub, event, call, of, *arguments = arguments
    prepare(Path(hub))
    if of != "never" and os.environ.get("RANK", "0") == os.environ.get("SMALL_RANK", "0"):
        at_call(event, int(call), of)
    return ex.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
