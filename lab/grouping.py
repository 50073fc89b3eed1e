"""The evaluation's groups of features that fire together, and how well conditioned they are."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lab.sparse import Code
from lab.storage import randomness


class CoactivationSketch:
    """Which features fire together, batch by batch, in memory linear in F.

    With A [B, F] the firing indicators of a batch and Ω [B, R] a sparse sign matrix (each token in
    one random column with a random sign), the centred sum over batches of AᵀΩ is a random
    projection of each feature's firing history: inner products of its rows, divided by their
    norms, estimate correlations of firing to within 1/√R (count sketch, Charikar et al. 2002). An
    entry of A costs one addition, whatever R is.
    """

    def __init__(self, d_sae: int, size: int):
        self.sum_FR = torch.zeros(d_sae, size)
        self.signs_R = torch.zeros(size)
        self.fired_F = torch.zeros(d_sae)
        self.tokens = torch.zeros(())

    def add_(self, code: Code, n_tokens: int, generator: torch.Generator) -> None:
        """Add a batch of `n_tokens` that went into `code`."""
        column_B, coin_B = (torch.randint(0, n, (n_tokens,), generator=generator)
                            for n in (self.sum_FR.shape[1], 2))
        sign_B = coin_B * 2.0 - 1
        code.add_signs_(self.sum_FR, column_B, sign_B)
        self.signs_R.index_add_(0, column_B, sign_B)
        self.fired_F += code.counts(len(self.fired_F))
        self.tokens += len(sign_B)

    def unit_rows(self) -> Tensor:
        """Rows [F, R] of norm about one whose inner products estimate correlations of firing.

        Dead features, and features that fire always, have zero rows.
        """
        rate_F = self.fired_F / self.tokens.clamp(min=1)
        centred_FR = self.sum_FR - rate_F[:, None] * self.signs_R
        spread_F = (self.tokens * rate_F * (1 - rate_F)).sqrt()
        return torch.where(spread_F[:, None] > 0, centred_FR / spread_F[:, None], 0.0)


def assign_balanced(score_NK: Tensor, room_K: Tensor) -> Tensor:
    """Give every row one column, at most `room_K` rows a column, better scores first.

    In rounds: all unplaced rows ask for their best column that has room, and each column takes
    the highest bidders. Ties go to the lower row, so the result is deterministic.
    """
    N, K = score_NK.shape
    score_NK, room_K = score_NK.clone(), room_K.clone()
    place_N = torch.full((N,), -1)
    waiting = torch.arange(N)
    while len(waiting):
        score_NK[:, room_K == 0] = -math.inf
        best, column = score_NK[waiting].max(dim=1)
        order = torch.argsort(best, descending=True, stable=True)
        order = order[torch.argsort(column[order], stable=True)]
        sorted_column = column[order]
        first_K = torch.searchsorted(sorted_column, torch.arange(K))
        rank = torch.arange(len(order)) - first_K[sorted_column]
        taken = order[rank < room_K[sorted_column]]
        place_N[waiting[taken]] = column[taken]
        room_K -= torch.bincount(column[taken], minlength=K)
        waiting = waiting[place_N[waiting] < 0]
    return place_N


def cluster_balanced(rows_NR: Tensor, sizes_K: Tensor, seed: int, rounds: int = 12) -> Tensor:
    """Spherical k-means with clusters of exactly `sizes_K` rows; returns the cluster of each row.

    Starts from rows that are far from one another and have neighbours (rows that fire like no
    other make bad starts), lets centres move freely, then twice under the size constraint.
    """
    N, K = len(rows_NR), len(sizes_K)
    if K == 1:
        return torch.zeros(N, dtype=torch.long)
    sample = torch.randperm(N, generator=randomness("cluster", seed))[: max(16 * K, 2048)]
    near = rows_NR[sample] @ rows_NR[sample].T
    noise = near.std()
    support = (near - 2 * noise).clamp(min=0).sum(1) - near.diagonal().clamp(min=0)
    covered = torch.zeros(len(sample))
    centres = []
    for _ in range(K):
        pick = int((support * (1 - covered).clamp(min=0) ** 2).argmax())
        centre = ((near[pick] - 2 * noise).clamp(min=0)[:, None] * rows_NR[sample]).sum(0)
        centres.append(nn.functional.normalize(centre, dim=0))
        covered = torch.maximum(covered, near[pick] / near[pick, pick].clamp(min=1e-9))
        covered[pick] = 1
    centre_KR = torch.stack(centres)
    for i in range(rounds):
        score_NK = rows_NR @ centre_KR.T
        free = i < rounds - 2
        place_N = score_NK.argmax(dim=1) if free else assign_balanced(score_NK, sizes_K)
        total = torch.zeros_like(centre_KR).index_add_(0, place_N, rows_NR)
        moved = total.norm(dim=1, keepdim=True) > 0
        centre_KR = torch.where(moved, nn.functional.normalize(total, dim=1), centre_KR)
    return assign_balanced(rows_NR @ centre_KR.T, sizes_K)


def group_features(rows_FR: Tensor, group_size: int, seed: int, branch: int = 128) -> Tensor:
    """Groups [G, M] of features that fire together, each feature in exactly one, each of M.

    A tree of balanced clusterings with at most `branch` children a node, so that time is linear
    in F (up to the depth of the tree). Dead features, which have zero rows, fill up what is left.
    Raises ValueError where F is no multiple of the group size.
    """
    F = len(rows_FR)
    if F % group_size:
        raise ValueError(f"{F} features do not divide into groups of {group_size}")

    def divide(index: Tensor) -> list[Tensor]:
        n_groups = len(index) // group_size
        children = min(n_groups, branch)
        if children == 1:
            return [index.sort().values]
        counts = torch.full((children,), n_groups // children)
        counts[: n_groups % children] += 1
        place = cluster_balanced(rows_FR[index], counts * group_size, seed)
        return [part for k in range(children) for part in divide(index[place == k])]

    return torch.stack(divide(torch.arange(F)))


def condition_numbers(W_FD: Tensor, groups_GM: Tensor) -> Tensor:
    """κ = σ_max/σ_min of each group's decoder rows, float64 [G]; 1 is best."""
    W_GMD = W_FD.detach().double()[groups_GM]
    return gram_condition_numbers(W_GMD @ W_GMD.mT)


