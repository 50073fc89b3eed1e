"""The sparse training step's products, the screen for active features, SAEs as exported."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn


class Code(NamedTuple):
    """A batch through the SAE: reconstruction, and its active features as a flat list."""

    z_hat_BD: Tensor
    value_N: Tensor  # activation, > 0
    row_N: Tensor  # token
    column_N: Tensor  # feature

    def counts(self, d_sae: int) -> Tensor:
        """On how many tokens each feature fires, [F]."""
        return torch.bincount(self.column_N, minlength=d_sae)

    def totals(self, domain_B: Tensor, n_domains: int, d_sae: int) -> tuple[Tensor, Tensor]:
        """Sums of the activations: by domain and feature [K, F], and of all []."""
        index_N = domain_B[self.row_N] * d_sae + self.column_N
        total = torch.zeros(n_domains * d_sae, device=index_N.device)
        total = total.index_add(0, index_N, self.value_N)
        return total.view(n_domains, d_sae), self.value_N.sum()

    def lists(self, room: int) -> Tensor:
        """Each token's active features [B, room] from 1 on, int32; 0 where there are no more. A
        token that has more than `room` of them has an empty list."""
        B, fires_N = len(self.z_hat_BD), self.value_N > 0
        count_B = torch.zeros(B, dtype=torch.long, device=self.row_N.device)
        count_B = count_B.index_add(0, self.row_N, fires_N.long())
        rank_N = torch.arange(len(self.row_N), device=self.row_N.device)
        rank_N = rank_N - (count_B.cumsum(0) - count_B).index_select(0, self.row_N)
        place_N = self.row_N * room + rank_N
        place_N = place_N.where(fires_N & (rank_N < room), B * room)  # beside the lists
        lists = torch.zeros(B * room + 1, dtype=torch.int32, device=self.row_N.device)
        lists = lists.index_copy(0, place_N, self.column_N.int() + 1)[:-1].view(B, room)
        return lists.masked_fill(count_B[:, None] > room, 0)

    def add_signs_(self, sum_FR: Tensor, column_B: Tensor, sign_B: Tensor) -> None:
        """Add each token's sign, in its column, to the rows of the features that fire on it."""
        place_N = self.column_N * sum_FR.shape[1] + column_B[self.row_N]
        sum_FR.view(-1).index_add_(0, place_N, sign_B[self.row_N])


class DenseCode(NamedTuple):
    """The same with all activations [B, F]: how many are above zero need not be known, for which a
    program would wait for its GPU. Sums are products with what the tokens are."""

    z_hat_BD: Tensor
    f_BF: Tensor
    fires_BF: Tensor  # 1 where an activation is above zero, else 0

    def counts(self, d_sae: int) -> Tensor:
        return self.fires_BF.sum(0, dtype=torch.float32).long()

    def totals(self, domain_B: Tensor, n_domains: int, d_sae: int) -> tuple[Tensor, Tensor]:
        is_KB = domain_B == torch.arange(n_domains, device=domain_B.device)[:, None]
        total_KF = (is_KB.to(self.f_BF.dtype) @ self.f_BF).float()
        return total_KF, total_KF.sum()

    def lists(self, room: int) -> Tensor:
        value_BL, column_BL = self.f_BF.topk(min(room, self.f_BF.shape[1]))
        lists = (column_BL.int() + 1).masked_fill(value_BL <= 0, 0)
        lists = nn.functional.pad(lists, (0, room - lists.shape[1]))
        count_B = self.fires_BF.sum(1, dtype=torch.float32)
        return lists.masked_fill(count_B[:, None] > room, 0)


