"""Adaptive orthogonal feature learning in sparse autoencoders (SAEs), in one script.

    python experiment.py --out_dir=run_3

trains SAEs on the residual stream of a language model with the row `run_3` of the table below,
evaluates them (reconstruction, conditioning, sparse probing, unlearning) and writes the folder.
The file reads downward in the order in which data flows: configuration, cache, text and language
model, activations, SAE, feature groups, losses, trainer, evaluations, results, run, main.

Shapes are suffixes: B tokens of a batch, D residual width, F features, G groups, M features of a
group, K domains of text, N entries of a flat list, T tokens of a context, R columns of a sketch.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # Ctrl-C during the imports ends it, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    import datasets
    import huggingface_hub
    import numpy as np
    import requests
    import safetensors.torch
    import scipy.sparse
    import scipy.stats
    import torch
    import torch.distributed as dist
    import transformers
    import wandb
    from filelock import FileLock, Timeout
    from nnsight import NNsight
    from safetensors import SafetensorError, safe_open
    from sklearn.linear_model import LogisticRegression
    from torch import Tensor, nn
    from torch.optim.adam import adam
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f"error: package {missing.name} is missing; pip install -r requirements.txt gives it")
from lab.console import LEADER, UserError, progress, say
from lab.distributed import Interrupts, Team, keep_freed_memory
from lab.evaluations.conditioning import evaluate_conditioning
from lab.evaluations.probing import (
    K_VALUES,
    ProbeSet,
    add_rows_,
    binary_task,
    probe_accuracy,
    probe_table,
)
from lab.evaluations.prompt_trees import Forest, Questions
from lab.evaluations.reconstruction import reconstruction_metrics
from lab.evaluations.unlearning import (
    FRONTIER_END,
    MULTIPLIERS,
    RETAIN_BUDGETS,
    RETAINED,
    SET_SIZES,
    THRESHOLDS,
    Effect,
    FeatureStatistics,
    accuracy_area,
    apply_setting,
    bootstrap,
    clamp,
    control_effects,
    evaluate_unlearning,
    feature_statistics,
    matched_features,
    official_score,
    select_features,
    summarize_unlearning,
    unlearning_area,
)
from lab.grouping import (
    CoactivationSketch,
    GroupStatistics,
    assign_balanced,
    cluster_balanced,
    condition_numbers,
    group_features,
    group_statistics,
    random_condition_number,
)
from lab.language_model import HookedLM, PackedLinear, faster_dtype, pack_linear_
from lab.results.exports import export_sae, hook_name, sae_cfg_dict
from lab.results.final_info import (
    SAMPLED,
    UNLEARNING_NUMBERS,
    compare,
    comparisons,
    environment,
    flat_metrics,
    processor_name,
    read_result,
    result_checksum,
    sae_bench_part,
    sampling_error,
)
from lab.results.notes import HEADLINES, NOTES_HEADER, summary_table, update_notes
from lab.results.statistics import concave_envelope, frontier_area, mean_and_stderr
from lab.results.tracking import Logger
from lab.sparse import (
    Code,
    SparseAutoencode,
    candidates,
    csr,
    faster_screen,
    largest,
    places,
    row_starts,
    sparse_product,
    transposed,
)
from lab.storage import (
    SEAL,
    Cache,
    checksum,
    checksums,
    digest,
    is_sealed,
    non_finite,
    randomness,
    read_tensors,
    scratch_folder,
    sha256_of,
    source_of,
    to_json,
    write_atomically,
    write_tensors,
    write_text,
)
from lab.substrates import choose_substrate
from lab.substrates.pythia import PROBE_SOURCES, ProbeSource, Pythia, bias_in_bios, hub_errors
from lab.substrates.standin import Standin, organ_labels, organ_systems
from lab.substrates.texts import (
    DOMAINS,
    FORGET,
    OTHER,
    RETAIN,
    Question,
    cloze_questions,
    in_learn_half,
    lot,
    pack_contexts,
    probe_part,
    shuffled,
)

# ------------------------------------------------------------------------------------------------
# Configuration: everything a run can differ in, and the ten runs
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CustomSAEConfig:
    """One row of the study. Defaults are shared by all runs; RUNS holds the differences."""

    # orthogonality
    orthogonality: str = "adaptive"  # off | fixed | adaptive | max_cosine
    alpha: float = 0.05  # its strength; only the starting value of trainer.alpha
    eta: float = 4.0  # weight of L_use inside L_orth (adaptive)
    ortho_matrix: str = "decoder"  # which weights are kept apart: decoder | encoder
    ortho_dtype: str = "auto"  # of L_dir's products: auto | float32 | bfloat16
    ortho_every: int = 8  # steps between two computations of L_dir's gradient, used at every one
    regroup_every: int = 250  # steps between two groupings, the first when alpha has ramped up
    group_size: int = 64  # M < D, so that every group has a finite condition number
    sketch_size: int = 512  # R, columns of the co-activation sketch
    sketch_every: int = 1  # steps between two batches that enter the sketch
    share_min: float = -8.0  # s_g in direction of a badly conditioned group: weight 1 - s_g = 9
    share_max: float = 1.0  # s_g of an even, well conditioned group, and of all until grouped
    share_even: float = 0.5  # evenness from which a group counts as even
    kappa_max: float = 2.0  # times the median group's κ: beyond it a group shares less than nothing
    shuffle_domains: bool = False  # control: L_use sees labels without meaning
    # sparse autoencoder
    expansion: int = 8  # F = expansion * D
    target_l0: float = 40.0  # active features a token, held by the sparsity controller
    sparsity_penalty: float = 0.08  # where lambda starts; it ends near this
    sparsity_rate: float = 0.01  # largest change of log lambda a step
    # optimisation
    steps: int = 600
    batch_size: int = 2048  # tokens
    learning_rate: float = 1e-3
    warmup_steps: int = 100  # of the learning rate; alpha ramps over ramp_fraction
    ramp_fraction: float = 0.2
    decay_fraction: float = 0.2  # linear to zero over the last part of training
    encoder_screen: str = "auto"  # how active features are looked for: auto | int8 | float32
    resample_every: int = 50  # steps; features silent for so long are given a new direction
    resample_fraction: float = 0.8  # no resampling after this part of training
    first_seed: int = 0
    n_seeds: int = 3
    # material
    context_length: int = 128  # tokens
    learn_tokens: int = 1_000_000  # unique training tokens, at most
    frequency_tokens: int = 100_000  # learn tokens a domain for firing frequencies
    heldout_contexts: int = 256  # ask-half contexts a domain: reconstruction, conditioning
    frontier_contexts: int = 12  # a domain, the ones whose cross-entropy is measured
    question_candidates: int = 420  # a domain, before the filter
    questions: int = 200  # a domain, after it
    probe_train: int = 4000  # texts a binary task, where the data allow
    probe_test: int = 1000
    # records
    log_every: int = 25  # steps
    checkpoint_every: int = 250  # steps

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.n_seeds))


RUNS: dict[str, dict[str, Any]] = {
    "run_1": dict(orthogonality="adaptive", alpha=0.10, regroup_every=250),
    "run_2": dict(orthogonality="adaptive", alpha=0.05, regroup_every=250),
    "run_3": dict(orthogonality="adaptive", alpha=0.01, regroup_every=250),
    "run_4": dict(orthogonality="adaptive", alpha=0.05, regroup_every=100),
    "run_5": dict(orthogonality="adaptive", alpha=0.05, regroup_every=500),
    "run_6": dict(orthogonality="adaptive", alpha=0.05, regroup_every=250, eta=0.0),
    "run_7": dict(orthogonality="fixed", alpha=0.05),
    "run_8": dict(orthogonality="off", alpha=0.0),
    "run_9": dict(orthogonality="max_cosine", alpha=0.25),
    "run_10": dict(orthogonality="adaptive", first_seed=100),  # and the best α of runs 1-5
}
PURPOSE = {
    "run_1": "α sweep, strong",
    "run_2": "α sweep, medium",
    "run_3": "α sweep, weak",
    "run_4": "grouping, frequent",
    "run_5": "grouping, rare",
    "run_6": "direction only: what sharing in groups does by itself (η = 0)",
    "run_7": "fixed orthogonal SAE",
    "run_8": "vanilla SAE: the trained baseline",
    "run_9": "OrtSAE, the published competitor (α column: its γ)",
    "run_10": "the best of runs 1-5 on fresh seeds",
}
BUDGETS: dict[str, dict[str, Any]] = {
    "full": {},
    "smoke": dict(
        expansion=2, steps=120, warmup_steps=20, n_seeds=2, learn_tokens=30_000,
        regroup_every=40, resample_every=30, checkpoint_every=40, log_every=10,
        frequency_tokens=8_000, heldout_contexts=24, frontier_contexts=2,
        question_candidates=16, questions=5, probe_train=80, probe_test=40,
    ),
}
DUPLICATE_COSINE = 0.9  # two features this close count as duplicates
SINK_FACTOR = 10.0  # a token this many median norms long is an attention sink


def best_row(study: Path, budget: str) -> dict[str, Any]:
    """α and regrouping interval of the run 1-5 in `study` with the largest unlearning area.

    Raises UserError naming the runs that are missing or of another budget.
    """
    candidates = [f"run_{i}" for i in range(1, 6)]
    found = {name: read_result(study / name) for name in candidates}
    numbers = {
        name: (info["config"].get("alpha"), info["config"].get("regroup_every"),
               info["means"].get("unlearning_area") or 0.0)
        for name, info in found.items() if info and info["budget"] == budget
    }
    missing = [name for name in candidates
               if not all(isinstance(part, int | float) for part in numbers.get(name, [None]))]
    if missing:
        raise UserError(
            f"run_10 repeats the best of runs 1-5 and needs them finished at budget {budget!r} in "
            f"{study.resolve()}; missing: {', '.join(missing)}. Run those first."
        )
    if len({info["substrate"] for info in found.values()}) > 1:
        raise UserError(f"runs 1-5 in {study.resolve()} are of different substrates; run_10 "
                        "needs them of one; repeat the odd ones")
    best = max(candidates, key=lambda name: numbers[name][2])
    return dict(zip(("alpha", "regroup_every"), numbers[best]))


def resolve_config(run: str, budget: str, study: Path) -> CustomSAEConfig:
    """The row named `run` at `budget`; run_10 reads its α and interval from the runs in `study`."""
    if run not in RUNS:
        rows = "\n".join(f"  {name:7s} {PURPOSE[name]}" for name in RUNS)
        raise UserError(f"--out_dir ends in {run!r}, which is no row of the table; it has\n{rows}")
    if budget not in BUDGETS:
        raise UserError(f"SAE_BUDGET={budget!r} is unknown; use one of {', '.join(BUDGETS)}")
    chosen = best_row(study, budget) if run == "run_10" else {}
    return CustomSAEConfig(**{**RUNS[run], **BUDGETS[budget], **chosen})


# ------------------------------------------------------------------------------------------------
# Files: whole or not at all, checked when they are read
# ------------------------------------------------------------------------------------------------


def section(begin: str, end: str) -> str:
    """This file from one section's title to another's: a change in it is a change of key."""
    text = Path(__file__).read_text(encoding="utf-8")
    return digest(text.partition(f"\n# {begin}")[2].partition(f"\n# {end}")[0])


TRAINING_CODE = section("Activations", "Evaluations")
EVALUATION_CODE = section("Evaluations", "Results")


# ------------------------------------------------------------------------------------------------
# Team: the processes that torchrun started
# ------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------
# Text and language model: the two substrates
# ------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------
# Activations: read once through the hook, kept in half precision, shuffled across documents
# ------------------------------------------------------------------------------------------------


def median_norm(x_BTD: Tensor) -> float:
    return float(x_BTD.float().norm(dim=-1).median())


class ActivationBuffer:
    """Training activations of both domains, with their domain labels, in memory as float16.

    They are computed once a substrate and kept in the cache in shards, each of them a random
    sample of all contexts; a killed run loses at most one shard of work. `batch` is a function of
    seed and step alone, so that resuming needs no other state.
    """

    STRETCH = 128  # tokens that `mislabelled` keeps together

    def __init__(self, shards: Iterable[dict[str, Tensor]], room: int):
        """Of at most `room` tokens. Shards may be made as they are asked for: one is copied and
        let go before the one after the next is made."""
        square, n, domains = 0.0, 0, []
        for shard in shards:
            acts_ND = shard["acts"]
            if not domains:
                self.acts_ND = torch.empty(room, acts_ND.shape[1], dtype=acts_ND.dtype)
            self.acts_ND[n : n + len(acts_ND)] = acts_ND
            norm_N = torch.linalg.vector_norm(acts_ND, dim=1, dtype=torch.float32)
            square += float(norm_N.double().square().sum())
            n += len(acts_ND)
            domains.append(shard["domain"])
        self.acts_ND, self.domain_N = self.acts_ND[:n], torch.cat(domains)
        self.scale = math.sqrt(square / len(self))  # c: root mean square norm
        self.order: tuple[Any, Tensor] = (None, torch.empty(0))

    def __len__(self) -> int:
        return len(self.domain_N)

    def batch(self, seed: int, step: int, size: int, share: slice = slice(None),
              mislabelled: bool = False) -> tuple[Tensor, Tensor]:
        """Normalised activations z [B, D] float32 and their domains [B]; epochs are reshuffled.

        Of a batch of `size` tokens the `share` is given. `mislabelled` gives every stretch of text
        the domain of another: labels as many and as steady as the true ones, without meaning.
        """
        per_epoch = len(self) // size
        epoch, place = divmod(step, per_epoch)
        if self.order[0] != (seed, epoch):
            order = torch.randperm(len(self), generator=randomness("order", seed, epoch))
            self.order = ((seed, epoch), order)
        index = self.order[1][place * size : (place + 1) * size][share]
        if mislabelled:
            stretches = self.domain_N[:: self.STRETCH]
            moved = torch.randperm(len(stretches), generator=randomness("mislabelled", seed))
            domain_B = stretches[moved[index // self.STRETCH]]
        else:
            domain_B = self.domain_N[index]
        return self.acts_ND[index].float() / self.scale, domain_B.long()

    def sample(self, domain: int, size: int) -> Tensor:
        """Up to `size` normalised activations of one domain, always the same ones."""
        index = (self.domain_N == domain).nonzero().squeeze(1)
        chosen = torch.randperm(len(index), generator=randomness("sample", domain))[:size]
        return self.acts_ND[index[chosen]].float() / self.scale


class Material:
    """What all runs on a substrate share: computed once, by whichever run comes first."""

    def __init__(self, substrate: Standin | Pythia, config: CustomSAEConfig, cache: Cache,
                 team: Team):
        self.substrate, self.config, self.cache, self.team = substrate, config, cache, team
        self.dtype = faster_dtype(team.device)
        self.causes = (substrate.name, substrate.fingerprint, str(self.dtype), torch.__version__,
                       transformers.__version__, config.context_length,
                       source_of(HookedLM, pack_contexts))

    @functools.cached_property
    def lm(self) -> HookedLM:
        model, tokenizer = self.substrate.load_model(self.dtype)
        return HookedLM(model, tokenizer, self.substrate.layer, self.team.device)

    def cached(self, name: str, build: Callable, *causes: Any) -> tuple[dict[str, Tensor], Any]:
        def finite() -> tuple[dict[str, Tensor], Any]:
            tensors, note = build()
            if odd := non_finite(tensors):
                raise UserError(f"the language model gives non-finite {', '.join(odd)} for {name}")
            return tensors, note

        return self.cache.get(
            f"{self.substrate.name}/{name}", (*self.causes, *causes, source_of(build)), finite
        )

    @functools.cached_property
    def corpus(self) -> dict[str, Any]:
        sizes = (self.config.learn_tokens, self.config.probe_train, self.config.probe_test)
        code = source_of(type(self.substrate), cloze_questions, organ_systems, organ_labels)
        path = f"{self.substrate.name}/corpus"
        return self.cache.get(path, (self.substrate.fingerprint, sizes, code),
                              lambda: ({}, self.substrate.corpus(self.config)))[1]

    def contexts(self, half: str) -> tuple[Tensor, Tensor]:
        """Packed contexts [n, T] of a half of the text and their domains [n].

        The learn half, in random order, holds at most `learn_tokens` of forget and retain text, of
        which forget text gets at most one half. The ask half holds `heldout_contexts` of each, and
        `frontier_contexts` of a third text that no label ever names.
        """
        config = self.config
        left = config.learn_tokens // config.context_length
        most = {"learn": (left // 2, left, 0),
                "ask": (config.heldout_contexts, config.heldout_contexts,
                        config.frontier_contexts)}[half]

        def build() -> tuple[dict[str, Tensor], Any]:
            parts, taken = [], 0
            for domain, name in enumerate(DOMAINS):
                documents = self.lm.tokenize(self.corpus[half][name])
                rows = pack_contexts(documents, self.lm.separator, config.context_length)
                order = torch.randperm(len(rows), generator=randomness("contexts", name))
                order = order[: max(0, most[domain] - (taken if half == "learn" else 0))]
                taken += len(order)
                parts.append((rows[order], torch.full((len(order),), domain, dtype=torch.uint8)))
            tokens_NT, domain_N = (torch.cat(part) for part in zip(*parts))
            if half == "learn":
                mix = torch.randperm(len(tokens_NT), generator=randomness("mix", half))
                tokens_NT, domain_N = tokens_NT[mix], domain_N[mix]
            return {"tokens": tokens_NT, "domain": domain_N}, None

        found = self.cached(f"contexts-{half}", build, most, digest(self.corpus[half]))[0]
        return found["tokens"], found["domain"]

    def activations(self, shard_tokens: int = 32_768, rows: int = 16) -> ActivationBuffer:
        """The training buffer, its missing shards computed through the language model's hook.

        Each of a team first does a share of its own, and finds those of the others in the cache.
        """
        tokens_NT, domain_N = self.contexts("learn")
        per_shard = max(1, shard_tokens // tokens_NT.shape[1])
        contents = checksum({"tokens": tokens_NT, "domain": domain_N}, "")
        sink_norm: float | None = None

        def shard(start: int) -> tuple[dict[str, Tensor], Any]:
            stop = start + per_shard

            def build() -> tuple[dict[str, Tensor], Any]:
                parts = tokens_NT[start:stop].split(rows)
                x = torch.cat([self.lm.residual(part) for part in parts])
                limit = sink_norm or SINK_FACTOR * median_norm(x)
                norm = x.float().norm(dim=-1)
                if not bool(torch.isfinite(norm).all()):
                    raise UserError(f"the language model gives non-finite activations in {start=}")
                keep = norm < limit
                domain = domain_N[start:stop, None].expand_as(keep)
                return {"acts": x[keep].half().cpu(), "domain": domain[keep.cpu()]}, {
                    "sink_norm": limit, "sinks": int((~keep).sum())}

            return self.cached(f"activations/{start // per_shard:04d}", build, contents)

        starts = range(0, len(tokens_NT), per_shard)
        self.sink_norm = sink_norm = shard(0)[1]["sink_norm"]
        if self.team.size > 1:
            for start in progress(starts[self.team.rank :: self.team.size], "activations"):
                shard(start)
        parts = (shard(start)[0] for start in progress(starts, "activations"))
        return ActivationBuffer(parts, tokens_NT.numel())

    @functools.cached_property
    def heldout(self) -> dict[str, Tensor]:
        """Ask-half contexts: tokens, domain, residuals, which are no sinks, baseline losses.

        Losses are of the first `frontier_contexts` of each domain: unmodified and with zero
        ablation at the hook (of all tokens that are no sinks).
        """

        def build() -> tuple[dict[str, Tensor], Any]:
            tokens, domain = self.contexts("ask")
            say("held-out text: residuals and baseline cross-entropy")
            x = torch.cat([self.lm.residual(part) for part in tokens.split(32)])
            keep = x.float().norm(dim=-1) < self.sink_norm
            rows = torch.cat([(domain == k).nonzero()[: self.config.frontier_contexts, 0]
                              for k in range(len(DOMAINS))])
            ablated = x[rows] * ~keep[rows][..., None]
            return {"tokens": tokens, "domain": domain, "x": x.cpu(), "keep": keep.cpu(),
                    "rows": rows, "base": self.lm.losses(tokens[rows], x[rows]),
                    "zero": self.lm.losses(tokens[rows], ablated)}, None

        contents = checksum({"tokens": self.contexts("ask")[0]}, "")
        return self.cached("heldout", build, contents, self.config.frontier_contexts,
                           self.sink_norm)[0]

    def heldout_sample(self) -> Tensor:
        """Raw residuals [N, D] of held-out forget and retain text, sinks left out."""
        named = self.heldout["keep"] & (self.heldout["domain"] != OTHER)[:, None]
        return self.heldout["x"][named].float()

    @functools.cached_property
    def questions(self) -> tuple["Questions", dict[str, Any]]:
        """The first `questions` of each domain that the unmodified model answers correctly, and
        how many were asked and survived."""

        def build() -> tuple[dict[str, Tensor], Any]:
            kept, counts = [], {}
            for domain, name in enumerate(("forget", "retain")):
                found = self.corpus["questions"][name][: self.config.question_candidates]
                asked = [(Question(*question), domain) for question in found]
                say(f"{name} questions: baseline answers to {len(asked)}")
                forest = Questions.from_text(asked, self.lm)
                right = forest.right(forest.base_S).nonzero()[:, 0]
                counts[name] = {"asked": len(asked), "correct": len(right)}
                kept += [asked[q] for q in right.tolist()[: self.config.questions]]
            forest = vars(Questions.from_text(kept, self.lm))
            return {name: part for name, part in forest.items() if name != "memory"}, counts

        sizes = (self.config.question_candidates, self.config.questions, digest(self.corpus))
        tensors, counts = self.cached("questions", build, *sizes, source_of(Forest, Questions))
        return Questions(**tensors), counts

    @functools.cached_property
    def frontier(self) -> "Forest":
        """The held-out contexts whose cross-entropy is measured, each a tree without branches."""
        held, rows = self.heldout, self.heldout["rows"]
        tokens_RT = held["tokens"][rows].long()
        n, T = tokens_RT.shape
        index_RT = torch.arange(n * T).view(n, T)
        context_RT, place_RT = index_RT // T, index_RT % T
        return Forest(tokens_RT.flatten(), 5 * context_RT.flatten(), place_RT.flatten(),
                      tokens_RT[:, 1:].flatten(), 5 * context_RT[:, 1:].flatten(),
                      index_RT[:, :-1].flatten(), held["x"][rows].flatten(0, 1),
                      -held["base"].flatten())

    @functools.cached_property
    def probe_sets(self) -> "dict[str, ProbeSet]":
        """Residuals at the hook of every probing text, real tokens only."""
        return {name: self.probe_set(name, content["rows"])
                for name, content in self.corpus["probes"].items()}

    def probe_set(self, name: str, rows: list) -> "ProbeSet":
        """Residuals of texts (cut to the context length) as one flat list of tokens."""

        def build() -> tuple[dict[str, Tensor], Any]:
            limit = self.config.context_length - 1
            documents = [ids[:limit] for ids in self.lm.tokenize([text for _, _, text in chosen])]
            order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
            acts, owner = [], []
            for start in progress(range(0, len(order), 32), f"probing texts of {name}"):
                batch = order[start : start + 32]
                width = max(len(documents[i]) for i in batch)
                tokens = torch.full((len(batch), width + 1), self.lm.separator)
                for row, i in enumerate(batch):  # causal: padding on the right is never seen
                    tokens[row, 1 : len(documents[i]) + 1] = torch.tensor(documents[i])
                x = self.lm.residual(tokens).cpu()
                real = torch.tensor([[0 < t <= len(documents[i]) for t in range(width + 1)]
                                     for i in batch])
                real &= x.float().norm(dim=-1) < self.sink_norm
                acts.append(x[real].half())
                owner.append(torch.tensor(batch)[:, None].expand_as(real)[real])
            return {"acts": torch.cat(acts), "owner": torch.cat(owner)}, None

        wanted = {"train": self.config.probe_train // 2, "test": self.config.probe_test // 2}
        chosen = []
        for label in sorted({label for _, label, _ in rows}):
            for part, most in wanted.items():
                texts = [row for row in rows if row[0] == part and row[1] == label]
                chosen += shuffled(texts, "probe")[: min(most, 600)]
        name = f"probe-{name.replace('/', '_')}"
        causes = (digest(chosen), self.sink_norm)
        found = self.cached(name, build, *causes)
        return ProbeSet(found[0]["acts"], found[0]["owner"],
                        np.array([label for _, label, _ in chosen]),
                        np.array([part for part, _, _ in chosen]), causes)


# ------------------------------------------------------------------------------------------------
# Sparse autoencoder
# ------------------------------------------------------------------------------------------------


class CustomSAE(nn.Module):
    """f = ReLU((z − b_dec) W_enc + b_enc),   ẑ = f W_dec + b_dec.

    `W_enc [D, F]`, `b_enc [F]`, `W_dec [F, D]` with rows of unit norm, `b_dec [D]`. It works on
    activations divided by the buffer's scale; `raw_weights` folds that scale into the biases.
    W_enc is kept as `W_enc_FD`, feature by feature, as its gradient comes.
    """

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator, screen: str = "float32"):
        super().__init__()
        rows_FD = nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.screen = screen  # precision in which `sparse_code` looks for active features
        self.half = False  # whether `dense_code` multiplies in bfloat16
        self.W_enc_FD = nn.Parameter(rows_FD.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(rows_FD)
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @torch.no_grad()
    def initialize_biases_(self, z_BD: Tensor, l0: float) -> None:
        """Start at the data's mean and with every feature firing on l0/F of the tokens, so that
        training never passes through the dense regime in which features die."""
        self.b_dec.copy_(z_BD.mean(0))
        product_BF = (z_BD - self.b_dec) @ self.W_enc
        rank = max(1, round(len(z_BD) * l0 / self.d_sae))
        self.b_enc.copy_(-product_BF.topk(rank, dim=0).values[-1])

    @property
    def W_enc(self) -> Tensor:
        return self.W_enc_FD.T

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def encode(self, z_BD: Tensor) -> Tensor:
        return torch.relu((z_BD - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f_BF: Tensor) -> Tensor:
        return f_BF @ self.W_dec + self.b_dec

    def forward(self, z_BD: Tensor) -> Tensor:
        return self.decode(self.encode(z_BD))

    def sparse_code(self, z_BD: Tensor) -> Code:
        weights = self.W_enc_FD, self.b_enc, self.W_dec, self.b_dec
        return Code(*SparseAutoencode.apply(z_BD, *weights, self.screen))

    def dense_code(self, z_BD: Tensor) -> Code:
        """The same by plain dense products: faster where many features fire, and on a GPU, there
        in bfloat16 where it has it (weights and sums stay float32)."""
        with torch.autocast(z_BD.device.type, torch.bfloat16, enabled=self.half):
            f_BF = self.encode(z_BD)
            z_hat_BD = self.decode(f_BF)
        row_N, column_N = f_BF.nonzero(as_tuple=True)
        return Code(z_hat_BD.float(), f_BF[row_N, column_N].float(), row_N, column_N)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_(min=1e-8))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Leave only the part of the gradient that turns a decoder row, not what lengthens it."""
        along_F = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
        self.W_dec.grad.addcmul_(self.W_dec, along_F[:, None], value=-1)

    @torch.no_grad()
    def raw_weights(self, scale: float) -> dict[str, Tensor]:
        """Weights of the same SAE for raw activations x = scale · z; features come out · scale."""
        return {"W_enc": self.W_enc.detach().contiguous(), "W_dec": self.W_dec.detach().clone(),
                "b_enc": self.b_enc * scale, "b_dec": self.b_dec * scale}


