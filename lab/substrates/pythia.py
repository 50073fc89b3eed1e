"""The `pythia` substrate: Pythia-70M, WikiText, WMDP-bio and MMLU from the Hugging Face Hub."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers
from torch import nn

from lab.console import UserError, report
from lab.storage import Cache, digest, sha256_of
from lab.substrates.texts import (
    Question,
    Sizes,
    distinct,
    divided,
    probe_rows,
    shuffled,
    without_copies,
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


class Pythia:
    """Pythia-70M, WikiText-103, WMDP-bio and MMLU from the Hugging Face Hub."""

    name = "pythia"
    model_name = loadable_name = "EleutherAI/pythia-70m-deduped"
    text = "WikiText-103 and WMDP-bio"
    dataset_path = "Salesforce/wikitext"
    layer = 3
    d_in = 512
    revisions = {
        "EleutherAI/pythia-70m-deduped": "e93a9faa9c77e5d09219f6c868bfc7a1bd65593c",
        "Salesforce/wikitext": "b08601e04326c79dfdd32d625aee71d232d685c3",
        "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
        "codeparrot/github-code": "refs/convert/parquet",  # main is a script, which no longer loads
    }  # others, and cais/wmdp, are read at their newest commit
    retain_subjects = ("high_school_us_history", "college_computer_science",
                       "high_school_geography", "human_aging")

    def __init__(self, cache: Cache):
        self.cache = cache
        self.fingerprint = digest(self.revisions)
        datasets.config.STREAMING_READ_MAX_RETRIES = 1  # not 20 rounds of the client's own 5

    def check(self, timeout: float = 5.0) -> None:
        """Raise UserError, which says why, where model and data cannot be had."""
        revision = self.revisions[self.model_name]
        cached = huggingface_hub.try_to_load_from_cache(self.model_name, "model.safetensors",
                                                        revision=revision)
        corpora = list(self.cache.root.glob(f"{self.name}/corpus-*.safetensors"))
        if isinstance(cached, str) and corpora:
            return
        hub = huggingface_hub.HfApi()
        with hub_errors(self.model_name):
            hub.model_info(self.model_name, revision=revision, timeout=timeout)
        for name in ("cais/wmdp", "Salesforce/wikitext"):
            with hub_errors(name):
                hub.dataset_info(name, timeout=timeout)

    def fetch(self) -> None:
        """The model's files; damaged weights (the Hub's cache names them by SHA-256) once more."""
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

    def rows(self, path: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
        """Rows of a data set, streamed, so that only what is used is fetched."""
        revision = self.revisions.get(path, "main")
        place = {"data_dir" if "convert" in revision else "name": config}
        with hub_errors(path):
            yield from datasets.load_dataset(path, **place, split=split, revision=revision,
                                             streaming=True)

    def wikitext(self, split: str, characters: int) -> list[str]:
        texts: list[str] = []
        for row in self.rows("Salesforce/wikitext", "wikitext-103-raw-v1", split):
            if len(row["text"]) > 50:
                texts.append(row["text"].strip())
                characters -= len(row["text"])
            if characters <= 0:
                break
        return texts

    def corpus(self, sizes: Sizes) -> dict[str, Any]:
        """Texts by half and domain, questions and probing sets; what cannot be had is named."""
        learn, ask = divided(list(self.rows("cais/wmdp", "wmdp-bio", "test")), self.statement)
        other = distinct([row for subject in self.retain_subjects
                          for row in self.rows("cais/mmlu", subject, "test")], self.statement)
        articles = self.wikitext("train", 6 * sizes.learn_tokens)
        heldout = without_copies(self.wikitext("test", 2_000_000), articles)
        probes, skipped = self.probe_sets(sizes)
        return {
            "learn": {"forget": [self.statement(row) for row in learn], "retain": articles,
                      "other": []},
            "ask": {"forget": [self.statement(row) for row in ask], "retain": heldout,
                    "other": [self.statement(row) for row in other]},
            "questions": {"forget": [self.question(row) for row in shuffled(ask, "questions")],
                          "retain": [self.question(row) for row in shuffled(other, "questions")]},
            "probes": probes,
            "skipped": skipped,
        }

    @staticmethod
    def statement(row: dict[str, Any]) -> str:
        return f"{row['question']} {row['choices'][row['answer']]}"

    @staticmethod
    def question(row: dict[str, Any]) -> Question:
        prompt = f"Question: {row['question']}\nAnswer:"
        return Question(prompt, "Answer:", list(row["choices"]), row["answer"])

    def probe_sets(self, sizes: Sizes) -> tuple[dict[str, Any], dict[str, str]]:
        """SAEBench's eight data sets; one that cannot be loaded is skipped with its reason."""
        probes, skipped = {}, {}
        for name, source in PROBE_SOURCES.items():
            try:
                wanted = (sizes.probe_train + sizes.probe_test) // 2
                probes[name] = {"rows": source.rows(self, wanted)}
            except (UserError, ValueError, KeyError) as error:
                skipped[name] = str(error) if isinstance(error, UserError) else repr(error)
                report(f"probing set {name} is skipped, in all runs from this cache: "
                       f"{skipped[name]}")
        return probes, skipped


