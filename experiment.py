"""Adaptive orthogonal feature learning in sparse autoencoders (SAEs), in one script.

    python experiment.py --out_dir=run_3

trains SAEs on the residual stream of a language model with the row `run_3` of the table below,
evaluates them and writes the folder. This file is what an experiment may change: run table,
activation buffer, SAE, how features are grouped and what they share, losses, trainer, run. What
must stay the same between two runs that are compared is the laboratory, in lab/.

Shapes are suffixes: B tokens of a batch, D residual width, F features, K domains of text, N entries
of a flat list, R tokens of which lists are kept, L the longest of them.
"""

import dataclasses
import functools
import math
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # Ctrl-C during the imports ends it, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    # lab first: it keeps the text of what is loaded
    from lab.console import ENVIRONMENT, Clock, Parser, Progress, UserError, report, show
    from lab.device import Readings, to_device
    from lab.distributed import Interrupts, Outcome, Processes, keep_freed_memory
    from lab.evaluations import evaluate
    from lab.language_model import faster_dtype
    from lab.pairs import (Firing, FramePotential, PairPotential, cofiring_sums, firing,
                           max_cosine_loss, partner_condition_numbers, strongest)
    from lab.results.exports import hook_name
    from lab.results.final_info import best_run, collect
    from lab.results.folder import RunFolder
    from lab.results.notes import summary
    from lab.results.tracking import Tracker
    from lab.sparse import (Code, DenseAutoencode, DenseCode, ExportedSAE, HeldGradient,
                            Limit, SparseAutoencode, above, faster_screen, no_limit)
    from lab.settings import Settings
    from lab.shards import Shards, Stream, gathered, open_streams
    from lab.storage import (Cache, code_digest, digest, non_finite, randomness, read_tensors,
                             write_tensors)
    from lab.substrates import Substrate, choose_source, quiet_libraries
    from lab.substrates.texts import FORGET, RETAIN, SIZES, sides

    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as missing:
    sys.exit(f"error: package {missing.name} is missing; pip install -r requirements.txt gives it")
except Exception as broken:
    place, reason = traceback.extract_tb(broken.__traceback__)[-1], " ".join(str(broken).split())
    raise SystemExit(f"error: a package is there but cannot be imported: {type(broken).__name__}: "
                     f"{reason} ({place.filename}, line {place.lineno})") from broken

# --- The ten runs, and everything in which a run can differ -------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "run_1": dict(purpose="α sweep, strong", orthogonality="adaptive", alpha=0.10),
    "run_2": dict(purpose="α sweep, medium", orthogonality="adaptive", alpha=0.05, n_seeds=6),
    "run_3": dict(purpose="α sweep, weak", orthogonality="adaptive", alpha=0.01),
    "run_4": dict(purpose="grouping, frequent", orthogonality="adaptive", regroup_every=100),
    "run_5": dict(purpose="grouping, rare", orthogonality="adaptive", regroup_every=500),
    "run_6": dict(purpose="direction only", orthogonality="adaptive", eta=0.0),
    "run_7": dict(purpose="fixed orthogonal SAE", orthogonality="fixed", n_seeds=6),
    "run_8": dict(purpose="vanilla SAE: the trained baseline", orthogonality="off", alpha=0.0,
                  n_seeds=6),
    "run_9": dict(purpose="OrtSAE, the published competitor (α is its γ)",
                  orthogonality="max_cosine", alpha=0.25, n_seeds=6),
    "run_10": dict(purpose="the best of runs 1-5 on fresh seeds", orthogonality="adaptive",
                   first_seed=100),
}
ROWS = "\n".join(f"  {name:7s} {row.get('purpose', '')}" for name, row in RUNS.items())
CANDIDATES = ("run_1", "run_2", "run_3", "run_4", "run_5")  # of which run_10 repeats the best
BUDGETS: dict[str, dict[str, Any]] = {  # overrule the row, so runs 2, 4, 5 are one at smoke
    "full": {},
    "smoke": dict(expansion=2, steps=120, warmup_steps=20, n_seeds=2, regroup_every=40,
                  resample_every=30, checkpoint_every=40, log_every=10),
    "paper": dict(expansion=64, steps=25_000, batch_size=4096, warmup_steps=1000, n_seeds=3,
                  resample_every=250, checkpoint_every=1000, log_every=100, buffer_gigabytes=8.0),
}
ACTIVATIONS = ("relu", "batch_topk")
MODES = ("off", "fixed", "adaptive", "max_cosine", "gram_encoder")