# ------------------------------------------------------------------------------------------------
# Feature groups: which features fire together, and how much each group shares
# ------------------------------------------------------------------------------------------------


class Sharing(NamedTuple):
    """How much the members of each group share, one value a group."""

    use_G: Tensor  # how far they may serve several domains, in [0, share_max]
    direction_G: Tensor  # how far they may point alike, in [share_min, share_max]


def sharing(statistics: GroupStatistics, share_min: float, share_max: float, share_even: float,
            kappa_max: float, kappa_random: float) -> Sharing:
    """Even groups share uses; those of them that are well conditioned share directions too.

    A group shares the more, the more evenly it serves the domains, and `share_max` from evenness
    `share_even` on. In direction only where it can afford to: a group is badly conditioned beyond
    kappa_max times the median group (or random vectors, where they have more), and then its
    members, which fire together and so must be told apart, are pushed apart harder than strangers,
    hardest at as far again beyond the limit as that is beyond random vectors. Conditioning is
    judged without the direction that a group's members have in common, which may be how things
    are: planted groups that share one have a large κ and no fault.
    """
    kappa_G = statistics.kappa_own_G
    limit = kappa_max * max(float(kappa_G.median()), kappa_random)
    excess = ((kappa_G - limit) / (limit - kappa_random)).clamp(-1, 1).float()
    use_G = share_max * (statistics.evenness_G / share_even).clamp(max=1)
    return Sharing(use_G, torch.where(excess > 0, share_min * excess, use_G))