@dataclass(frozen=True)
class ProbeSource:
    """Where SAEBench's probing task takes its training texts from, and how a row becomes (class,
    text). A fifth of these is tested on; SAEBench has a split of its own for that where there is
    one."""

    path: str
    classes: tuple[Any, ...]
    label: Callable[[dict], Any]
    text: Callable[[dict], str | None]
    split: str = "train"
    configs: tuple[str | None, ...] = (None,)
    balance: Callable[[dict], Any] = lambda row: None  # classes hold equal parts of this

    def rows(self, hub: Pythia, wanted: int) -> list[tuple[str, str, str]]:
        """Up to `wanted` texts a class as (part, class, text), equal over `balance`'s values."""
        kept: dict[Any, dict[Any, list[str]]] = {label: {} for label in self.classes}
        for config in self.configs:
            full: set[Any] = set()
            for seen, row in enumerate(hub.rows(self.path, config, self.split)):
                text, label = self.text(row), self.label(row)
                if label in self.classes and text:
                    kept[label].setdefault(self.balance(row), []).append(text)
                    if len(kept[label]) * min(map(len, kept[label].values())) >= wanted:
                        full.add(label)
                if len(full) == len(self.classes) // len(self.configs) or seen > 400_000:
                    break
        rows = []
        for label, parts in kept.items():
            if not parts:
                raise ValueError(f"{self.path} has no row of class {label!r}")
            size = min(wanted // len(parts), *map(len, parts.values()))
            rows += [(str(label), text) for texts in parts.values() for text in texts[:size]]
        return probe_rows(rows)


def bias_in_bios(*classes: int) -> ProbeSource:
    return ProbeSource("LabHC/bias_in_bios", classes, lambda row: row["profession"],
                       lambda row: row["hard_text"], balance=lambda row: row["gender"])


PROBE_SOURCES = {
    "LabHC/bias_in_bios_class_set1": bias_in_bios(0, 1, 2, 6, 9),
    "LabHC/bias_in_bios_class_set2": bias_in_bios(11, 13, 14, 18, 19),
    "LabHC/bias_in_bios_class_set3": bias_in_bios(20, 21, 22, 25, 26),
    "canrager/amazon_reviews_mcauley_1and5": ProbeSource(
        "canrager/amazon_reviews_mcauley_1and5", (1, 2, 3, 5, 6),
        lambda row: row["category"], lambda row: row["text"], balance=lambda row: row["rating"]),
    "canrager/amazon_reviews_mcauley_1and5_sentiment": ProbeSource(
        "canrager/amazon_reviews_mcauley_1and5", (1.0, 5.0),
        lambda row: float(row["rating"]), lambda row: row["text"]),
    "codeparrot/github-code": ProbeSource(
        "codeparrot/github-code", ("C", "Python", "HTML", "Java", "PHP"),
        lambda row: row["language"],
        lambda row: row["code"][150:] if len(row["code"]) > 534 else None, configs=("all-all",)),
    "fancyzhx/ag_news": ProbeSource(
        "fancyzhx/ag_news", (0, 1, 2, 3), lambda row: row["label"], lambda row: row["text"]),
    "Helsinki-NLP/europarl": ProbeSource(
        "Helsinki-NLP/europarl", ("en", "fr", "de", "es", "nl"),
        lambda row: next(iter(row["translation"])),
        lambda row: next(iter(row["translation"].values())),
        configs=("en-fr", "fr-it", "de-en", "es-fr", "nl-pt")),
}