@dataclass(frozen=True)
class CustomSAEConfig(Settings):
    """One row of the study. Defaults are shared by all runs; RUNS holds the differences."""

    purpose: str = ""
    """What the run is there to find out."""
    activation: str = "relu"
    """ReLU with an L1 penalty, or BatchTopK (arXiv 2412.06410), one of ACTIVATIONS."""
    orthogonality: str = "adaptive"
    """What keeps features apart, one of MODES: nothing; L_dir of all pairs alike; L_dir of features
    that fire together, and L_use; OrtSAE's penalty; a penalty on the encoder's Gram matrix."""
    alpha: float = 0.05
    """Strength of the orthogonality loss; the trainer takes it and keeps it as `trainer.alpha`."""
    eta: float = 4.0
    """Weight of L_use beside L_dir (adaptive)."""
    direction_every: int = 8
    """Steps between two computations of L_dir's gradient, which every step uses."""
    regroup_every: int = 250
    """Steps between two groupings; the first is when α has ramped up."""
    group_size: int = 64
    """Partners a feature: those with which it fires most beyond chance."""
    counted_tokens: int = 16_384
    """Tokens before a grouping over which it is counted which features fire together."""
    direction_tokens: int = 128
    """Tokens of a batch over whose active features L_dir is taken (adaptive)."""
    all_pairs: float = 0.25
    """Weight in L_dir of all pairs alike, beside those that fire together (adaptive)."""
    share_use: float = 1.0
    """Largest part of its weight in L_use that a feature is spared, and all until grouped."""
    share_even: float = 0.5
    """Evenness between domains from which a feature counts as even."""
    expansion: int = 8
    """F / D."""
    target_l0: float = 40.0
    """Active features a token, held by the sparsity controller."""
    sparsity_penalty: float = 0.08
    """Where λ starts; it ends near this."""
    sparsity_rate: float = 0.01
    """Largest change of log λ a step."""
    steps: int = 600
    batch_size: int = 2048
    """Tokens, over all processes."""
    buffer_gigabytes: float = 2.0
    """Memory for activations, over all processes; what it does not hold is streamed."""
    forget_share: float = 0.4
    """Part of every batch that is forget text, however much of it there is."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    """Of the learning rate."""
    ramp_fraction: float = 0.2
    """First part of training, over which α grows from zero."""
    decay_fraction: float = 0.2
    """Last part of training, over which the learning rate falls to zero."""
    resample_every: int = 50
    """Features silent for so many steps are given a new direction."""
    resample_fraction: float = 0.8
    """No resampling after this part of training."""
    first_seed: int = 0
    n_seeds: int = 3
    log_every: int = 25
    """Steps between two lines of the training curves."""
    checkpoint_every: int = 250
    """Steps."""

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.n_seeds))

    def __post_init__(self) -> None:
        """Raise UserError where a value makes no sense, whatever it is trained on."""
        self.require_numbers()
        self.require("activation", self.activation in ACTIVATIONS, f"use {', '.join(ACTIVATIONS)}")
        self.require("orthogonality", self.orthogonality in MODES, f"use {', '.join(MODES)}")
        for name in ("steps", "batch_size", "expansion", "group_size", "n_seeds", "log_every",
                     "counted_tokens", "direction_tokens", "direction_every", "regroup_every",
                     "resample_every", "checkpoint_every"):
            self.require(name, getattr(self, name) >= 1, "use at least 1")
        for name in ("alpha", "eta", "all_pairs", "warmup_steps", "first_seed"):
            self.require(name, getattr(self, name) >= 0, "use at least 0")
        for name in ("learning_rate", "target_l0", "sparsity_penalty", "sparsity_rate",
                     "share_even", "buffer_gigabytes"):
            self.require(name, getattr(self, name) > 0, "use more than 0")
        for name in ("ramp_fraction", "decay_fraction", "resample_fraction", "share_use"):
            self.require(name, 0 <= getattr(self, name) <= 1, "use a part, from 0 to 1")
        self.require("forget_share", 0 < self.forget_share < 1, "use a part between 0 and 1")
        self.require("log_every", self.log_every <= self.steps, f"use at most steps={self.steps}")

    def check_fits(self, d_in: int, tokens: int, n_processes: int) -> None:
        """Raise UserError where the row does not fit the model, its text or the processes."""
        d_sae = self.expansion * d_in
        self.require("group_size", self.group_size < d_sae, f"use fewer than F={d_sae}")
        self.require("target_l0", self.target_l0 <= d_sae, f"use at most F={d_sae}")
        self.require("batch_size", self.batch_size <= tokens,
                     f"use at most the {tokens} tokens there are to train on")
        self.require("batch_size", self.batch_size % n_processes == 0,
                     f"use a multiple of the {n_processes} processes")


def resolve_config(run: str, budget: str, study: Path) -> CustomSAEConfig:
    """The row named `run` at `budget`; run_10 reads its α and interval from the runs in `study`."""
    if run not in RUNS:
        raise UserError(f"--out_dir ends in {run!r}, which is no row of the table; it has\n{ROWS}")
    if budget not in (known := [name for name in BUDGETS if name in SIZES]):
        raise UserError(f"SAE_BUDGET={budget!r} is unknown; use one of {', '.join(known)}")
    row = {**RUNS[run], **BUDGETS[budget]}
    if run == "run_10":
        row |= best_run(study, CANDIDATES, budget, ("alpha", "regroup_every"))
    if unknown := row.keys() - {field.name for field in dataclasses.fields(CustomSAEConfig)}:
        raise UserError(f"{', '.join(unknown)} in RUNS or BUDGETS is no field of CustomSAEConfig")
    return CustomSAEConfig(**row)


# --- Activations: read once through the hook, kept in half precision, shuffled across documents -


class ActivationBuffer:
    """Training activations with their domains, in memory, in half precision: forget text is domain
    0, every kind of retain text one of the next.

    z = x/c with c the root mean square norm of all of them. `batch` is a function of seed and step
    alone, so that resuming needs no other state.
    """

    layout: tuple = ()  # what batches depend on beside the activations

    def __init__(self, shards: Iterable[dict[str, Tensor]], room: int):
        """Of at most `room` tokens."""
        self.acts_ND, self.domain_N, square = gathered(shards, room)
        self.d_in = self.acts_ND.shape[1]
        self.scale = math.sqrt(square / len(self))  # c
        self.n_domains = int(self.domain_N.max()) + 1
        side_N = self.domain_N.clamp(max=RETAIN)
        self.of = [(side_N == k).nonzero().squeeze(1) for k in (FORGET, RETAIN)]
        self.order = functools.lru_cache(maxsize=4)(self.shuffled)

    @classmethod
    def read(cls, substrate: Substrate, shard_tokens: int = 32_768,
             gigabytes: float = CustomSAEConfig.buffer_gigabytes) -> "ActivationBuffer":
        """From the cache, missing shards computed through the language model's hook; a killed run
        loses at most one shard of work. Streamed where they take more memory than `gigabytes`."""
        shards = Shards(substrate, shard_tokens)
        if shards.fit_in(gigabytes):
            return cls(shards.all(), shards.tokens_NT.numel())
        return StreamedBuffer(open_streams(substrate, shard_tokens, gigabytes))

    def __len__(self) -> int:
        return len(self.domain_N)

    def batch(self, seed: int, step: int, size: int, forget_share: float,
              share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Normalised activations z [B, D] float32 and their domains [B] of a step: the `share` of a
        batch of `size` tokens, of which `forget_share` are forget text. Kinds of retain text come
        as often as there is text of them."""
        index = self.places(seed, step, size, forget_share)[share]
        return self.acts_ND[index].float() / self.scale, self.domain_N[index].long()

    def places(self, seed: int, step: int, size: int, forget_share: float) -> Tensor:
        n_forget = round(forget_share * size)
        index = torch.cat([self.stream(seed, FORGET, step * n_forget, n_forget),
                           self.stream(seed, RETAIN, step * (size - n_forget), size - n_forget)])
        return index[torch.randperm(size, generator=randomness("mix", seed, step))]

    def stream(self, seed: int, domain: int, start: int, n: int) -> Tensor:
        """Places of `n` tokens, of forget or of all retain text, from the `start`-th on, every
        epoch in its own order."""
        size = len(self.of[domain])
        first, last = start // size, (start + n - 1) // size
        places = torch.cat([self.order(seed, domain, epoch) for epoch in range(first, last + 1)])
        return places[start - first * size :][:n]

    def shuffled(self, seed: int, domain: int, epoch: int) -> Tensor:
        places = self.of[domain]
        order = randomness("order", seed, domain, epoch)
        return places[torch.randperm(len(places), generator=order)]

    def sample(self, domain: int, size: int) -> Tensor:
        """Up to `size` raw activations of one domain, always the same ones."""
        index = (self.domain_N == domain).nonzero().squeeze(1)
        chosen = torch.randperm(len(index), generator=randomness("sample", domain))[:size]
        return self.acts_ND[index[chosen]].float()

    def __enter__(self) -> None:
        """For training; after it nothing is read ahead."""

    def __exit__(self, *_: Any) -> None:
        """All stays in memory."""