# ------------------------------------------------------------------------------------------------
# Losses: pure functions of tensors
# ------------------------------------------------------------------------------------------------


def by_group(W_FD: Tensor, groups_GM: Tensor) -> Tensor:
    """Rows of each group [G, M, D]; `W_FD[groups_GM]` takes two to three times as long."""
    return W_FD.index_select(0, groups_GM.flatten()).view(*groups_GM.shape, -1)


class FramePotential(torch.autograd.Function):
    """Σ_{i≠j} ω_ij (w_i·w_j)² without the F × F Gram matrix; ω = 1 − s_g inside group g, else 1.

    ‖WᵀW‖_F² counts all pairs, so the diagonal Σ‖w_i‖⁴ and what the groups share is taken away:
    Σ_{i≠j} ω_ij (w_i·w_j)² = ‖WᵀW‖_F² − Σ‖w_i‖⁴ − Σ_g s_g (‖W_g W_gᵀ‖_F² − Σ_{i∈g}‖w_i‖⁴).
    Time O(F·D·(D + M)), memory O(F·D). Frame potential: Benedetto and Fickus 2003. Products
    are in `dtype`, to which V is W rounded; the rest keeps W's own.
    """

    @staticmethod
    def forward(ctx: Any, W_FD: Tensor, groups_GM: Tensor | None, share_G: Tensor | None,
                dtype: torch.dtype) -> Tensor:
        V_FD = W_FD.to(dtype)
        gram_DD = (V_FD.T @ V_FD).to(W_FD.dtype)
        square_F = torch.linalg.vector_norm(W_FD, dim=1).square()
        weight_F = torch.ones_like(square_F)  # of a row's own square in the gradient
        total = gram_DD.square().sum()
        gram_GMM = None
        if groups_GM is not None:
            V_GMD = by_group(V_FD, groups_GM)
            gram_GMM = share_G[:, None, None] * (V_GMD @ V_GMD.mT).to(W_FD.dtype)
            total = total - (gram_GMM.square().sum((1, 2)) / share_G.where(share_G != 0, 1)).sum()
            weight_F[groups_GM] -= share_G[:, None]
        total = total - (weight_F * square_F.square()).sum()
        mean = gram_DD.diagonal().mean()
        gram_DD.diagonal().sub_(mean)  # mostly a multiple of I, which need not go through rounding
        ctx.save_for_backward(W_FD, V_FD, gram_DD, gram_GMM, groups_GM, weight_F * square_F - mean)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_FD, V_FD, gram_DD, gram_GMM, groups_GM, own_F = ctx.saved_tensors
        out_FD = (V_FD @ gram_DD.to(V_FD.dtype)).to(W_FD.dtype)
        out_FD.addcmul_(W_FD, own_F[:, None], value=-1)
        if groups_GM is not None:
            within_FD = (gram_GMM.to(V_FD.dtype) @ by_group(V_FD, groups_GM)).flatten(0, 1)
            out_FD.sub_(within_FD.index_select(0, groups_GM.flatten().argsort()))
        return out_FD.mul_(4 * grad), None, None, None