def gram_condition_numbers(gram_GMM: Tensor) -> Tensor:
    """The same from Gram matrices of rows, float64. Linearly dependent rows, whose κ is infinite,
    give 1e7, the largest value that the precision of the eigenvalues can tell."""
    eigenvalues = torch.linalg.eigvalsh(gram_GMM)
    largest = eigenvalues[:, -1].clamp(min=1e-300)
    return (largest / torch.maximum(eigenvalues[:, 0], 1e-14 * largest)).sqrt()


def random_condition_number(group_size: int, d_in: int) -> float:
    """κ of M random unit vectors in D dimensions, by Marchenko and Pastur (large M and D)."""
    root = math.sqrt(group_size / d_in)
    return (1 + root) / (1 - root)


class GroupStatistics(NamedTuple):
    """What is known of groups, one value a group."""

    coactivation_G: Tensor  # mean correlation of firing between members
    kappa_G: Tensor  # condition number of the members' directions


def group_statistics(rows_FR: Tensor, W_FD: Tensor, groups_GM: Tensor) -> GroupStatistics:
    """Co-activation from the sketch's rows, and κ.

    Mean correlation of M rows: (‖Σ u‖² − Σ‖u‖²) / (M (M − 1)).
    """
    rows_GMR = rows_FR[groups_GM]
    M = groups_GM.shape[1]
    pairs = rows_GMR.sum(1).square().sum(1) - rows_GMR.square().sum((1, 2))
    return GroupStatistics(pairs / (M * (M - 1)), condition_numbers(W_FD, groups_GM))
