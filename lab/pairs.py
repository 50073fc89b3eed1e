"""Pairs of features: how often they fire together, counted exactly, and sums over pairs."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from lab.device import to_device
from lab.grouping import gram_condition_numbers
from lab.sparse import csr, sparse_product


class Firing(NamedTuple):
    """The active features of some tokens. n is how many a token has."""

    lists_RL: Tensor  # of each token, from 1 on; 0 where there are no more
    tokens: int  # that have any, at least 1; means are over these
    fired_F: Tensor  # tokens on which a feature is active
    n: float  # mean over tokens


def firing(lists_RL: Tensor, d_sae: int) -> Firing:
    """What the lists of tokens [R, L] say of each feature."""
    active_RL = lists_RL > 0
    n_R, feature_N = active_RL.sum(1), lists_RL[active_RL].long() - 1
    tokens = max(1, int((n_R > 0).sum()))
    fired_F = torch.bincount(feature_N, minlength=d_sae)
    return Firing(lists_RL, tokens, fired_F, len(feature_N) / tokens)


def cofiring_sums(lists_RL: Tensor, d_sae: int, least: float, every: int = 1,
                  block: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over tokens of 1/n where two features are both active, n the token's number of them.

    From the tokens' lists [R, L] (see `Code.lists`), for every `every`-th feature with all others:
    both features and their sum [N], float64, feature by feature, for sums above `least`. Exact: a
    sparse product, `block` features at a time, several times at once.
    """
    lists_RL = lists_RL.cpu().numpy()
    token_N, place_N = lists_RL.nonzero()
    column_N, n_R = lists_RL[token_N, place_N] - 1, np.bincount(token_N, minlength=len(lists_RL))
    shape, start_R = (len(lists_RL), d_sae), np.concatenate([[0], n_R.cumsum()])
    fires_RF = scipy.sparse.csr_matrix((np.ones(len(column_N)), column_N, start_R), shape)
    share_RF = scipy.sparse.csr_matrix((1 / n_R[token_N], column_N, start_R), shape)
    fires_FR = fires_RF.T.tocsr()[::every]

    def sums_of(first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sums = fires_FR[first : first + block] @ share_RF
        kept = np.flatnonzero(sums.data > least)
        row_N = np.repeat(np.arange(sums.shape[0]), np.diff(sums.indptr))[kept] + first
        return row_N * every, sums.indices[kept], sums.data[kept]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # scipy's product leaves Python alone
        parts = list(pool.map(sums_of, range(0, fires_FR.shape[0], block)))
    row_N, column_N, sum_N = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
    other = (row_N != column_N).nonzero().squeeze(1)
    return row_N[other], column_N[other].long(), sum_N[other]


def strongest(row_N: Tensor, strength_N: Tensor, most: int) -> Tensor:
    """Places of the `most` strongest entries of each row, row by row, the strongest first."""
    order = strength_N.argsort(descending=True, stable=True)
    order = order[row_N[order].argsort(stable=True)]
    rank_N = torch.arange(len(order)) - torch.searchsorted(row_N[order], row_N[order])
    return order[rank_N < most]


def partner_condition_numbers(W_FD: Tensor, row_N: Tensor, column_N: Tensor,
                              n_partners: int) -> Tensor:
    """κ of each feature's direction with those of its first `n_partners` partners, or as many as it
    has in a list that is sorted by features; float64 [F]."""
    F = len(W_FD)
    start_F, end_F = (torch.searchsorted(row_N, torch.arange(F), right=end)
                      for end in (False, True))
    place_FM = start_F[:, None] + torch.arange(n_partners)
    there_FM = place_FM < end_F[:, None]
    column_FM = nn.functional.pad(column_N, (0, 1))[place_FM.clamp(max=len(column_N))]
    kappas = []
    for own, column, there in zip(*(part.split(512) for part in (
            torch.arange(F)[:, None], column_FM, there_FM))):
        there = nn.functional.pad(there, (1, 0), value=True)[:, :, None].double()
        V = W_FD[torch.cat([own, column], 1)].double() * there
        kappas.append(gram_condition_numbers(V @ V.mT + torch.diag_embed(1 - there[..., 0])))
    return torch.cat(kappas)


class PairPotential(torch.autograd.Function):
    """Σ_N v_N (w_row·w_column)² over a list of pairs that holds each pair in both orders, row by
    row [N]. Time O(N·D), memory O(N + F·D)."""

    @staticmethod
    def forward(ctx: Any, W_FD: Tensor, row_N: Tensor, column_N: Tensor, value_N: Tensor) -> Tensor:
        rows = torch.arange(len(W_FD) + 1, device=W_FD.device)
        start_F = torch.searchsorted(row_N, rows)
        cosine_N = pair_products(W_FD, start_F, row_N, column_N)
        weighted_N = value_N.to(W_FD.dtype) * cosine_N
        ctx.save_for_backward(W_FD, start_F, column_N, weighted_N)
        return (weighted_N * cosine_N).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_FD, start_F, column_N, weighted_N = ctx.saved_tensors
        return sparse_product(start_F, column_N, 4 * grad * weighted_N, W_FD), None, None, None


def pair_products(W_FD: Tensor, start_F: Tensor, row_N: Tensor, column_N: Tensor) -> Tensor:
    """w_row·w_column of each pair [N], row by row."""
    if W_FD.device.type == "cpu":
        pattern = csr(start_F, column_N, torch.zeros_like(column_N, dtype=W_FD.dtype),
                      (len(W_FD), len(W_FD)))
        return torch.sparse.sampled_addmm(pattern, W_FD, W_FD.T).values()
    pairs = zip(row_N.split(2**16), column_N.split(2**16))
    return torch.cat([torch.linalg.vecdot(*(W_FD.index_select(0, part) for part in pair))
                      for pair in pairs])


class FramePotential(torch.autograd.Function):
    """Σ_{i≠j} (w_i·w_j)² = ‖WᵀW‖_F² − Σ‖w_i‖⁴, without the F × F Gram matrix.

    Time O(F·D²), memory O(F·D). Frame potential: Benedetto and Fickus 2003. Products are in
    `dtype`, to which V is W rounded; the rest keeps W's own.
    """

    @staticmethod
    def forward(ctx: Any, W_FD: Tensor, dtype: torch.dtype) -> Tensor:
        V_FD = W_FD.to(dtype)
        gram_DD = (V_FD.T @ V_FD).to(W_FD.dtype)
        square_F = torch.linalg.vector_norm(W_FD, dim=1).square()
        total = gram_DD.square().sum() - square_F.square().sum()
        mean = gram_DD.diagonal().mean()
        gram_DD.diagonal().sub_(mean)  # mostly a multiple of I, which need not go through rounding
        ctx.save_for_backward(W_FD, V_FD, gram_DD, square_F - mean)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_FD, V_FD, gram_DD, own_F = ctx.saved_tensors
        out_FD = (V_FD @ gram_DD.to(V_FD.dtype)).to(W_FD.dtype)
        return out_FD.addcmul_(W_FD, own_F[:, None], value=-1).mul_(4 * grad), None


def max_cosine_loss(W_FD: Tensor, generator: torch.Generator, chunk: int = 8192) -> Tensor:
    """OrtSAE (arXiv 2509.22033): mean over features of (max_{j≠i} w_i·w_j)² within random chunks.

    The nearest neighbour is found without a gradient; the loss is then one product a feature.
    """
    order = to_device(torch.randperm(len(W_FD), generator=generator), W_FD.device)
    nearest = torch.empty_like(order)
    with torch.no_grad():
        for part in order.chunk(math.ceil(len(order) / chunk)):
            for rows in part.split(1024):
                cosine = W_FD[rows] @ W_FD[part].T
                cosine.masked_fill_(rows[:, None] == part, -math.inf)
                nearest[rows] = part[cosine.argmax(dim=1)]
    chosen_FD = W_FD.index_select(0, nearest)  # W_FD[nearest]'s gradient would add in any order
    return torch.linalg.vecdot(W_FD, chosen_FD).square().mean()