@dataclass(frozen=True)
class ExportedSAE:
    """f = a where a > θ, else 0;   a = (x − b_dec) W_enc + b_enc;   x̂ = f W_dec + b_dec.

    On raw residuals x. `W_enc [D, F]`, `b_enc [F]`, `W_dec [F, D]`, `b_dec [D]`, float32 on the
    CPU. A `threshold` θ of 0 is ReLU. What is exported and what is evaluated, whatever scale it was
    trained at.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: float = 0.0

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The weights, with a threshold for each feature [F] where there is one."""
        parts = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        if self.threshold:
            parts["threshold"] = torch.full((self.d_sae,), self.threshold)
        return parts

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "ExportedSAE":
        """The SAE of these `tensors`."""
        parts = dict(tensors)
        threshold_F = parts.pop("threshold", torch.zeros(1))
        return cls(**parts, threshold=float(threshold_F[0]))

    @torch.no_grad()
    def code(self, x_ND: Tensor) -> "Code":
        """Reconstruction and active features of raw residuals [N, D]."""
        weights = self.W_enc.T.contiguous(), self.b_enc, self.W_dec, self.b_dec
        return Code(*SparseAutoencode.apply(x_ND, *weights, faster_screen(), self.threshold,
                                            lambda _: self.threshold))

    def encode(self, x: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
        """Activations [..., n] of some features, all unless told."""
        a = (x - self.b_dec) @ self.W_enc[:, features] + self.b_enc[features]
        return torch.relu(a) if not self.threshold else a.where(a > self.threshold, 0.0)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.encode(x) @ self.W_dec + self.b_dec


Limit = Callable[[Tensor], float | Tensor]  # of all activations above zero, of which what is above
# the limit stays; a limit is zero or more


def no_limit(_value_N: Tensor) -> float:
    """ReLU's: all that is above zero stays."""
    return 0.0


def above(f_BF: Tensor, limit: Limit) -> Tensor:
    """Activations that are above their limit, zero elsewhere."""
    return f_BF if limit is no_limit else f_BF * (f_BF > limit(f_BF.detach()))


class SparseAutoencode(torch.autograd.Function):
    """z → (ẑ, active values, rows, columns) with everything but the encoder's screen sparse.

    About one feature in a hundred fires, so activations, decoding, the gradient at active
    positions and both weight gradients are products at the places of a sparse B × F matrix. Same
    mathematics as `CustomSAE.dense_code`, in float32 whatever the screen's precision. The `limit`
    is asked of the values above `floor` first, and again of all where it is not above that.
    """

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor,
                b_dec_D: Tensor, screen: str, floor: float = 0.0,
                limit: Limit = no_limit) -> tuple[Tensor, ...]:
        shape = len(z_BD), len(b_enc_F)
        centred_BD = z_BD - b_dec_D
        for least in (floor, 0.0):
            row_N, column_N = candidates(centred_BD, W_enc_FD, b_enc_F - least, screen)
            pattern = csr(row_starts(row_N, shape[0]), column_N, torch.zeros(len(row_N)), shape)
            product_N = torch.sparse.sampled_addmm(pattern, centred_BD, W_enc_FD.T).values()
            value_N = product_N.add_(b_enc_F.index_select(0, column_N))
            if (cut := limit(value_N)) >= least:
                break
        active = (value_N > cut).nonzero().squeeze(1)
        row_N, column_N, value_N = (part.index_select(0, active)
                                    for part in (row_N, column_N, value_N))
        start_B = row_starts(row_N, shape[0])
        z_hat_BD = sparse_product(start_B, column_N, value_N, W_dec_FD).add_(b_dec_D)
        ctx.save_for_backward(centred_BD, W_enc_FD, W_dec_FD, start_B, column_N, value_N)
        ctx.mark_non_differentiable(row_N, column_N)
        return z_hat_BD, value_N, row_N, column_N

    @staticmethod
    def backward(ctx: Any, grad_z_hat_BD: Tensor, grad_value_N: Tensor,
                 *_: Any) -> tuple[Tensor | None, ...]:
        centred_BD, W_enc_FD, W_dec_FD, start_B, column_N, value_N = ctx.saved_tensors
        # feature by feature, as both weight gradients are: the batch, not W, stays in the cache
        start_F, row_N, order = transposed(start_B, column_N, len(W_dec_FD))
        pattern = csr(start_F, row_N, torch.zeros_like(value_N), (len(W_dec_FD), len(centred_BD)))
        grad_N = torch.sparse.sampled_addmm(pattern, W_dec_FD, grad_z_hat_BD.T).values()
        grad_N = grad_N + grad_value_N.index_select(0, order)
        value_N = value_N.index_select(0, order)
        grad_W_dec_FD = sparse_product(start_F, row_N, value_N, grad_z_hat_BD)
        grad_W_enc_FD = sparse_product(start_F, row_N, grad_N, centred_BD)
        one_B1 = torch.ones_like(centred_BD[:, :1])
        grad_b_enc_F = sparse_product(start_F, row_N, grad_N, one_B1).squeeze(1)
        grad_b_dec_D = grad_z_hat_BD.sum(0) - grad_b_enc_F @ W_enc_FD
        return None, grad_W_enc_FD, grad_b_enc_F, grad_W_dec_FD, grad_b_dec_D, None, None, None