def direction_loss(W_FD: Tensor, groups_GM: Tensor | None = None, share_G: Tensor | None = None,
                   dtype: torch.dtype | None = None) -> Tensor:
    """L_dir = (D/F²) Σ_i Σ_{j≠i} ω_ij (w_i·w_j)², in units of the least frame potential F²/D of F
    unit vectors (Welch bound); its floor at ω = 1 is 1 − D/F. Lower is better. Its products take
    factors of `dtype`, W's own unless told."""
    F, D = W_FD.shape
    return FramePotential.apply(W_FD, groups_GM, share_G, dtype or W_FD.dtype) * (D / F**2)


def gram_identity_loss(W_FD: Tensor) -> Tensor:
    """‖W Wᵀ − I‖_F² · D/F², the first proposal's penalty on the encoder in the same units."""
    F, D = W_FD.shape
    return ((W_FD.T @ W_FD).square().sum() - 2 * W_FD.square().sum() + F) * (D / F**2)


def max_cosine_loss(W_FD: Tensor, generator: torch.Generator, chunk: int = 8192) -> Tensor:
    """OrtSAE (arXiv 2509.22033): mean over features of (max_{j≠i} w_i·w_j)² within random chunks.

    The nearest neighbour is found without a gradient; the loss is then one product a feature.
    """
    order = torch.randperm(len(W_FD), generator=generator).to(W_FD.device)
    nearest = torch.empty_like(order)
    with torch.no_grad():
        for part in order.chunk(math.ceil(len(order) / chunk)):
            for rows in part.split(1024):
                cosine = W_FD[rows] @ W_FD[part].T
                cosine[rows[:, None] == part] = -math.inf
                nearest[rows] = part[cosine.argmax(dim=1)]
    chosen_FD = W_FD.index_select(0, nearest)  # W_FD[nearest]'s gradient would add in any order
    return torch.linalg.vecdot(W_FD, chosen_FD).square().mean()


