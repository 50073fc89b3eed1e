"""The two substrates, the choice between them, and what all runs on one of them share."""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from torch import Tensor

from lab.console import UserError, report
from lab.distributed import Processes
from lab.language_model import LanguageModel, faster_dtype
from lab.storage import Cache, checksum, code_digest, digest, randomness
from lab.substrates.pythia import HubRefusal, Pythia
from lab.substrates.standin import Standin
from lab.substrates.texts import NAMED, RETAIN, Sizes, pack_contexts

HASHED = (Standin.wheel,)  # files whose hashes are in the fingerprint, however they are fetched
SINK_FACTOR = 10.0  # a token this many median norms long is an attention sink


def choose_source(choice: str, cache: Cache) -> Standin | Pythia:
    """`auto` prefers Pythia; where the Hub is not to be had, the stand-in, saying so in one line.

    A Hub that is there and refuses is no such case: raises HubRefusal, which names the cure.
    """
    if choice not in ("auto", "pythia", "standin"):
        raise UserError(f"SAE_SUBSTRATE={choice!r} is unknown; use auto, pythia or standin")
    if choice == "standin":
        return Standin(cache)
    pythia = Pythia(cache)
    try:
        pythia.check()
        return pythia
    except HubRefusal:
        raise
    except UserError as reason:
        if choice == "pythia":
            raise
        report(f"substrate: standin ({Standin.model_name}); {reason}")
    return Standin(cache)