class DenseAutoencode(torch.autograd.Function):
    """z → (ẑ, f [B, F], where f > 0) by five products of `dtype`, which is f's too; all else is
    float32.

    Same mathematics as `SparseAutoencode`. One product less than by autograd, which would find
    b_dec's gradient by that of every token. On a GPU five readings of f take as long as a product
    at D = 512, so there are few: ReLU is a part of the first product, the sum of f's two
    gradients one of the fourth.
    """

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor,
                b_dec_D: Tensor, dtype: torch.dtype,
                limit: Limit = no_limit) -> tuple[Tensor, ...]:
        centred_BD, V_dec_FD = (z_BD - b_dec_D).to(dtype), W_dec_FD.to(dtype)
        f_BF = torch._addmm_activation(b_enc_F.to(dtype), centred_BD, W_enc_FD.to(dtype).T)
        f_BF = above(f_BF, limit)
        fires_BF = f_BF.sign()
        ctx.save_for_backward(centred_BD, W_enc_FD, V_dec_FD, f_BF)
        ctx.mark_non_differentiable(fires_BF)
        return (f_BF @ V_dec_FD).float() + b_dec_D, f_BF, fires_BF

    @staticmethod
    def backward(ctx: Any, grad_z_hat_BD: Tensor, grad_f_BF: Tensor,
                 *_: Any) -> tuple[Tensor | None, ...]:
        centred_BD, W_enc_FD, V_dec_FD, f_BF = ctx.saved_tensors
        grad_BD = grad_z_hat_BD.to(f_BF.dtype)
        grad_BF = torch.addmm(grad_f_BF, grad_BD, V_dec_FD.T)
        grad_BF = torch.ops.aten.threshold_backward(grad_BF, f_BF, 0)
        grad_W_enc_FD, grad_W_dec_FD = ((part_BF.T @ part_BD).float() for part_BF, part_BD in (
            (grad_BF, centred_BD), (f_BF, grad_BD)))
        grad_b_enc_F = grad_BF.sum(0, dtype=torch.float32)
        grad_b_dec_D = grad_z_hat_BD.sum(0) - grad_b_enc_F @ W_enc_FD
        return None, grad_W_enc_FD, grad_b_enc_F, grad_W_dec_FD, grad_b_dec_D, None, None


class HeldGradient(torch.autograd.Function):
    """A value of W that was computed earlier, with the gradient that it had then. Rows of W that
    are not in `rows_F` get none.

    The same as value + (rows · (⟨gradient, W⟩ − stop-gradient of it)).sum(), without the product,
    whose value is zero.
    """

    @staticmethod
    def forward(ctx: Any, W_FD: Tensor, value: Tensor, grad_FD: Tensor, rows_F: Tensor) -> Tensor:
        ctx.save_for_backward(grad_FD, rows_F)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_FD, rows_F = ctx.saved_tensors
        return grad_FD * (grad * rows_F)[:, None], None, None, None