class StreamedBuffer(ActivationBuffer):
    """The same where memory does not hold all: the tokens of each domain come in the order of its
    own stream, which mixes some shards at a time. Batches are others than in memory."""

    def __init__(self, streams: list[Stream]):
        self.streams = streams
        self.scale = math.sqrt(sum(one.square for one in streams) / len(self))
        self.d_in, self.layout = streams[0].d_in, tuple(one.layout for one in streams)
        self.n_domains = max(int(one.shards.domain_N.max()) for one in streams) + 1

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    def batch(self, seed: int, step: int, size: int, forget_share: float,
              share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        n_forget = round(forget_share * size)
        parts = zip(self.streams, (n_forget, size - n_forget))
        taken = [one.take(seed, step * n, n) for one, n in parts]
        acts_BD, domain_B = (torch.cat(part) for part in zip(*taken))
        index = torch.randperm(size, generator=randomness("mix", seed, step))[share]
        return acts_BD[index].float() / self.scale, domain_B[index].long()

    def sample(self, domain: int, size: int) -> Tensor:
        return self.streams[min(domain, RETAIN)].sample(domain, size)

    def __exit__(self, *_: Any) -> None:
        for one in self.streams:
            one.let_go()


# --- Sparse autoencoder -------------------------------------------------------------------------


class CustomSAE(nn.Module):
    """f = ReLU((z − b_dec) W_enc + b_enc),   ẑ = f W_dec + b_dec.

    `W_enc [D, F]`, `b_enc [F]`, `W_dec [F, D]` with rows of unit norm, `b_dec [D]`. It works on
    activations divided by the buffer's scale; `exported` folds that scale into the biases. W_enc is
    kept as `W_enc_FD`, feature by feature, as its gradient comes.
    """

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator,
                 screen: str | None = None):
        super().__init__()
        rows_FD = nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.d_in, self.d_sae = d_in, d_sae
        self.screen = screen or faster_screen()  # how `sparse_code` looks for active features
        self.half = False  # whether `gpu_code` multiplies in bfloat16
        self.room = 0  # of its lists, in active features a token; 0: it makes none
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
        rank = min(len(z_BD), max(1, round(len(z_BD) * l0 / self.d_sae)))
        self.b_enc.copy_(-product_BF.topk(rank, dim=0).values[-1])

    @property
    def W_enc(self) -> Tensor:
        return self.W_enc_FD.T

    def encode(self, z_BD: Tensor) -> Tensor:
        return torch.relu((z_BD - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f_BF: Tensor) -> Tensor:
        return f_BF @ self.W_dec + self.b_dec

    def forward(self, z_BD: Tensor) -> Tensor:
        return self.decode(self.encode(z_BD))

    def sparse_code(self, z_BD: Tensor, floor: float = 0.0, limit: Limit = no_limit) -> Code:
        """Of the activations only those above the `limit`, which is likely above `floor`."""
        return Code(*SparseAutoencode.apply(z_BD, *self.parameters(), self.screen, floor, limit))

    def dense_code(self, z_BD: Tensor, limit: Limit = no_limit) -> Code:
        """The same by plain dense products: faster where many features fire."""
        f_BF = above(self.encode(z_BD), limit)
        row_N, column_N = f_BF.nonzero(as_tuple=True)
        return Code(self.decode(f_BF), f_BF[row_N, column_N], row_N, column_N)

    def gpu_code(self, z_BD: Tensor, limit: Limit = no_limit) -> Code | DenseCode:
        """The same without a look at how many features fire, for which the program would wait. In
        bfloat16 where the GPU has it; weights stay float32."""
        dtype = torch.bfloat16 if self.half else torch.float32
        if not self.room or limit is not no_limit:
            return DenseCode(*DenseAutoencode.apply(z_BD, *self.parameters(), dtype, limit))
        from lab.kernels import ListedAutoencode, PaddedCode  # Triton is there with CUDA only
        return PaddedCode(*ListedAutoencode.apply(z_BD, *self.parameters(), dtype, self.room))

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_(min=1e-8))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Leave only the part of the gradient that turns a decoder row, not what lengthens it."""
        along_F = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
        self.W_dec.grad.addcmul_(self.W_dec, along_F[:, None], value=-1)

    @torch.no_grad()
    def exported(self, scale: float, threshold: float = 0.0) -> ExportedSAE:
        """The same SAE for raw activations x = scale · z; features come out · scale."""
        W_enc_FD, b_enc, W_dec, b_dec = (
            part.detach().cpu().clone() for part in (self.W_enc_FD, self.b_enc, self.W_dec,
                                                     self.b_dec))
        return ExportedSAE(W_enc_FD.T, b_enc * scale, W_dec, b_dec * scale, threshold * scale)


# --- Grouping: which features fire together, and what they share --------------------------------


class Partners(NamedTuple):
    """Pairs of a feature and one with which it fires beyond chance: feature by feature, the
    strongest first."""

    row_N: Tensor
    column_N: Tensor
    weight_N: Tensor  # ω: mean over tokens of 1/n where both are active


def partners(counted: Firing, group_size: int, sure: float = 4.0, every: int = 1) -> Partners:
    """Of every `every`-th feature the `group_size` with which it fires most beyond chance.

    By chance features of rates p_i, p_j have ω = p_i p_j / E[n]. A partner exceeds it by `sure`
    standard errors of a count; with −∞ all pass that ever fire together.
    """
    tokens, fired_F, n = counted.tokens, counted.fired_F.double(), max(counted.n, 1.0)
    row_N, column_N, sum_N = cofiring_sums(counted.lists_RL, len(fired_F), sure / n, every)
    expected_N = fired_F[row_N] * fired_F[column_N] / tokens
    excess_N = n * sum_N - expected_N
    passes = (excess_N > sure * (expected_N + 1).sqrt()).nonzero().squeeze(1)
    kept = passes[strongest(row_N[passes], excess_N[passes], group_size)]
    return Partners(row_N[kept], column_N[kept], sum_N[kept] / tokens)


def stability(counted: Firing, group_size: int, every: int, sure: float = 4.0) -> float:
    """Overlap of partners found from two halves of the tokens: the part of those found in one half
    that is found in the other too. Of every `every`-th feature."""
    F = len(counted.fired_F)
    halves = (partners(firing(counted.lists_RL[half::2], F), group_size, sure, every)
              for half in (0, 1))
    one_N, other_N = (found.row_N * F + found.column_N for found in halves)
    return 2 * int(torch.isin(one_N, other_N).sum()) / max(1, len(one_N) + len(other_N))


def sharing(found: Partners, fired_F: Tensor, use_KF: Tensor, share_even: float,
            prior: float = 100.0) -> Tensor:
    """What a feature shares in use, from 0 to 1 [F]: min(1, evenness/share_even).

    A feature has two sides: its use on forget text, and on the kind of retain text on which it has
    most, each domain's use being one in all. Its evenness is the lesser side over their mean. Here
    it is (n_i e_i + m e_g)/(n_i + m), with n_i the tokens on which the feature fired, m the
    `prior`, and e_g the evenness of its partners' mean sides, weighted by ω.
    """
    part_2F = sides(use_KF / use_KF.sum(1, keepdim=True).clamp(min=1e-12))
    total_F = part_2F.sum(0)  # of a feature that never fired nothing is known: it counts as even
    part_2F = torch.where(total_F > 0, part_2F / total_F.clamp(min=1e-12), 0.5)
    of_partners_2N = found.weight_N.to(part_2F.dtype) * part_2F[:, found.column_N]
    group_2F = torch.zeros_like(part_2F).index_add(1, found.row_N, of_partners_2N)
    group_2F = group_2F.where(group_2F.sum(0) > 0, part_2F)
    own_F, group_F = (2 * part.amin(0) / part.sum(0) for part in (part_2F, group_2F))
    evenness_F = (fired_F * own_F + prior * group_F) / (fired_F + prior)
    return (evenness_F / share_even).clamp(max=1)


# --- Losses: pure functions of tensors ----------------------------------------------------------


def active_set_loss(W_FD: Tensor, lists_BL: Tensor) -> Tensor:
    """L_dir of what fires together: mean over tokens of (1/n) Σ_{i≠j active} (w_i·w_j)², n the
    number of active features, which are listed from 1 on. Time O(B·L²·D), on a CPU O(B·n²·D)."""
    if W_FD.device.type == "cpu":  # a GPU would have to be waited for
        row_N, column_N, sum_N = cofiring_sums(lists_BL, len(W_FD), 0.0)
        return PairPotential.apply(W_FD, row_N, column_N, sum_N / len(lists_BL))
    V_FD = nn.functional.pad(W_FD, (0, 0, 1, 0))  # 0 is no feature
    V_BLD = V_FD.index_select(0, lists_BL.flatten()).view(*lists_BL.shape, W_FD.shape[1])
    gram_BLL = V_BLD @ V_BLD.mT
    gram_BLL = gram_BLL - torch.diag_embed(gram_BLL.diagonal(dim1=1, dim2=2))
    n_B = (lists_BL > 0).sum(1).clamp(min=1)
    return (gram_BLL.square().sum((1, 2)) / n_B).mean()


def frame_loss(W_FD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """L_dir = (D/F²) Σ_{i≠j} (w_i·w_j)² of all pairs alike. F unit vectors have at least 1 − D/F
    (Welch bound). Its products take factors of `dtype`, W's own unless told."""
    F, D = W_FD.shape
    return FramePotential.apply(W_FD, dtype or W_FD.dtype) * (D / F**2)