def use_loss(mean_KF: Tensor, running_KF: Tensor, share_F: Tensor | None = None) -> Tensor:
    """L_use = Σ_i (1 − s_i) u_i · K/(K−1)·(1 − Σ_k p_ki²), a mean Gini impurity.

    u_i is feature i's part of all activation, p_ki the part of its own that is on domain k. 0 when
    no feature serves two domains, 1 when all serve all alike and none shares. Value and slope are
    taken at the running means, which are steadier than a batch; the gradient flows through the
    batch's means along that slope. u_i has none, so that neither growing nor
    shrinking a feature as a whole is rewarded, whether it shares or not. (A cosine of the domains'
    use falls when what is shared swells, and features that fire on most tokens decide it.)
    """
    K, keep_F = len(running_KF), 1.0 if share_F is None else 1 - share_F
    total_F = running_KF.sum(0)
    part_KF = running_KF / total_F.clamp(min=1e-12)
    pure_F = part_KF.square().sum(0)
    weight_F = keep_F / total_F.sum().clamp(min=1e-12) * K / (K - 1)
    value = (weight_F * total_F * (1 - pure_F)).sum()
    linear = (2 * weight_F * (pure_F - part_KF) * mean_KF).sum()
    return value + linear - linear.detach()


def domain_means(code: Code, domain_B: Tensor, count_K: Tensor, d_sae: int) -> Tensor:
    """Mean activation of every feature on the tokens of each domain, [K, F]; of `count_K` tokens,
    which may be more than are in `code`: the sum over the parts of a batch is the batch's mean."""
    index = domain_B[code.row_N] * d_sae + code.column_N
    total = torch.zeros(len(count_K) * d_sae, device=index.device).index_add(0, index, code.value_N)
    return total.view(len(count_K), d_sae) / count_K.clamp(min=1)[:, None]


# ------------------------------------------------------------------------------------------------
# Trainer
# ------------------------------------------------------------------------------------------------