def quiet_libraries() -> None:
    """Silence what a user cannot act on; errors still come through."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class Contexts(NamedTuple):
    """Packed text of one half: tokens [N, T] and their domains [N], the retain text's kinds apart
    in learn text."""

    tokens_NT: Tensor
    domain_N: Tensor

    def checksum(self) -> str:
        return checksum({"tokens": self.tokens_NT, "domain": self.domain_N}, "")


class Substrate:
    """A language model, its hook and its text, with all that every run on them shares.

    Each part is computed once, by whichever run needs it first, and kept in the cache under a key
    of what it was computed from and by which code.
    """

    def __init__(self, source: Standin | Pythia, sizes: Sizes, cache: Cache,
                 processes: Processes):
        self.source, self.sizes, self.cache, self.processes = source, sizes, cache, processes
        self.name, self.domains = source.name, (*NAMED, *source.unnamed)
        self.dtype = faster_dtype(processes.device)
        self.causes = (source.name, source.fingerprint, str(self.dtype), torch.__version__,
                       transformers.__version__,
                       code_digest(LanguageModel, type(source).load_model, values=HASHED))

    @property
    def precision(self) -> str:
        """What the language model computes in, for example "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @functools.cached_property
    def lm(self) -> LanguageModel:
        model, tokenizer = self.source.load_model(self.dtype)
        return LanguageModel(model, tokenizer, self.source.layer, self.processes.device)

    def cached(self, name: str, build: Callable[[], tuple[dict[str, Tensor], Any]],
               *causes: Any) -> tuple[dict[str, Tensor], Any]:
        return self.cache.get(f"{self.name}/{name}", (*self.causes, *causes), build)

    def cached_path(self, name: str, *causes: Any) -> Path:
        """Where `cached` keeps a thing."""
        return self.cache.path(f"{self.name}/{name}", *self.causes, *causes)

    @functools.cached_property
    def corpus(self) -> dict[str, Any]:
        """All text: by half and domain, questions, probing sets, and what could not be had."""
        sizes = (self.sizes.learn_tokens, self.sizes.probe_train, self.sizes.probe_test)
        code = code_digest(type(self.source).corpus, values=HASHED)
        return self.cache.get(f"{self.name}/corpus", (self.source.fingerprint, sizes, code),
                              lambda: ({}, self.source.corpus(self.sizes)))[1]

    @functools.cached_property
    def learn(self) -> Contexts:
        """What is trained on, in random order: at most `learn_tokens`, half of them forget text."""
        left, kinds = self.sizes.learn_tokens // self.sizes.context_length, self.learn_domains
        contexts = self.contexts("learn", (kinds[:RETAIN], kinds[RETAIN:]), (left // 2, left))
        for domain, name in enumerate(NAMED):
            if not (contexts.domain_N.clamp(max=RETAIN) == domain).any():
                raise UserError(f"{self.name} has no context of {self.sizes.context_length} tokens "
                                f"of {name} text to train on; learn_tokens must allow for one")
        return contexts

    @property
    def learn_domains(self) -> tuple[str, ...]:
        """Names of the domains of learn text: forget text and every kind of retain text."""
        return tuple(self.corpus["learn"])

    @functools.cached_property
    def ask(self) -> Contexts:
        """What is evaluated on, unnamed texts included."""
        most = (self.sizes.heldout_contexts,) * len(self.domains)
        return self.contexts("ask", tuple((name,) for name in self.domains), most)

    def contexts(self, half: str, groups: tuple[tuple[str, ...], ...],
                 most: tuple[int, ...]) -> Contexts:
        """Packed contexts of a half: of each group of domains a random sample of at most so many;
        learn text shares the room."""
        sizes = self.sizes

        def build() -> tuple[dict[str, Tensor], Any]:
            parts, taken, first = [], 0, 0
            for group, room in zip(groups, most):
                packed = [pack_contexts(self.tokenized(self.corpus[half][name]),
                                        self.lm.separator, sizes.context_length) for name in group]
                rows = torch.cat(packed)
                domain_R = torch.repeat_interleave(
                    torch.arange(first, first + len(group), dtype=torch.uint8),
                    torch.tensor([len(part) for part in packed]))
                order = torch.randperm(len(rows), generator=randomness("contexts", *group))
                order = order[: max(0, room - (taken if half == "learn" else 0))]
                taken, first = taken + len(order), first + len(group)
                parts.append((rows[order], domain_R[order]))
            tokens_NT, domain_N = (torch.cat(part) for part in zip(*parts))
            if half == "learn":
                mix = torch.randperm(len(tokens_NT), generator=randomness("mix", half))
                tokens_NT, domain_N = tokens_NT[mix], domain_N[mix]
            return {"tokens": tokens_NT, "domain": domain_N}, None

        causes = (groups, most, sizes.context_length, digest(self.corpus[half]),
                  code_digest(Substrate))
        kept = self.cached(f"contexts-{half}", build, *causes)[0]
        return Contexts(kept["tokens"], kept["domain"])

    def tokenized(self, texts: list[str], at_once: int = 1024) -> Iterator[list[int]]:
        """Tokens of each text, a few texts at a time: a tokenizer's answer takes many times the
        memory of its tokens."""
        for start in range(0, len(texts), at_once):
            yield from self.lm.tokenize(texts[start : start + at_once])

    def texts(self) -> dict[str, Any]:
        """What of text enters results: where it comes from, and how much there is by domain."""
        halves = {"learn": (self.learn, self.learn_domains), "ask": (self.ask, self.domains)}
        tokens = {half: {name: int((contexts.domain_N == k).sum()) * self.sizes.context_length
                         for k, name in enumerate(names)}
                  for half, (contexts, names) in halves.items()}
        sources = {**self.source.sources(), **self.corpus.get("sources", {})}
        return {"sources": sources, "documents": self.corpus["documents"],
                "tokens": tokens}

    @functools.cached_property
    def sink_norm(self) -> float:
        """Norm from which a token is an attention sink: ten times the median of learn text."""

        def build() -> tuple[dict[str, Tensor], Any]:
            x = torch.cat([self.lm.residual(part) for part in tokens_NT.split(16)])
            norm = x.float().norm(dim=-1).median()
            if not torch.isfinite(norm):
                raise UserError("the language model gives residuals that are not finite")
            return {"norm": SINK_FACTOR * norm}, None

        tokens_NT = self.learn.tokens_NT[:64]
        causes = checksum({"tokens": tokens_NT}, ""), code_digest(Substrate)
        return float(self.cached("sink-norm", build, *causes)[0]["norm"])

    def compact(self, x: Tensor) -> Tensor:
        """Residuals x of ordinary tokens in half precision: in float16, which is finer, unless
        they may exceed its range."""
        fits = self.sink_norm < torch.finfo(torch.float16).max
        return x.to(torch.float16 if fits else torch.bfloat16)

    def is_plain(self, x: Tensor) -> Tensor:
        """Whether residuals x [..., D] are of ordinary tokens, not of attention sinks."""
        return x.float().norm(dim=-1) < self.sink_norm