def gram_encoder_loss(W_FD: Tensor) -> Tensor:
    """‖W Wᵀ − I‖_F² · D/F² of the encoder, a penalty on its Gram matrix in L_dir's units."""
    F, D = W_FD.shape
    return ((W_FD.T @ W_FD).square().sum() - 2 * W_FD.square().sum() + F) * (D / F**2)


def use_loss(mean_KF: Tensor, running_KF: Tensor, share_F: Tensor | None = None) -> Tensor:
    """L_use = Σ_i (1 − s_i) u_i · 2·(1 − p_i² − (1 − p_i)²), a mean Gini impurity.

    A feature has two sides: its mean activation on forget text, and on the kind of retain text on
    which it has most. p_i is the first's part of the two, u_i the two's part of those of all
    features. 0 when no feature serves both sides, 1 when all serve both alike and none shares.
    Value and slope are taken at the running means, which are steadier than a batch; the gradient
    flows through the batch's means along that slope. u_i has none, so that neither growing nor
    shrinking a feature as a whole is rewarded, whether it shares or not. (A cosine of the domains'
    use falls when what is shared swells, and features that fire on most tokens decide it.)
    """
    keep_F = 1.0 if share_F is None else 1 - share_F
    mean_2F, running_2F = sides(mean_KF, running_KF), sides(running_KF)
    total_F = running_2F.sum(0)
    part_2F = running_2F / total_F.clamp(min=1e-12)
    pure_F = part_2F.square().sum(0)
    weight_F = keep_F / total_F.sum().clamp(min=1e-12) * 2
    value = (weight_F * total_F * (1 - pure_F)).sum()
    linear = (2 * weight_F * (pure_F - part_2F) * mean_2F).sum()
    return value + linear - linear.detach()


# --- Trainer ------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a batch showed of the features."""

    fired_F: Tensor  # bool, over the whole batch
    l0: Tensor  # active features a token, over the whole batch
    l1: Tensor  # E‖f‖₁, this process's part of it
    use_KF: Tensor  # mean activation by domain, this process's part of it