def candidates(x_BD: Tensor, W_FD: Tensor, b_F: Tensor, screen: str,
               rows: int = 512) -> tuple[Tensor, Tensor]:
    """Rows and columns where x·w + b may be above zero: all those places, and a few more.

    `float32` multiplies as usual. `int8`, several times faster on processors with 8-bit dot
    products, rounds both factors to steps s = max|·|/127 (one for x, one for each w), which errs
    with σ² = (s_x²‖w‖² + s_w²‖x‖²)/12; the threshold is six σ lower. Before that, dimensions are
    rescaled so that both factors have about the same outliers in each (the residual stream has
    some of fifty times the usual size; the idea of SmoothQuant, Xiao et al. 2023); any scale is
    right, so a sample of the rows serves. `rows` at a time: the products stay in the
    processor's cache.
    """
    longest = torch.linalg.vector_norm(x_BD, dim=1).max()
    limit_F = -b_F - 1e-6 * longest  # roundings differ between dense and sampled products
    multiply = torch.mm
    if screen == "int8":
        balance_D = (largest(x_BD[::8], 0) / largest(W_FD[::8], 0).clamp(min=1e-9)).sqrt()
        balance_D.clamp_(min=1e-9)
        x_BD, W_FD = x_BD / balance_D, W_FD * balance_D
        step_x = (largest(x_BD, 1).max() / 127).clamp(min=1e-12)
        step_F = largest(W_FD, 1).clamp_(min=1e-12) / 127
        longest = torch.linalg.vector_norm(x_BD, dim=1).max()  # of the rescaled rows
        sigma_F = torch.hypot(step_x * torch.linalg.vector_norm(W_FD, dim=1), step_F * longest)
        limit_F -= 6 * sigma_F / math.sqrt(12)
        limit_F = (limit_F / (step_x * step_F)).clamp_(-(2.0**30), 2.0**30)
        limit_F = limit_F.floor().to(torch.int32)
        x_BD = x_BD.div_(step_x).round_().to(torch.int8)
        W_FD = W_FD.div_(step_F[:, None]).round_().to(torch.int8)
        multiply = torch._int_mm
    found = []
    product_CF = torch.empty(min(rows, len(x_BD)), len(W_FD), dtype=limit_F.dtype)
    for start in range(0, len(x_BD), rows):
        part = x_BD[start : start + rows]
        product = product_CF[: len(part)]
        multiply(part, W_FD.T, out=product)
        above = np.greater(product.numpy(), limit_F.numpy())  # faster than torch.gt
        row_N, column_N = places(torch.from_numpy(above))
        found.append((row_N.add_(start), column_N))
    return tuple(torch.cat(parts) for parts in zip(*found))


def places(hit_CF: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the true entries, in order. So few are true that most words of eight
    entries hold none: these are passed over whole."""
    width = 8 if hit_CF.shape[1] % 8 == 0 else 1
    words_CW = hit_CF.view(torch.int64 if width == 8 else torch.uint8)
    row, word = words_CW.nonzero().T.contiguous()
    which, place = words_CW[row, word].view(torch.bool).view(-1, width).nonzero().T.contiguous()
    return row.index_select(0, which), word.index_select(0, which).mul_(width).add_(place)


def largest(x_BD: Tensor, dim: int) -> Tensor:
    """Largest magnitude along a dimension, without a copy of all magnitudes."""
    return torch.maximum(x_BD.amax(dim), -x_BD.amin(dim))


def faster_screen() -> str:
    """int8 where the processor has 8-bit dot products, which are several times faster; the
    processor is asked, not timed, so that a run that continues never changes its mind."""
    has = torch.cpu.get_capabilities()
    return "int8" if has.get("avx512_vnni") or has.get("amx_int8") else "float32"


def row_starts(row_N: Tensor, n_rows: int) -> Tensor:
    """Where each row begins in a list sorted by rows, and the end: a CSR pattern's first half."""
    start = torch.zeros(n_rows + 1, dtype=torch.long, device=row_N.device)
    torch.cumsum(torch.bincount(row_N, minlength=n_rows), 0, out=start[1:])
    return start


def transposed(start_B: Tensor, column_N: Tensor, F: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern of the transpose of a B × F CSR pattern, and where its entries were."""
    entries = np.arange(len(column_N)), column_N.cpu().numpy(), start_B.cpu().numpy()
    moved = scipy.sparse.csr_matrix(entries, shape=(len(start_B) - 1, F)).tocsc()
    parts = (torch.from_numpy(part).to(column_N.device, torch.long)
             for part in (moved.indptr, moved.indices, moved.data))
    return tuple(parts)


def csr(start: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(start, column, value, shape, check_invariants=False)


def sparse_product(start: Tensor, column: Tensor, value: Tensor, dense: Tensor) -> Tensor:
    """A sparse matrix, by its CSR parts, times a dense one: sums of the dense one's rows. Twice as
    fast as the product of a CSR tensor."""
    return nn.functional.embedding_bag(column, dense, start, mode="sum", per_sample_weights=value,
                                       include_last_offset=True)
