"""The `pythia` substrate: Pythia-70M, WikiText, WMDP-bio and MMLU from the Hugging Face Hub."""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers
from torch import nn

from lab.console import UserError, duration, report
from lab.storage import Cache, digest, sha256_of
from lab.substrates.pythia_probes import NEWS, read_probe_sets
from lab.substrates.texts import (
    SIZES,
    Document,
    Question,
    Sizes,
    halved,
    is_about_options,
    laid_out,
    shuffled,
)


class HubRefusal(UserError):
    """The Hub is there and does not let this person read something."""


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """One line for whatever the Hub's clients raise: each version of theirs has its own kinds.

    Raises HubRefusal where the Hub answers 401 or 403, otherwise UserError.
    """
    try:
        yield
    except Exception as error:
        if status := refusal(error):
            raise HubRefusal(f"the Hugging Face Hub refuses {what} (status {status}); set HF_TOKEN "
                             "to the token of an account that may read it, or set "
                             "SAE_SUBSTRATE=standin") from error
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{what} cannot be had from the Hugging Face Hub or its cache "
                        f"({type(error).__name__}: {reason}); check network and HF_HOME") from error


def refusal(error: BaseException | None) -> int | None:
    """401 or 403 if the Hub answered that, to the error or to one that it was raised from."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return status
        error = error.__cause__ or error.__context__
    return None


DOMAINS = {"forget": ("WMDP-bio", "biology prose"),
           "retain": ("WikiText train", "WikiText test", "other MMLU subjects"),
           "news": ("news",), "mmlu": ("MMLU retain subjects",)}
LEARN = {  # part of a kind that is trained on; WikiText keeps its own split
    "WMDP-bio": 0.5, "biology prose": 1.0,
    "WikiText train": 1.0, "WikiText test": 0.0, "other MMLU subjects": 0.75,
    "news": 0.0, "MMLU retain subjects": 0.0,
}
RETAIN_SUBJECTS = ("high_school_us_history", "college_computer_science", "high_school_geography",
                   "human_aging")  # SAEBench's
BIOLOGY_SUBJECTS = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine",
                    "high_school_biology", "human_sexuality", "medical_genetics", "nutrition",
                    "professional_medicine", "virology")  # neither forget nor retain text
WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")
CHARACTERS = 6  # a token, more than there are: so that text for all tokens is read
PAPER = 6_000  # characters of a paper: much of biology rather than much of a few papers

MODEL_MEGABYTES = 168  # weights in half precision (166 MB) and tokenizer
TEXT_MEGABYTES = {  # of what is read: whole files, or the first block or two of large ones
    "cais/wmdp": 1,  # wmdp-bio, test
    "cais/wmdp-corpora": 35,  # the beginning of bio-retain-corpus
    "cais/mmlu": 4,  # all, test
    "Salesforce/wikitext": 35,  # the beginning of train; test
}
WHOLE_MEGABYTES = {"cais/wmdp-corpora": 1_000, "Salesforce/wikitext": 310}  # the former estimated
PROBE_MEGABYTES = {  # of what is read for full budget; for a smaller one, in proportion
    "LabHC/bias_in_bios": 90,  # train and test, whole (100 MB with its third split)
    "canrager/amazon_reviews_mcauley_1and5": 100,  # estimated
    "codeparrot/github-code": 130,  # 50,000 files of 2.6 kB, compressed
    "fancyzhx/ag_news": 20,  # train and test, whole
    "Helsinki-NLP/europarl": 40,  # the beginning of five language pairs
}
BLOCK = 5  # megabytes that are read at least
SPEED = 5  # megabytes a second, of the connection that the time is told for


class Pythia:
    """Pythia-70M, WikiText-103, WMDP and MMLU from the Hugging Face Hub."""

    name = "pythia"
    model_name = loadable_name = "EleutherAI/pythia-70m-deduped"
    text = "WikiText-103 and MMLU, WMDP-bio and open biology prose"
    dataset_path = "Salesforce/wikitext"
    layer = 3
    d_in = 512
    domains, learn_parts = DOMAINS, LEARN
    unnamed = tuple(DOMAINS)[2:]  # no label names them
    revisions = {
        "EleutherAI/pythia-70m-deduped": "e93a9faa9c77e5d09219f6c868bfc7a1bd65593c",
        "Salesforce/wikitext": "b08601e04326c79dfdd32d625aee71d232d685c3",
        "cais/wmdp": "007369b247877daf390f4111aeaed5241437f696",
        "cais/wmdp-corpora": "41fdbd806c1880c8ee006876e9262dd58ab73873",
        "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
        "fancyzhx/ag_news": "eb185aade064a813bc0b7f42de02595523103ca4",
        "codeparrot/github-code": "refs/convert/parquet",  # main is a script, which no longer loads
        "LabHC/bias_in_bios": "main",
        "canrager/amazon_reviews_mcauley_1and5": "main",
        "Helsinki-NLP/europarl": "main",
    }  # of branches the newest commit is read, which the corpus names

    def __init__(self, cache: Cache):
        self.cache = cache
        self.fingerprint = digest(self.revisions)
        self.commits: dict[str, str] = {}  # of the data sets that were read
        datasets.config.STREAMING_READ_MAX_RETRIES = 1  # not 20 rounds of the client's own 5

    def sources(self) -> dict[str, dict[str, str]]:
        """Revisions of the repositories that hold model and text."""
        return {name: {"revision": revision} for name, revision in self.revisions.items()}

    def check(self, timeout: float = 5.0) -> None:
        """Raise UserError, which says why, where model and data cannot be had."""
        revision = self.revisions[self.model_name]
        corpora = list(self.cache.root.glob(f"{self.name}/corpus-*.safetensors"))
        if self.has_model() and corpora:
            return
        hub = huggingface_hub.HfApi()
        with hub_errors(self.model_name):
            hub.model_info(self.model_name, revision=revision, timeout=timeout)
        for name in ("cais/wmdp", "cais/wmdp-corpora", "Salesforce/wikitext"):
            with hub_errors(name):
                hub.dataset_info(name, revision=self.revisions[name], timeout=timeout)

    def has_model(self) -> bool:
        """Whether the Hub's cache holds the weights."""
        return isinstance(huggingface_hub.try_to_load_from_cache(
            self.model_name, "model.safetensors", revision=self.revisions[self.model_name]), str)

    def fetch(self) -> None:
        """The model's files; damaged weights (the Hub's cache names them by SHA-256) once more."""
        if not self.has_model():
            report_download(self.model_name, MODEL_MEGABYTES)
        for again in (False, True):
            with hub_errors(self.model_name):
                folder = huggingface_hub.snapshot_download(
                    self.model_name, revision=self.revisions[self.model_name],
                    allow_patterns=["*.json", "*.safetensors"], force_download=again)
            weights = Path(folder, "model.safetensors")
            expected = weights.readlink().name if weights.is_symlink() else ""
            if len(expected) != 64 or sha256_of(weights) == expected:
                return
            report(f"{weights} does not match its hash")
        raise UserError(f"the Hugging Face Hub gives a damaged {self.model_name}; try again later")

    def load_model(self, dtype: torch.dtype) -> tuple[nn.Module, Any]:
        options = dict(revision=self.revisions[self.model_name], local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.model_name, dtype=dtype, **options
        )
        return model, transformers.AutoTokenizer.from_pretrained(self.model_name, **options)

    def commit(self, path: str) -> str:
        """The commit at which a data set is read: of a branch the newest."""
        if path not in self.commits:
            revision = self.revisions[path]
            if not re.fullmatch("[0-9a-f]{40}", revision):
                with hub_errors(path):
                    revision = huggingface_hub.HfApi().dataset_info(path, revision=revision).sha
            self.commits[path] = revision
        return self.commits[path]

    def rows(self, path: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
        """Rows of a data set, streamed, so that only what is used is fetched."""
        place = {"data_dir" if "convert" in self.revisions[path] else "name": config}
        commit = self.commit(path)
        with hub_errors(path):
            yield from datasets.load_dataset(path, **place, split=split, revision=commit,
                                             streaming=True)

    def prose(self, kind: str, path: str, config: str, split: str,
              characters: float) -> list[Document]:
        """The first texts of a data set, at most PAPER characters of each, without headings and
        other short ones."""
        texts: list[str] = []
        for row in self.rows(path, config, split):
            if len(row["text"]) > 50:
                texts.append(row["text"][:PAPER].strip())
                characters -= len(texts[-1])
            if characters <= 0:
                break
        return [Document(kind, text, None) for text in texts]

    def documents(self, sizes: Sizes) -> list[Document]:
        """All texts; first what is never trained on, since of equal texts the first is kept."""
        mmlu = [row for row in self.rows("cais/mmlu", "all", "test")
                if row["subject"] not in BIOLOGY_SUBJECTS]
        characters = CHARACTERS * sizes.learn_tokens
        return [
            *(Document("news", row["text"], row) for row in self.rows(NEWS, None, "test")),
            *(Document("MMLU retain subjects", statement(row), row) for row in mmlu
              if row["subject"] in RETAIN_SUBJECTS),
            *self.prose("WikiText test", *WIKITEXT, "test", math.inf),
            *(Document("WMDP-bio", statement(row), row)
              for row in self.rows("cais/wmdp", "wmdp-bio", "test")),
            *(Document("other MMLU subjects", statement(row), row) for row in mmlu
              if row["subject"] not in RETAIN_SUBJECTS),
            *self.prose("WikiText train", *WIKITEXT, "train", characters),
            *self.prose("biology prose", "cais/wmdp-corpora", "bio-retain-corpus", "train",
                        characters / 2),
        ]

    def corpus(self, sizes: Sizes) -> dict[str, Any]:
        """All text by half and domain, questions, probing sets, how much there is of what, and at
        which commits it was read."""
        report_download("texts and questions", megabytes(sizes))
        documents = self.documents(sizes)
        news = [one.source for one in documents if one.kind == "news"]
        known = {(NEWS, None, "test"): news}  # so that it is not read again
        probes, skipped = read_probe_sets(
            lambda *place: known.get(place) or self.rows(*place), sizes)
        halves = halved(documents, self.learn_parts)
        return {
            **laid_out(halves, self.domains, lambda one: one.text),
            "questions": {"forget": cloze(halves["ask"]["WMDP-bio"]),
                          "retain": cloze(halves["ask"]["MMLU retain subjects"])},
            "probes": probes, "skipped": skipped,
            "sources": {path: {"revision": commit} for path, commit in self.commits.items()},
        }


def report_download(what: str, size: float) -> None:
    report(f"fetching {what} from the Hugging Face Hub: about {size:.0f} MB, which takes about "
           f"{duration(size / SPEED)} at {SPEED} MB/s")


def megabytes(sizes: Sizes) -> float:
    """About what is fetched for a corpus."""
    part = sizes.probe_train / SIZES["full"].probe_train
    times = max(1, sizes.learn_tokens / SIZES["full"].learn_tokens)
    return sum(min(WHOLE_MEGABYTES.get(path, size), times * size)
               for path, size in TEXT_MEGABYTES.items()) + sum(
        max(BLOCK, part * size) for size in PROBE_MEGABYTES.values())


def statement(row: dict[str, Any]) -> str:
    return f"{row['question']} {row['choices'][row['answer']]}"


def cloze(documents: list[Document]) -> list[Question]:
    """Questions none of whose options speaks of the others."""
    rows = [one.source for one in documents
            if not any(map(is_about_options, one.source["choices"]))]
    return [Question(f"Question: {row['question']}\nAnswer:", "Answer:", list(row["choices"]),
                     row["answer"]) for row in shuffled(rows, "questions")]