class Terms(NamedTuple):
    """The objective's terms: this process's part of each, whose sum over processes is the term."""

    fit: Tensor  # E‖z − ẑ‖₂
    l1: Tensor  # E‖f‖₁
    l_dir: Tensor
    l_use: Tensor


class CustomTrainer:
    """Trains one SAE on E‖z − ẑ‖₂ + λ·E‖f‖₁ + α·ramp(t)·(L_dir + η·L_use).

    α lives here, as `trainer.alpha`: the step reads it and `trainer.config` reports it. λ is moved
    by a controller so that L0 meets the target; BatchTopK has none. Dead features (silent for
    `resample_every` steps) get the direction of what is reconstructed worst (after Bricken et al.
    2023). What changes during training is in `state`, the SAE and the optimizer. Randomness depends
    on seed and step alone.
    """

    USE_MEMORY = 0.98  # of the running means of use, a step
    LIMIT_MEMORY = 0.9  # of that of BatchTopK's limit
    LISTED = 6  # active features of a token, over the target L0; what has more is not counted
    JUDGED = 7  # strongest partners, with which a feature's κ is logged

    def __init__(self, config: CustomSAEConfig, sae: CustomSAE, seed: int, n_domains: int = 2,
                 processes: Processes | None = None):
        self.row, self.sae, self.seed, self.n_domains = config, sae, seed, n_domains
        self.processes = processes or Processes()
        self.alpha = config.alpha
        self.first_grouping = max(1, round(config.ramp_fraction * config.steps))
        self.list_length = min(sae.d_sae, math.ceil(self.LISTED * config.target_l0))
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, fused=True)
        state = {
            "use_KF": torch.zeros(n_domains, sae.d_sae),  # running mean activations by domain
            "use_weight": torch.zeros(()),
            "silent_F": torch.zeros(sae.d_sae, dtype=torch.long),  # steps since a feature fired
            # until features are grouped nobody knows what must not be shared
            "share_F": torch.full((sae.d_sae,), config.share_use),
            # active features of this process's tokens, from 1 on, since counting began
            "lists_RL": torch.zeros(0, self.list_length, dtype=torch.int32),
            "log_sparsity": torch.tensor(math.log(config.sparsity_penalty), dtype=torch.float64),
            "l0": torch.tensor(2.0 * config.target_l0, dtype=torch.float64),  # running
            "limit": torch.zeros(()),  # BatchTopK's, of this batch
            "threshold": torch.zeros(()),  # its running mean
            "l_dir": torch.zeros(()),
            "pull_FD": torch.zeros(0),  # gradient of L_dir when it was last computed
        }
        self.device = sae.W_dec.device
        self.state = {name: part.to(self.device) for name, part in state.items()}
        self.step_count, self.numbers = 0, Readings({})  # which the last step gave
        self.history: list[dict[str, Any]] = []
        self.direction_dtype = faster_dtype(self.device)

    @property
    def config(self) -> dict[str, Any]:
        """The row as it trains now: α is the trainer's own."""
        return {**dataclasses.asdict(self.row), "alpha": self.alpha, "d_in": self.sae.d_in,
                "d_sae": self.sae.d_sae, "seed": self.seed}

    def step(self, z_BD: Tensor, domain_B: Tensor) -> Readings:
        """One step on normalised activations [B, D] and their domain labels, both this process's
        share of the batch; returns the objective and its terms over the whole batch."""
        alpha, ramp, sparsity = self.alpha, self.ramp(), self.sparsity()
        code = self.code(z_BD)
        seen = self.seen(code, domain_B)
        terms = self.terms(z_BD, code, seen)
        loss = (terms.fit + sparsity.float() * terms.l1
                + alpha * ramp * (terms.l_dir + self.row.eta * terms.l_use))
        self.backward_(loss)
        self.optimizer_step_()
        self.numbers = Readings({
            **self.whole_batch(loss, terms), "l0": seen.l0, "lambda": sparsity, "alpha": alpha,
            "ramp": ramp, "lr": self.learning_rate()})
        if self.device.type == "cpu":  # a GPU's are looked at where the program waits anyway
            self.check_finite(self.numbers)
        self.update_sparsity_(seen.l0)
        self.update_use_(seen)
        self.update_activity_(z_BD, code, seen)
        self.step_count += 1
        if self.is_grouping(self.step_count):
            self.regroup_()
        return self.numbers

    def code(self, z_BD: Tensor) -> Code | DenseCode:
        limit = no_limit if self.row.activation == "relu" else self.limit
        if self.device.type == "cuda":
            return self.sae.gpu_code(z_BD, limit)
        if self.is_sparse():
            return self.sae.sparse_code(z_BD, 0.75 * float(self.state["threshold"]), limit)
        return self.sae.dense_code(z_BD, limit)

    def limit(self, value_N: Tensor) -> Tensor:
        """BatchTopK's: of the whole batch's activations the largest that does not stay."""
        room = 1 + round(self.row.target_l0 * self.row.batch_size)
        mine_N = value_N.flatten().topk(min(room, value_N.numel())).values.float()
        mine_N = nn.functional.pad(mine_N, (0, room - len(mine_N)))
        self.state["limit"] = self.processes.gathered(mine_N).topk(room).values[-1].clamp(min=0)
        return self.state["limit"]

    def sparsity(self) -> Tensor:
        """λ. BatchTopK needs no L1 penalty."""
        return self.state["log_sparsity"].exp() * (self.row.activation == "relu")

    def exported(self, scale: float) -> ExportedSAE:
        """What evaluations see: activations stay above the running limit, whatever the batch."""
        return self.sae.exported(scale, float(self.state["threshold"]))

    def is_sparse(self) -> bool:
        return bool(self.state["l0"] < 0.1 * self.sae.d_sae)

    def ramp(self) -> float:
        """0 to 1 over the first `ramp_fraction` of training: features form before they part."""
        return min(1.0, self.step_count / max(1, self.row.ramp_fraction * self.row.steps))

    def seen(self, code: Code | DenseCode, domain_B: Tensor) -> Seen:
        n, K, F = len(domain_B) * self.processes.size, self.n_domains, self.sae.d_sae
        is_KB = domain_B == torch.arange(K, device=self.device)[:, None]
        count_K1 = self.processes.sum_(is_KB.sum(1, keepdim=True))
        count_F = self.processes.sum_(code.counts(F))
        total_KF, total = code.totals(domain_B, K, F)
        return Seen(count_F > 0, count_F.sum() / n, total / n, total_KF / count_K1.clamp(min=1))

    def terms(self, z_BD: Tensor, code: Code | DenseCode, seen: Seen) -> Terms:
        n = len(z_BD) * self.processes.size
        return Terms((z_BD - code.z_hat_BD).norm(dim=1).sum() / n, seen.l1,
                     self.direction_term(code, seen.fired_F) / self.processes.size,
                     self.use_term(seen.use_KF))

    def direction_term(self, code: Code | DenseCode, fired_F: Tensor) -> Tensor:
        """L_dir with a gradient that turns the features that fired, and only these.

        Value and gradient are computed every `direction_every` steps and held in between, as
        directions turn little in a few steps. Without the mask Adam turns a rare feature at full
        speed between its firings; it leaves its encoder behind and dies.
        """
        if self.row.orthogonality == "off":
            return self.state["l_dir"]
        W_FD = self.sae.W_enc_FD if self.row.orthogonality == "gram_encoder" else self.sae.W_dec
        if self.step_count % self.row.direction_every == 0:
            now = self.direction_now(W_FD, code)
            self.state["l_dir"], self.state["pull_FD"] = now.detach(), torch.autograd.grad(
                now, W_FD)[0]
            if self.row.orthogonality == "adaptive":  # of tokens of this process
                for name in ("l_dir", "pull_FD"):
                    self.processes.sum_(self.state[name].div_(self.processes.size))
        return HeldGradient.apply(W_FD, self.state["l_dir"], self.state["pull_FD"], fired_F)

    def direction_now(self, W_FD: Tensor, code: Code | DenseCode) -> Tensor:
        if self.row.orthogonality == "gram_encoder":
            return gram_encoder_loss(W_FD)
        if self.row.orthogonality == "max_cosine":
            return max_cosine_loss(W_FD, randomness("chunks", self.seed, self.step_count))
        whole = 1.0 if self.row.orthogonality == "fixed" else self.row.all_pairs
        loss = whole * frame_loss(W_FD, self.direction_dtype) if whole else 0.0
        if self.row.orthogonality == "adaptive":
            every = max(1, self.row.batch_size // self.row.direction_tokens)
            loss = loss + active_set_loss(W_FD, code.lists(self.list_length)[::every])
        return loss

    def use_term(self, use_KF: Tensor) -> Tensor:
        if self.row.orthogonality != "adaptive" or not self.row.eta:
            return torch.zeros((), device=self.device)
        whole = use_loss(use_KF, self.running_use(), self.state["share_F"])
        return whole - whole.detach() * (1 - 1 / self.processes.size)  # its gradient is a part

    def running_use(self) -> Tensor:
        return self.state["use_KF"] / self.state["use_weight"].clamp(min=1e-12)

    def backward_(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.sae.parameters():
            self.processes.sum_(parameter.grad)

    def optimizer_step_(self) -> None:
        """Adam, on decoder rows that stay of unit norm."""
        self.sae.remove_parallel_gradient_()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        self.optimizer.step()
        self.sae.normalize_decoder_()

    def learning_rate(self) -> float:
        """Linear warm-up, constant, linear decay to zero over the last `decay_fraction`."""
        row, t = self.row, self.step_count
        warm = min(1.0, (t + 1) / max(1, row.warmup_steps))
        decay = min(1.0, (row.steps - t) / max(1.0, row.decay_fraction * row.steps))
        return row.learning_rate * warm * decay

    def whole_batch(self, loss: Tensor, terms: Terms) -> dict[str, Tensor]:
        """The objective and its terms, summed over processes."""
        parts = torch.stack([part.detach() for part in (loss, *terms)])
        return dict(zip(("loss", *Terms._fields), self.processes.sum_(parts), strict=True))

    def check_finite(self, terms: Mapping[str, float], odd: Iterable[str] = ()) -> None:
        if (names := ", ".join(odd)) or not all(math.isfinite(value) for value in terms.values()):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
            place = f"step {self.step_count}, seed {self.seed}"
            raise UserError(f"non-finite {names or 'loss'} at {place}: {shown}; "
                            "a smaller learning_rate or alpha may help")

    def update_sparsity_(self, l0: Tensor) -> None:
        """Move log λ so that the running L0 meets its target.

        Proportional to the relative excess and to its trend, so that it settles and does not
        swing; bounded, so that a burst of new features does not starve the old ones.
        """
        before, self.state["l0"] = self.state["l0"], 0.9 * self.state["l0"] + 0.1 * l0.double()
        now = self.state["l0"].clamp(min=1e-3)
        excess = (now / self.row.target_l0).log()
        trend = (now / before.clamp(min=1e-3)).log()
        limit = self.row.sparsity_rate
        self.state["log_sparsity"] += (0.02 * excess + 0.5 * trend).clamp(-limit, limit)

    def update_use_(self, seen: Seen) -> None:
        """Running means: activations by domain, and BatchTopK's limit, from the first one on."""
        before, now = self.state["threshold"], self.state["limit"]
        self.state["threshold"] = before.lerp(now, 1 - self.LIMIT_MEMORY).where(before > 0, now)
        use_KF = self.processes.sum_(seen.use_KF.detach().clone())
        self.state["use_KF"].lerp_(use_KF, 1 - self.USE_MEMORY)
        self.state["use_weight"].mul_(self.USE_MEMORY).add_(1 - self.USE_MEMORY)

    @torch.no_grad()
    def update_activity_(self, z_BD: Tensor, code: Code | DenseCode, seen: Seen) -> None:
        """Count silence, list what is active before a grouping, wake dead features when due."""
        row, t = self.row, self.step_count
        self.state["silent_F"].add_(1).masked_fill_(seen.fired_F, 0)
        ahead = range(t + 1, t + 1 + math.ceil(row.counted_tokens / row.batch_size))
        if any(map(self.is_grouping, ahead)):
            lists_BL = code.lists(self.list_length)
            self.state["lists_RL"] = torch.cat([self.state["lists_RL"], lists_BL])
        if t % row.resample_every == 0 and 0 < t <= row.resample_fraction * row.steps:
            self.resample_(z_BD, code)

    def resample_(self, z_BD: Tensor, code: Code | DenseCode) -> None:
        """Point silent features at what tokens of large error still lack.

        Tokens are drawn with probability proportional to their squared error; the bias lets the
        new feature fire where a token has at least half of the drawn token's share of it.
        """
        self.check_finite(self.numbers)
        dead = (self.state["silent_F"] >= self.row.resample_every).nonzero().squeeze(1)
        if not len(dead):
            return
        sae, n = self.sae, len(z_BD) * self.processes.size
        share, error_BD = self.processes.share(n), z_BD - code.z_hat_BD
        dead = dead[: n // 4]  # each needs a token of its own, or twins are born
        everybody_B = torch.zeros(n)
        everybody_B[share] = error_BD.norm(dim=1).square().cpu()
        generator = randomness("resample", self.seed, self.step_count)
        drawn = torch.multinomial(self.processes.sum_(everybody_B), len(dead), generator=generator)
        mine = ((drawn >= share.start) & (drawn < share.stop)).to(self.device)
        here = drawn.to(self.device)[mine] - share.start
        lacking, centred = torch.zeros(2, len(dead), sae.d_in, device=self.device)
        lacking[mine], centred[mine] = error_BD[here], z_BD[here] - sae.b_dec
        direction = nn.functional.normalize(self.processes.sum_(lacking), dim=1)
        sae.W_dec[dead] = sae.W_enc_FD[dead] = direction
        overlap = (self.processes.sum_(centred) * direction).sum(1)
        sae.b_enc[dead] = self.state["threshold"] - 0.5 * overlap.clamp(min=0.02)
        self.forget_past_(dead)

    def forget_past_(self, features: Tensor) -> None:
        """Newborn features have no past: neither moments nor silence, use, share, pull, lists."""
        for parameter in (self.sae.W_enc_FD, self.sae.b_enc, self.sae.W_dec):
            for name in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][name][features] = 0
        self.state["silent_F"][features] = 0
        self.state["use_KF"][:, features] = 0
        self.state["share_F"][features] = self.row.share_use
        if self.row.orthogonality != "off":
            self.state["pull_FD"][features] = 0
        born = torch.zeros(self.sae.d_sae + 1, dtype=torch.bool, device=self.device)
        born[features + 1] = True  # as in lists
        self.state["lists_RL"].masked_fill_(born[self.state["lists_RL"].long()], 0)

    def is_grouping(self, step: int) -> bool:
        """First when α is at its full strength, whatever `regroup_every`: L_use begins with it."""
        later = self.first_grouping < step <= self.row.steps
        return step == self.first_grouping or later and step % self.row.regroup_every == 0

    @torch.no_grad()
    def regroup_(self) -> None:
        """Find anew which features fire together and what they share: in all modes, for the
        history's sake; only `adaptive` makes a difference of it."""
        self.check_finite(self.numbers)
        row, W_FD = self.row, self.sae.W_dec.cpu()
        counted = firing(self.processes.gathered(self.state["lists_RL"]).cpu(), len(W_FD))
        found = partners(counted, row.group_size)
        share_F = row.share_use * sharing(found, counted.fired_F, self.running_use().cpu(),
                                          row.share_even)
        self.state["share_F"] = self.processes.same_(share_F.float().to(self.device))
        self.state["lists_RL"] = self.state["lists_RL"][:0].clone()
        kappa_F = partner_condition_numbers(W_FD, found.row_N, found.column_N, self.JUDGED)
        self.note({name: float(value) for name, value in {
            "kappa_median": kappa_F.median(), "kappa_p90": kappa_F.quantile(0.9),
            "kappa_max": kappa_F.max(), "share_use": share_F.mean(),
            "partners": len(found.row_N) / len(W_FD),
            "held": found.weight_N.sum() / max(counted.n - 1, 1e-12),
            "stability": stability(counted, row.group_size, every=max(1, len(W_FD) // 128)),
        }.items()})

    def note(self, values: Mapping[str, float]) -> None:
        """A line of the training curves."""
        self.check_finite(values)
        place = {"seed": self.seed, "step": self.step_count,
                 "tokens": self.step_count * self.row.batch_size}
        self.history.append({**place, **values})

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that must survive a crash: tensors, and plain values for a JSON note.

        Asked of all processes, given whole by the first.
        """
        tensors = {f"sae.{name}": part for name, part in self.sae.state_dict().items()}
        tensors |= {f"adam.{i}.{name}": part for i, moments in
                    self.optimizer.state_dict()["state"].items() for name, part in moments.items()}
        tensors |= {f"state.{name}": part for name, part in self.state.items()}
        tensors["state.lists_RL"] = self.processes.gathered(self.state["lists_RL"])
        note = {"step_count": self.step_count, "alpha": self.alpha, "history": self.history}
        return tensors, note

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        for name, part in self.sae.state_dict().items():
            part.copy_(tensors[f"sae.{name}"])
        moments = {i: {kind: tensors[f"adam.{i}.{kind}"] for kind in (
            "step", "exp_avg", "exp_avg_sq")} for i, _ in enumerate(self.sae.parameters())}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for name in self.state:
            self.state[name] = tensors[f"state.{name}"].to(self.device)
        self.state["lists_RL"] = self.processes.own(self.state["lists_RL"])
        for name, value in note.items():
            setattr(self, name, value)


def new_trainer(config: CustomSAEConfig, buffer: ActivationBuffer, seed: int,
                processes: Processes, step: int = 0) -> CustomTrainer:
    """An SAE before its first step, the same in all processes. What goes on from another `step`
    has its state loaded later, and at the end needs no batch."""
    d_in, device = buffer.d_in, processes.device
    sae = CustomSAE(d_in, config.expansion * d_in, randomness("weights", seed))
    if step < config.steps:
        z_BD, _ = buffer.batch(seed, step, config.batch_size, config.forget_share)
        sae.initialize_biases_(z_BD, 2 * config.target_l0)
    sae.half = device.type == "cuda" and faster_dtype(device) == torch.bfloat16
    for part in sae.to(device).state_dict().values():
        processes.same_(part)
    return CustomTrainer(config, sae, seed, buffer.n_domains, processes)


# --- Run ----------------------------------------------------------------------------------------


def training_key(config: CustomSAEConfig, substrate: Substrate, buffer: ActivationBuffer) -> str:
    """What a trained SAE depends on beside its seed: settings, activations, code."""
    settings = {name: value for name, value in dataclasses.asdict(config).items()
                if name not in ("purpose", "first_seed", "n_seeds", "checkpoint_every",
                                "buffer_gigabytes")}
    code = code_digest(train_sae, ActivationBuffer, Substrate, values=(CustomSAEConfig,))
    return digest(settings, substrate.causes, substrate.learn.checksum(), buffer.scale,
                  buffer.layout, code)


def train_sae(config: CustomSAEConfig, buffer: ActivationBuffer, seed: int, checkpoint: Path,
              interrupts: Interrupts, tracker: Tracker | None,
              processes: Processes) -> CustomTrainer:
    """Train the SAE of one seed, continuing from `checkpoint` where there is one."""
    kept = read_tensors(checkpoint)
    step = kept[1]["step_count"] if kept else 0
    if int(processes.sum_(torch.tensor(step))) != processes.size * step:
        raise UserError(f"processes see different checkpoints in {checkpoint.parent}; all of them "
                        "must see the same SAE_CACHE_DIR")
    trainer = new_trainer(config, buffer, seed, processes, step)
    if kept:
        trainer.load_state_dict(*kept)
    share, device = processes.share(config.batch_size), processes.device
    bar = Progress(f"training, seed {seed}", config.steps, trainer.step_count, foretold=True)
    with interrupts.deferred(), bar, buffer:
        while (step := trainer.step_count) < config.steps:
            z_BD, domain_B = buffer.batch(seed, step, config.batch_size, config.forget_share, share)
            numbers = trainer.step(to_device(z_BD, device), to_device(domain_B, device))
            bar.advance()
            if trainer.step_count % config.log_every == 0:
                trainer.note(numbers)
                bar.show(loss=f"{numbers['loss']:.3f}", l0=f"{numbers['l0']:.0f}")
                if tracker:
                    tracker.log(trainer.history[-1])
            interrupted = bool(processes.sum_(torch.tensor(interrupts.signal or 0)))
            if interrupted or checkpoint_due(config, trainer.step_count):
                tensors, note = trainer.state_dict()
                trainer.check_finite(numbers, non_finite(tensors))  # before it is kept
                if not processes.rank:
                    write_tensors(checkpoint, tensors, note)
            if interrupted:
                interrupts.signal = interrupts.signal or signal.SIGTERM
                raise Interrupts.Stop
    return trainer


def checkpoint_due(config: CustomSAEConfig, step: int) -> bool:
    """At the end, and on the way unless the end is near."""
    left = config.steps - step
    return not left or step % config.checkpoint_every == 0 and 2 * left >= config.checkpoint_every


def run_experiment(out_dir: Path, interrupts: Interrupts, processes: Processes) -> dict | None:
    """Train and evaluate the row that `out_dir` names; returns what final_info.json holds, to the
    first of several processes."""
    folder, budget = RunFolder(out_dir), os.environ.get("SAE_BUDGET") or "full"
    config = resolve_config(folder.run, budget, folder.study)
    cache = Cache(Path(os.environ.get("SAE_CACHE_DIR") or ".cache"))
    source = choose_source(os.environ.get("SAE_SUBSTRATE") or "auto", cache)
    config.check_fits(source.d_in, SIZES[budget].learn_tokens, processes.size)
    with folder.held(cache):
        clock = Clock()
        report(f"{folder.run}: {config.purpose}; substrate {source.name}, budget {budget}")
        with clock.phase("download"):
            source.fetch()
        substrate = Substrate(source, SIZES[budget], cache, processes)
        with clock.phase("activations"):
            buffer = ActivationBuffer.read(substrate, gigabytes=config.buffer_gigabytes)
        config.check_fits(source.d_in, len(buffer), processes.size)
        facts = {"run": folder.run, "seeds": config.seeds, "substrate": source.name,
                 "budget": budget, "model_name": source.model_name, "hook_name": hook_name(source),
                 "train_tokens_unique": len(buffer), **dataclasses.asdict(substrate.sizes)}
        tracker = Tracker(folder.run, {**dataclasses.asdict(config), **facts},
                          f"{source.name}-{budget}", cache)
        trainers = train_all(config, substrate, buffer, interrupts, tracker, clock)
        saes = {seed: trainer.exported(buffer.scale) for seed, trainer in trainers.items()}
        resolved = {**trainers[config.first_seed].config, **facts}
        resolved.pop("seed")
        if not processes.rank:
            folder.write_saes(source, resolved, saes)
        evaluated = evaluate(saes, substrate, functools.cache(lambda domain: buffer.sample(
            domain, substrate.sizes.frequency_tokens)), clock)
        if evaluated is None:
            return None
        histories = {seed: trainer.history for seed, trainer in trainers.items()}
        info = collect(folder.run, budget, resolved, evaluated, histories, substrate, clock,
                       folder.study)
        folder.write_results(info, histories, cache)
        tracker.finish(info)
        return info


def train_all(config: CustomSAEConfig, substrate: Substrate, buffer: ActivationBuffer,
              interrupts: Interrupts, tracker: Tracker, clock: Clock) -> dict[int, CustomTrainer]:
    """A trainer for every seed, each with its checkpoints in the cache."""
    key, trainers = training_key(config, substrate, buffer), {}
    for seed in config.seeds:
        checkpoint = substrate.cache.path(f"{substrate.name}/trained/{key}", seed)
        with clock.phase("training", f"seed {seed}"):
            trainers[seed] = train_sae(config, buffer, seed, checkpoint, interrupts, tracker,
                                       substrate.processes)
        tracker.log_rest(trainers[seed].history)
    return trainers


# --- Main ---------------------------------------------------------------------------------------

HELP = f"""the last part of --out_dir selects a row:
{ROWS}

{ENVIRONMENT}"""


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser("Train and evaluate sparse autoencoders with adaptive orthogonality.", HELP)
    parser.add_argument("--out_dir", type=Path, required=True, help="run folder, run_1 … run_10")
    out_dir = parser.parse_args(arguments).out_dir
    quiet_libraries()
    keep_freed_memory()
    with Outcome(f"`python experiment.py --out_dir={out_dir}`") as outcome:
        outcome.interrupts.install()
        info = run_experiment(out_dir, outcome.interrupts, Processes())
        if info:
            show([f"{info['run']} on {info['substrate']} ({info['budget']}), mean ± standard error "
                  f"of {len(info['seeds'])} seeds", *summary(info), f"written to {out_dir}"])
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