class CustomTrainer:
    """Trains one SAE on E‖z − ẑ‖₂ + λ·E‖f‖₁ + α·ramp(t)·L_orth.

    α lives here, as `trainer.alpha`: the loss reads it and `trainer.config` reports it. λ is moved
    by a controller so that L0 meets the target. Dead features (silent for `resample_every` steps)
    are given the direction of what is reconstructed worst (Bricken et al. 2023). Everything that
    changes during training is in `state`; randomness depends on seed and step alone.
    """

    USE_MEMORY = 0.98  # of the running means, a step
    SKETCH_MEMORY = 0.5  # a regrouping

    def __init__(self, config: CustomSAEConfig, sae: CustomSAE, seed: int, n_domains: int = 2,
                 team: Team | None = None):
        if config.orthogonality not in ("off", "fixed", "adaptive", "max_cosine"):
            raise ValueError(f"orthogonality={config.orthogonality!r}; use off, fixed, adaptive "
                             "or max_cosine")
        if config.ortho_matrix not in ("decoder", "encoder"):
            raise ValueError(f"ortho_matrix={config.ortho_matrix!r}; use decoder or encoder")
        self.row, self.sae, self.seed, self.n_domains = config, sae, seed, n_domains
        self.team = team or Team()
        self.alpha = config.alpha
        self.moments = {f"{kind}.{name}": torch.zeros_like(parameter)  # Adam's
                        for kind in ("exp_avg", "exp_avg_sq")
                        for name, parameter in sae.named_parameters()}
        state = {
            "use_KF": torch.zeros(n_domains, sae.d_sae),  # running mean activations by domain
            "use_weight": torch.zeros(()),
            "silent_F": torch.zeros(sae.d_sae, dtype=torch.long),  # steps since a feature fired
            "groups_GM": torch.arange(sae.d_sae).view(-1, config.group_size),
            # until features are grouped nobody knows what must not be shared
            **{name: torch.full((sae.d_sae // config.group_size,), config.share_max)
               for name in Sharing._fields},
            "l_dir": torch.zeros(()),
            "pull_FD": torch.zeros(0),  # gradient of L_dir when it was last computed
        }
        self.device = sae.W_dec.device
        self.state = {name: part.to(self.device) for name, part in state.items()}
        self.sketch = CoactivationSketch(sae.d_sae, config.sketch_size, self.device)
        self.step_count = 0
        self.log_sparsity = math.log(config.sparsity_penalty)
        self.l0 = 2.0 * config.target_l0  # running
        self.history: list[dict[str, Any]] = []
        self.kappa_random = random_condition_number(config.group_size, sae.d_in)
        self.ortho_dtype = (faster_dtype(self.device) if config.ortho_dtype == "auto"
                            else getattr(torch, config.ortho_dtype))

    @property
    def config(self) -> dict[str, Any]:
        """The row as it trains now: α is the trainer's own."""
        return {**dataclasses.asdict(self.row), "alpha": self.alpha, "d_in": self.sae.d_in,
                "d_sae": self.sae.d_sae, "seed": self.seed}

    def step(self, z_BD: Tensor, domain_B: Tensor) -> dict[str, float]:
        """One step on normalised activations and their domain labels, both this process's share
        of the batch; returns the loss's terms over the whole batch."""
        n = len(z_BD) * self.team.size
        code = self.sae.sparse_code(z_BD) if self.is_sparse() else self.sae.dense_code(z_BD)
        error_B = (z_BD - code.z_hat_BD).norm(dim=1)
        fit, l1 = error_B.sum() / n, code.value_N.sum() / n
        count_K = self.team.sum_(torch.bincount(domain_B, minlength=self.n_domains))
        fired_F = self.team.sum_(torch.bincount(code.column_N, minlength=self.sae.d_sae)) > 0
        use_KF = domain_means(code, domain_B, count_K, self.sae.d_sae)
        self.update_use_(self.team.sum_(use_KF.detach().clone()))
        l_dir, l_use = self.direction_term(), self.use_term(use_KF)
        loss = self.total(fit, l1, l_dir, l_use)
        terms = self.whole_batch(fit, l1, len(code.row_N) / n, l_dir, l_use)
        self.check_finite(terms)
        self.sae.zero_grad()
        loss.backward()
        self.add_direction_gradient_(fired_F)
        for parameter in self.sae.parameters():
            self.team.sum_(parameter.grad)
        self.sae.remove_parallel_gradient_()
        self.adam_step_()
        self.sae.normalize_decoder_()
        self.update_sparsity_(terms["l0"])
        self.update_activity_(code, fired_F, z_BD, error_B.detach())
        self.step_count += 1
        self.regroup_if_due_()
        return terms

    def total(self, fit: Any, l1: Any, l_dir: Any, l_use: Any) -> Any:
        """The objective."""
        l_orth = l_dir + self.row.eta * l_use
        return fit + math.exp(self.log_sparsity) * l1 + self.alpha * self.ramp() * l_orth

    def whole_batch(self, fit: Tensor, l1: Tensor, l0: float, l_dir: Tensor,
                    l_use: Tensor) -> dict[str, float]:
        """The objective and its terms as numbers; of fit, l1 and l0 each process has a part."""
        parts = torch.stack([fit.detach(), l1.detach(), torch.full_like(fit, l0)])
        fit, l1, l0 = self.team.sum_(parts).tolist()
        l_dir, l_use = l_dir.item(), l_use.item()
        return {"loss": self.total(fit, l1, l_dir, l_use), "fit": fit, "l1": l1, "l0": l0,
                "l_dir": l_dir, "l_use": l_use, "l_orth": l_dir + self.row.eta * l_use,
                "lambda": math.exp(self.log_sparsity), "alpha": self.alpha, "ramp": self.ramp(),
                "lr": self.learning_rate()}

    def is_sparse(self) -> bool:
        return self.device.type == "cpu" and self.l0 < 0.1 * self.sae.d_sae

    def ramp(self) -> float:
        """0 to 1 over the first `ramp_fraction` of training: features form before they part."""
        return min(1.0, self.step_count / max(1, self.row.ramp_fraction * self.row.steps))

    def direction_term(self) -> Tensor:
        """L_dir without its gradient, which `add_direction_gradient_` adds.

        Both are computed every `ortho_every` steps and held in between: directions turn little in
        a few steps, and so the term costs next to nothing.
        """
        if self.row.orthogonality != "off" and self.step_count % self.row.ortho_every == 0:
            matrix = self.kept_apart()
            l_dir = self.direction_now(matrix)
            self.state["l_dir"] = l_dir.detach()
            self.state["pull_FD"] = torch.autograd.grad(l_dir, matrix)[0]
        return self.state["l_dir"]

    def kept_apart(self) -> nn.Parameter:
        return self.sae.W_enc_FD if self.row.ortho_matrix == "encoder" else self.sae.W_dec

    def direction_now(self, W_FD: Tensor) -> Tensor:
        row = self.row
        if row.ortho_matrix == "encoder":
            if row.orthogonality == "fixed":
                return gram_identity_loss(W_FD)
            W_FD = nn.functional.normalize(W_FD, dim=1)
        if row.orthogonality == "max_cosine":
            return max_cosine_loss(W_FD, randomness("chunks", self.seed, self.step_count))
        if row.orthogonality == "fixed":
            return direction_loss(W_FD, dtype=self.ortho_dtype)
        return direction_loss(W_FD, self.state["groups_GM"], self.state["direction_G"],
                              self.ortho_dtype)

    def add_direction_gradient_(self, fired_F: Tensor) -> None:
        """Turn the features that fired. (Adam makes equal steps of small gradients and large ones:
        a rare feature, turned by this term alone between the batches in which it fires, leaves its
        encoder behind and dies; a tenth of all did.) Once in a team, whose gradients are summed."""
        if self.row.orthogonality != "off" and not self.team.rank:
            strength_F = self.alpha * self.ramp() * fired_F
            self.kept_apart().grad.addcmul_(self.state["pull_FD"], strength_F[:, None])

    def use_term(self, use_KF: Tensor) -> Tensor:
        if self.row.orthogonality != "adaptive" or not self.row.eta:
            return torch.zeros((), device=self.device)
        groups_GM, share_F = self.state["groups_GM"], torch.zeros_like(self.sae.b_enc)
        share_F[groups_GM] = self.state["use_G"][:, None].expand(groups_GM.shape)
        return use_loss(use_KF, self.running_use(), share_F)

    def running_use(self) -> Tensor:
        return self.state["use_KF"] / self.state["use_weight"].clamp(min=1e-12)

    def learning_rate(self) -> float:
        """Linear warm-up, constant, linear decay to zero over the last `decay_fraction`."""
        row, t = self.row, self.step_count
        warm = min(1.0, (t + 1) / max(1, row.warmup_steps))
        decay = min(1.0, (row.steps - t) / max(1.0, row.decay_fraction * row.steps))
        return row.learning_rate * warm * decay

    @torch.no_grad()
    def adam_step_(self) -> None:
        """Adam (Kingma and Ba 2015), by torch's function: its class imports torch's compiler at the
        first step, which takes a second and is not used here."""
        names, parameters = zip(*self.sae.named_parameters())
        first, second = ([self.moments[f"{kind}.{name}"] for name in names]
                         for kind in ("exp_avg", "exp_avg_sq"))
        steps = [torch.full((), float(self.step_count), device=self.device) for _ in names]
        adam(
            [*parameters], [parameter.grad for parameter in parameters], first, second, [], steps,
            fused=True, amsgrad=False, lr=self.learning_rate(), beta1=0.9, beta2=0.999,
            weight_decay=0.0, eps=1e-8, maximize=False)

    def check_finite(self, terms: dict[str, float], odd: Sequence[str] = ()) -> None:
        if odd or not all(math.isfinite(value) for value in terms.values()):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
            place = f"step {self.step_count}, seed {self.seed}"
            raise UserError(f"non-finite {', '.join(odd) or 'loss'} at {place}: {shown}; "
                            "a smaller learning_rate or alpha may help")

    def update_use_(self, use_KF: Tensor) -> None:
        self.state["use_KF"].lerp_(use_KF, 1 - self.USE_MEMORY)
        one = torch.ones_like(self.state["use_weight"])
        self.state["use_weight"].lerp_(one, 1 - self.USE_MEMORY)

    def update_sparsity_(self, l0: float) -> None:
        """Move log λ so that the running L0 meets its target.

        Proportional to the relative excess and to its trend, so that it settles and does not
        swing; bounded, so that a burst of new features does not starve the old ones.
        """
        before, self.l0 = self.l0, 0.9 * self.l0 + 0.1 * l0
        excess = math.log(max(self.l0, 1e-3) / self.row.target_l0)
        trend = math.log(max(self.l0, 1e-3) / max(before, 1e-3))
        move = 0.02 * excess + 0.5 * trend
        limit = self.row.sparsity_rate
        self.log_sparsity += max(-limit, min(limit, move))

    @torch.no_grad()
    def update_activity_(self, code: Code, fired_F: Tensor, z_BD: Tensor, error_B: Tensor) -> None:
        """Count silence, feed the co-activation sketch, and wake dead features when it is time."""
        row, t = self.row, self.step_count
        self.state["silent_F"].add_(1).masked_fill_(fired_F, 0)
        if t % row.sketch_every == 0:
            n = len(z_BD) * self.team.size
            self.sketch.add_(code, n, randomness("sketch", self.seed, t), self.team.share(n))
        if t % row.resample_every == 0 and 0 < t <= row.resample_fraction * row.steps:
            self.resample_(code, z_BD, error_B)

    def resample_(self, code: Code, z_BD: Tensor, error_B: Tensor) -> None:
        """Point silent features at what tokens of large error still lack.

        Tokens are drawn with probability proportional to their squared error; the bias lets the
        new feature fire where a token has at least half of the drawn token's share of it.
        """
        dead = (self.state["silent_F"] >= self.row.resample_every).nonzero().squeeze(1)
        if not len(dead):
            return
        sae, n = self.sae, len(z_BD) * self.team.size
        share = self.team.share(n)
        dead = dead[: n // 4]  # each needs a token of its own, or twins are born
        everybody_B = torch.zeros(n)
        everybody_B[share] = error_B.square().cpu()
        generator = randomness("resample", self.seed, self.step_count)
        drawn = torch.multinomial(self.team.sum_(everybody_B), len(dead), generator=generator)
        mine = ((drawn >= share.start) & (drawn < share.stop)).to(self.device)
        here = drawn.to(self.device)[mine] - share.start
        lacking, centred = torch.zeros(2, len(dead), sae.d_in, device=self.device)
        lacking[mine], centred[mine] = (z_BD - code.z_hat_BD)[here], z_BD[here] - sae.b_dec
        direction = nn.functional.normalize(self.team.sum_(lacking), dim=1)
        sae.W_dec[dead] = sae.W_enc_FD[dead] = direction
        overlap = (self.team.sum_(centred) * direction).sum(1)
        sae.b_enc[dead] = -0.5 * overlap.clamp(min=0.02)
        for name, part in self.moments.items():
            if not name.endswith("b_dec"):
                part[dead] = 0
        self.state["silent_F"][dead] = 0
        self.state["use_KF"][:, dead] = 0

    def regroup_if_due_(self) -> None:
        """First when α is at its full strength, whatever `regroup_every`: L_use begins with it."""
        first = round(self.row.ramp_fraction * self.row.steps)
        later = self.step_count > first and self.step_count % self.row.regroup_every == 0
        if self.step_count == first or later:
            self.regroup_()

    @torch.no_grad()
    def regroup_(self) -> None:
        """Group features anew by co-activation and set what each group shares.

        All modes do so, for the history's sake; only `adaptive` makes a difference of it.
        """
        row, use_KF, W_FD = self.row, self.running_use().cpu(), self.sae.W_dec.cpu()
        self.gather_sketch_()
        rows_FR = self.sketch.unit_rows().cpu()
        groups = group_features(rows_FR, row.group_size, self.seed)
        statistics = group_statistics(rows_FR, use_KF, W_FD, groups)
        share = sharing(statistics, row.share_min, row.share_max, row.share_even, row.kappa_max,
                        self.kappa_random)
        for name, found in (("groups_GM", groups), *share._asdict().items()):
            self.state[name] = self.team.same_(found.to(self.device))
        self.sketch.decay_(self.SKETCH_MEMORY)
        kappa = statistics.kappa_G
        self.record({
            "kappa_median": float(kappa.median()), "kappa_p90": float(kappa.quantile(0.9)),
            "kappa_max": float(kappa.max()), "share_use": float(share.use_G.mean()),
            "share_mean": float(share.direction_G.mean()),
            "share_min": float(share.direction_G.min()),
            "share_max": float(share.direction_G.max()),
            "coactivation": float(statistics.coactivation_G.mean()),
            "evenness": float(statistics.evenness_G.mean()),
        })

    def gather_sketch_(self) -> None:
        """What all have seen to the first; the others start from nothing."""
        for part in vars(self.sketch).values():
            self.team.sum_(part)
            if self.team.rank:
                part.zero_()

    def record(self, values: dict[str, float]) -> None:
        """A line of the training curves."""
        place = {"seed": self.seed, "step": self.step_count,
                 "tokens": self.step_count * self.row.batch_size}
        self.history.append({**place, **values})

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that must survive a crash: tensors, and plain values for a JSON note.

        Asked of all of a team, given whole by the first.
        """
        self.gather_sketch_()
        tensors = {f"sae.{name}": part for name, part in self.sae.state_dict().items()}
        tensors |= {f"adam.{name}": part for name, part in self.moments.items()}
        tensors |= {f"state.{name}": part for name, part in self.state.items()}
        tensors |= {f"sketch.{name}": part for name, part in vars(self.sketch).items()}
        note = {"step_count": self.step_count, "log_sparsity": self.log_sparsity, "l0": self.l0,
                "alpha": self.alpha, "history": self.history}
        return tensors, note

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        for name, part in self.sae.state_dict().items():
            part.copy_(tensors[f"sae.{name}"])
        for name, part in self.moments.items():
            part.copy_(tensors[f"adam.{name}"])
        for name in self.state:
            self.state[name] = tensors[f"state.{name}"].to(self.device)
        for name in vars(self.sketch):
            part = tensors[f"sketch.{name}"].to(self.device)
            setattr(self.sketch, name, torch.zeros_like(part) if self.team.rank else part)
        for name, value in note.items():
            setattr(self, name, value)


def new_trainer(config: CustomSAEConfig, buffer: ActivationBuffer, seed: int,
                team: Team) -> CustomTrainer:
    """An SAE before its first step, the same in all of a team."""
    d_in = buffer.acts_ND.shape[1]
    screen = faster_screen() if config.encoder_screen == "auto" else config.encoder_screen
    sae = CustomSAE(d_in, config.expansion * d_in, randomness("weights", seed), screen)
    sae.initialize_biases_(buffer.batch(seed, 0, config.batch_size)[0], 2 * config.target_l0)
    sae.half = team.device.type == "cuda" and faster_dtype(team.device) == torch.bfloat16
    for part in sae.to(team.device).state_dict().values():
        team.same_(part)
    return CustomTrainer(config, sae, seed, team=team)


def train_sae(config: CustomSAEConfig, buffer: ActivationBuffer, seed: int, checkpoint: Path,
              interrupts: Interrupts, log: Callable[[dict], None], team: Team) -> CustomTrainer:
    """Train the SAE of one seed, continuing from `checkpoint` where there is one."""
    trainer = new_trainer(config, buffer, seed, team)
    if (found := read_tensors(checkpoint)) is not None:
        trainer.load_state_dict(*found)
    if int(team.sum_(torch.tensor(trainer.step_count))) != team.size * trainer.step_count:
        raise UserError(f"processes found different checkpoints in {checkpoint.parent}; all of "
                        "them must see the same SAE_CACHE_DIR")
    bar = progress(range(config.steps), f"seed {seed}", initial=trainer.step_count)
    share = team.share(config.batch_size)
    with interrupts.deferred():
        while trainer.step_count < config.steps:
            z_BD, domain_B = buffer.batch(seed, trainer.step_count, config.batch_size, share,
                                          config.shuffle_domains)
            terms = trainer.step(z_BD.to(team.device), domain_B.to(team.device))
            bar.update()
            if trainer.step_count % config.log_every == 0:
                trainer.record(terms)
                bar.set_postfix(loss=f"{terms['loss']:.3f}", l0=f"{terms['l0']:.0f}")
                log(trainer.history[-1])
            interrupted = bool(team.sum_(torch.tensor(interrupts.signal or 0)))
            left = config.steps - trainer.step_count
            due = trainer.step_count % config.checkpoint_every == 0
            if interrupted or not left or due and 2 * left >= config.checkpoint_every:
                tensors, note = trainer.state_dict()
                trainer.check_finite(terms, non_finite(tensors))  # before it is kept
                if LEADER:
                    write_tensors(checkpoint, tensors, note)
            if interrupted:
                interrupts.signal = interrupts.signal or signal.SIGTERM
                raise Interrupts.Stop
    bar.close()
    return trainer


# ------------------------------------------------------------------------------------------------
# Evaluations: plain numbers; what they measure, which way is better, where they come from
# ------------------------------------------------------------------------------------------------


@dataclass
class TrainedSAE:
    """A trained SAE with the scale that takes raw activations to its own."""

    sae: CustomSAE
    scale: float

    @torch.no_grad()
    def add_features_(self, total_OF: Tensor, owner_N: Tensor, x_ND: Tensor) -> None:
        """Add the activations of raw residuals to the rows of their owners, in raw units, as the
        exported SAE gives them: a probe's L2 penalty is not blind to scale."""
        code = self.sae.sparse_code(x_ND / self.scale)
        place_N = owner_N[code.row_N] * self.sae.d_sae + code.column_N
        total_OF.view(-1).index_add_(0, place_N, code.value_N * self.scale)

    @torch.no_grad()
    def splice(self, x_BTD: Tensor, keep_BT: Tensor) -> Tensor:
        """The reconstruction in place of the residual, where a token is kept; sinks stay."""
        rebuilt = (self.sae(x_BTD.float() / self.scale) * self.scale).to(x_BTD.dtype)
        return torch.where(keep_BT[..., None], rebuilt, x_BTD)


@torch.no_grad()
def decoder_metrics(sae: CustomSAE, use_KF: Tensor) -> dict[str, Any]:
    """How far apart features are, by the loss's own measures and by counting.

    max_decoder_cosine: mean over features of the largest cosine with another one. l_dir and its
    floor 1 − D/F; l_use, the impurity of their use (both unweighted, lower is better).
    duplicates: pairs of cosine > 0.9 that serve different domains (at least nine tenths of the
    use of one is forget text, of the other retain text): general features split into two copies.
    """
    W_FD = nn.functional.normalize(sae.W_dec, dim=1)
    share_KF = use_KF / use_KF.sum(1, keepdim=True).clamp(min=1e-12)
    purity_F = share_KF[FORGET] / share_KF.sum(0).clamp(min=1e-12)
    used_F = share_KF.sum(0) > 0
    biology, other = used_F & (purity_F > 0.9), used_F & (purity_F < 0.1)
    largest, duplicates = [], 0
    for start in range(0, len(W_FD), 1024):
        cosine = W_FD[start : start + 1024] @ W_FD.T
        cosine.diagonal(start).fill_(-1)
        largest.append(cosine.max(dim=1).values)
        close = cosine[biology[start : start + 1024]][:, other] > DUPLICATE_COSINE
        duplicates += int(close.sum())
    return {
        "max_decoder_cosine": float(torch.cat(largest).mean()),
        "l_dir": float(direction_loss(W_FD)), "l_dir_floor": 1 - sae.d_in / sae.d_sae,
        "l_use": float(use_loss(use_KF, use_KF)), "duplicates": duplicates,
        "forget_features": int(biology.sum()),
    }


def evaluate_reconstruction(trained: TrainedSAE, material: Material,
                            use_KF: Tensor) -> dict[str, Any]:
    """How much of the activations, and of the language model's prediction, the SAE preserves.

    ce_score = (CE_ablated − CE_spliced)/(CE_ablated − CE_unmodified): 1 where splicing the SAE in
    changes nothing, 0 where it is as bad as zeros (SAEBench core). Held-out text of both domains
    in equal parts, sinks left as they are in every variant.
    """
    held, z_ND = material.heldout, material.heldout_sample() / trained.scale
    named = held["domain"][held["rows"]] != OTHER
    rows = held["rows"][named]
    x, keep = held["x"][rows], held["keep"][rows]
    spliced = material.lm.losses(held["tokens"][rows], trained.splice(x, keep))
    ce, zero, base = (float(part.double().mean())
                      for part in (spliced, held["zero"][named], held["base"][named]))
    return {**reconstruction_metrics(trained.sae, z_ND), **decoder_metrics(trained.sae, use_KF),
            "ce_sae": ce, "ce_zero": zero, "ce_base": base,
            "ce_score": (zero - ce) / (zero - base) if zero != base else None,
            "tokens": len(z_ND)}


def evaluate_sparse_probing(trained: TrainedSAE, material: Material) -> dict[str, Any]:
    """How well single features, or few, tell texts of a class from others; higher is better,
    chance is 0.5.

    SAEBench's sparse probing without its choice of the full-width probe on test data. The
    same probes on the raw residual stream (`llm_…`) are the reference. What it cannot tell:
    whether a feature means the class or something that goes with it.
    """
    config, details = material.config, []
    for name, texts in material.probe_sets.items():
        llm = material.cached(
            f"probe-llm-{name.replace('/', '_')}",
            lambda texts=texts: ({}, probe_table(texts.pooled(add_rows_, texts.acts_ND.shape[1]),
                                                 texts, config)),
            config.probe_train, config.probe_test, texts.causes,
            source_of(probe_table, probe_accuracy, binary_task, ProbeSet, Material.probe_set),
        )[1]
        sae = probe_table(texts.pooled(trained.add_features_, trained.sae.d_sae), texts, config)
        details.append({"dataset_name": f"{name}_results",
                        **{f"llm_{key}": value for key, value in llm.items()},
                        **{f"sae_{key}": value for key, value in sae.items()}})
    names = [key for key in details[0] if key != "dataset_name"] if details else []
    means = {name: float(np.mean([row[name] for row in details if name in row])) for name in names}
    return {**means, "details": details}


# ------------------------------------------------------------------------------------------------
# Results: what a run folder holds
# ------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------
# Run
# ------------------------------------------------------------------------------------------------


class Clock:
    """Seconds spent in each phase by this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def evaluate_all(trained: dict[int, TrainedSAE], material: Material, buffer: ActivationBuffer,
                 name: str, clock: Clock) -> dict[int, dict[str, dict[str, Any]]]:
    """All four evaluations of every seed's SAE, by seed and part; each is kept in the cache as soon
    as it is done, where the first of a team finds those that the others did."""
    config, team = material.config, material.team
    statistics = functools.cache(
        lambda seed: feature_statistics(trained[seed], buffer, config.frequency_tokens))
    evaluations = {
        "reconstruction": lambda seed: evaluate_reconstruction(trained[seed], material,
                                                               statistics(seed).use_KF),
        "conditioning": lambda seed: evaluate_conditioning(trained[seed], material),
        "sparse_probing": lambda seed: evaluate_sparse_probing(trained[seed], material),
        "unlearning": lambda seed: evaluate_unlearning(trained[seed], material, statistics(seed),
                                                       seed),
    }
    weights = {seed: checksum(dict(one.sae.state_dict()), str(one.scale))
               for seed, one in trained.items()}

    def result(part: str, seed: int) -> dict[str, Any]:
        with clock.phase(part):
            causes = (weights[seed], config, material.causes, EVALUATION_CODE)
            return material.cache.get(f"{name}/{part}-{seed}", causes,
                                      lambda: ({}, evaluations[part](seed)))[1]

    jobs = [(part, seed) for part in evaluations for seed in trained]
    done = {job: result(*job) for job in jobs[team.rank :: team.size]}
    team.wait()
    return {seed: {part: done.get((part, seed)) or result(part, seed) for part in evaluations}
            for seed in trained if LEADER}


def run_experiment(out_dir: Path, interrupts: Interrupts, team: Team) -> dict[str, Any] | None:
    """Train and evaluate the row that `out_dir` names; returns what final_info.json holds, to the
    first of a team."""
    run, budget = out_dir.resolve().name, os.environ.get("SAE_BUDGET", "full")
    config = resolve_config(run, budget, out_dir.resolve().parent)
    cache = Cache(Path(os.environ.get("SAE_CACHE_DIR") or ".cache"))
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file; name a folder that is new or a run's own")
    out_dir.mkdir(parents=True, exist_ok=True)
    if links := [path for path in out_dir.rglob("*") if path.is_symlink()]:
        raise UserError(f"{links[0]} is a link and may lead out of the run folder; remove it")
    lock = cache.lock(f"run-{digest(str(out_dir.resolve()))}", timeout=0)
    try:
        with lock if LEADER else contextlib.nullcontext():
            return run_locked(out_dir, run, budget, config, cache, interrupts, team)
    except Timeout:
        raise UserError(f"another process works on {out_dir}; wait for it, or stop it") from None


def set_aside_results(out_dir: Path, record: dict[str, Any]) -> None:
    """Results of another configuration must not lie beside this one's weights, nor be lost."""
    before = read_result(out_dir)
    if before and before["config"] != json.loads(to_json(record)):
        say(f"{out_dir} held results of another configuration; they are in final_info.old.json now")
        os.replace(out_dir / "final_info.json", out_dir / "final_info.old.json")


def run_locked(out_dir: Path, run: str, budget: str, config: CustomSAEConfig, cache: Cache,
               interrupts: Interrupts, team: Team) -> dict[str, Any] | None:
    clock = Clock()
    with clock.phase("download"):
        substrate = choose_substrate(os.environ.get("SAE_SUBSTRATE", "auto"), cache)
        substrate.fetch()
    material = Material(substrate, config, cache, team)
    say(f"{run}: {PURPOSE[run]}; substrate {substrate.name}, budget {budget}")
    with clock.phase("activations"):
        buffer = material.activations()
    name = f"{substrate.name}/runs/{digest(config, material.causes, len(buffer), TRAINING_CODE)}"
    record = {**dataclasses.asdict(config), "run": run, "seeds": config.seeds,
              "d_in": buffer.acts_ND.shape[1], "d_sae": config.expansion * buffer.acts_ND.shape[1],
              "substrate": substrate.name, "budget": budget, "model_name": substrate.model_name,
              "hook_name": hook_name(substrate), "train_tokens_unique": len(buffer),
              "activation_scale": buffer.scale}
    if LEADER:
        set_aside_results(out_dir, record)
        write_text(out_dir / "config.json", to_json(record, 2))
    logger = Logger(run, record, f"{substrate.name}-{budget}", cache)
    trainers, trained = {}, {}
    for seed in config.seeds:
        with clock.phase("training"):
            trainers[seed] = train_sae(config, buffer, seed, cache.path(f"{name}/train-{seed}"),
                                       interrupts, logger.log, team)
        for line in sorted(trainers[seed].history, key=lambda line: "loss" not in line):
            logger.log(line)  # what an earlier process trained, and the groupings after the rest
        trained[seed] = TrainedSAE(trainers[seed].sae.cpu(), buffer.scale)
        record["alpha"] = trainers[seed].alpha
        if LEADER:
            export_sae(trained[seed], out_dir / f"seed_{seed}", substrate, trainers[seed].config)
    evaluations = evaluate_all(trained, material, buffer, name, clock)
    if not LEADER:
        return None
    history = [line for trainer in trainers.values() for line in trainer.history]
    info = collect(run, config, material, record, trainers, evaluations, clock, out_dir)
    write_text(out_dir / "history.jsonl", "".join(to_json(line) + "\n" for line in history))
    write_text(out_dir / "final_info.json", to_json(info, 1))
    update_notes(out_dir.resolve().parent / "notes.txt", run, info, cache)
    logger.finish(info)
    return info


def collect(run: str, config: CustomSAEConfig, material: Material, record: dict,
            trainers: dict[int, CustomTrainer], by_seed: dict[int, dict], clock: Clock,
            out_dir: Path) -> dict[str, Any]:
    """final_info.json: SAEBench's keys first, then the study's own."""
    losses = {seed: [line["loss"] for line in trainer.history if "loss" in line]
              for seed, trainer in trainers.items()}
    rows = [{"seed": seed, **flat_metrics(parts), "final_loss": losses[seed][-1]}
            for seed, parts in by_seed.items()]
    evaluations = list(by_seed.values())
    numbers = [{key: value for key, value in row.items() if key != "seed"} for row in rows]
    means, stderrs = mean_and_stderr(numbers)
    probing = [parts["sparse_probing"] for parts in evaluations]
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    where = environment(material)
    info = {
        **sae_bench_part(run, config, material, means, probing, record["d_in"]),
        "run": run, "substrate": record["substrate"], "budget": record["budget"],
        "config": record, "means": means, "stderrs": stderrs, "seeds": rows,
        **{part: {"per_seed": [parts[part] for parts in evaluations]}
           for part in ("reconstruction", "conditioning", "unlearning")},
        "comparisons": comparisons(rows, evaluations, record, where["language_model_dtype"],
                                   out_dir),
        "skipped": material.corpus["skipped"], "environment": where,
        "timing": {**{f"{phase}_seconds": seconds for phase, seconds in clock.seconds.items()},
                   "peak_memory_gb": usage / (1e9 if sys.platform == "darwin" else 1e6)},
    }
    return {**info, "sha256": result_checksum(info)}


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------

HELP = "the last part of --out_dir selects a row:\n  run     mode           α\n" + "\n".join(
    f"  {name:7s} {row['orthogonality']:10s} {row.get('alpha', 'best'):>5}  {PURPOSE[name]}"
    for name, row in RUNS.items()
) + """

environment variables:
  SAE_SUBSTRATE  auto (default) | pythia | standin: language model and text
  SAE_BUDGET     full (default) | smoke: the same code in about a minute
  SAE_CACHE_DIR  where downloads, activations and checkpoints are kept (default .cache)
  WANDB_MODE     online | offline | disabled (default: online if signed in, else offline)"""


def quiet_libraries() -> None:
    """Silence what a user cannot act on; errors still come through."""
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate sparse autoencoders with adaptive orthogonality.",
        epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="run folder, run_1 … run_10")
    out_dir = parser.parse_args(arguments).out_dir
    quiet_libraries()
    keep_freed_memory()
    sys.stdout.reconfigure(errors="replace")  # κ on an ASCII terminal
    interrupts = Interrupts()
    try:
        interrupts.install()
        info = run_experiment(out_dir, interrupts, Team())
        if info:
            print(f"{info['run']} on {info['substrate']} ({info['budget']}), mean ± standard error "
                  f"of {len(info['seeds'])} seeds\n{summary_table(info)}\nwritten to {out_dir}")
        return 0
    except Interrupts.Stop:
        interrupts.waits = True  # a second signal must not cut the farewell short
        say(f"stopped; `python experiment.py --out_dir={out_dir}` continues where this left off")
        return 128 + interrupts.signal
    except (UserError, SafetensorError) as error:  # transformers writes the unpacked model itself
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
