"""The sparse training step on a GPU, as Triton kernels: only rows that are needed are read.

Imported where it is asked for only: Triton comes with torch for CUDA and is large. Lists have a
fixed room, so that no program must know how much of it is used.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lab.sparse import Code


class PaddedCode(Code):
    """A code whose lists end with entries of value 0, which are nothing."""

    def counts(self, d_sae: int) -> Tensor:
        none_F = torch.zeros(d_sae, dtype=torch.long, device=self.value_N.device)
        return none_F.index_add(0, self.column_N, (self.value_N > 0).long())


class ListedAutoencode(torch.autograd.Function):
    """z → (ẑ, active values, rows, columns): `SparseAutoencode` on a GPU.

    Its one dense product, of `dtype`, is the encoder's; factors of the sparse ones are of `dtype`
    too, their sums float32. Values are zero from the end of the list on. With more than `room`
    active features a token, in the mean, ẑ is not a number, on which training stops.
    """

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor,
                b_dec_D: Tensor, dtype: torch.dtype, room: int) -> tuple[Tensor, ...]:
        centred_BD, V_dec_FD = (z_BD - b_dec_D).to(dtype), W_dec_FD.to(dtype)
        product_BF = centred_BD @ W_enc_FD.to(dtype).T
        start_B, value_N, row_N, column_N = list_active(product_BF, b_enc_F, room * len(z_BD))
        z_hat_BD = sum_rows(start_B, column_N, value_N, V_dec_FD).add_(b_dec_D)
        z_hat_BD = z_hat_BD.masked_fill_(start_B[-1] > len(value_N), torch.nan)
        ctx.save_for_backward(centred_BD, W_enc_FD, V_dec_FD, start_B, value_N, row_N, column_N)
        ctx.mark_non_differentiable(row_N, column_N)
        return z_hat_BD, value_N, row_N, column_N

    @staticmethod
    def backward(ctx: Any, grad_z_hat_BD: Tensor, grad_value_N: Tensor,
                 *_: Any) -> tuple[Tensor | None, ...]:
        centred_BD, W_enc_FD, V_dec_FD, start_B, value_N, row_N, column_N = ctx.saved_tensors
        F, grad_BD = len(V_dec_FD), grad_z_hat_BD.to(V_dec_FD.dtype).contiguous()
        grad_N = dot_rows(start_B, column_N, V_dec_FD, grad_BD) + grad_value_N
        # feature by feature; what is no entry comes last
        column_N, order = column_N.where(value_N > 0, F).sort(stable=True)
        start_F = torch.searchsorted(column_N, torch.arange(F + 1, device=column_N.device))
        row_N, value_N, grad_N = (part.index_select(0, order) for part in (row_N, value_N, grad_N))
        grad_W_dec_FD = sum_rows(start_F, row_N, value_N, grad_BD)
        grad_W_enc_FD = sum_rows(start_F, row_N, grad_N, centred_BD)
        grad_b_enc_F = sum_rows(start_F, row_N, grad_N, torch.ones_like(grad_BD[:, :1]))[:, 0]
        grad_b_dec_D = grad_z_hat_BD.sum(0) - grad_b_enc_F @ W_enc_FD
        return None, grad_W_enc_FD, grad_b_enc_F, grad_W_dec_FD, grad_b_dec_D, None, None


def list_active(product_BF: Tensor, bias_F: Tensor, room: int) -> tuple[Tensor, ...]:
    """Where rows of the list begin, [B + 1], and of each product + bias > 0 its value, row and
    column, row by row [N], N = `room`. Entries beyond the room are dropped."""
    B, F = product_BF.shape
    make = dict(device=product_BF.device, dtype=torch.long)
    count_B, start_B = torch.empty(B, **make), torch.zeros(B + 1, **make)
    value_N = torch.zeros(room, device=product_BF.device)
    row_N, column_N = torch.zeros(2, room, **make)
    count_kernel[(B,)](product_BF, bias_F, count_B, F, BLOCK=1024)
    torch.cumsum(count_B, 0, out=start_B[1:])
    list_kernel[(B,)](product_BF, bias_F, start_B, value_N, row_N, column_N, F, room, BLOCK=1024)
    return start_B, value_N, row_N, column_N


def sum_rows(start: Tensor, index_N: Tensor, value_N: Tensor, dense: Tensor) -> Tensor:
    """A sparse matrix, by its CSR parts, times a dense one, in float32."""
    rows, D = len(start) - 1, dense.shape[1]
    out = torch.empty(rows, D, device=dense.device)
    width = min(256, max(16, triton.next_power_of_2(D)))
    sum_kernel[(rows, triton.cdiv(D, width))](start, index_N, value_N, dense, out, D,
                                              len(value_N), ENTRIES=8, WIDTH=width)
    return out


def dot_rows(start: Tensor, index_N: Tensor, dense: Tensor, own: Tensor) -> Tensor:
    """Of each entry of a sparse pattern the product of its column's row of `dense` with its row's
    of `own`, in float32; zero where there is no entry."""
    out_N = torch.zeros(len(index_N), device=dense.device)
    D = dense.shape[1]
    width = min(256, max(16, triton.next_power_of_2(D)))
    dot_kernel[(len(start) - 1,)](start, index_N, dense, own, out_N, D, len(index_N), ENTRIES=8,
                                  WIDTH=width)
    return out_N


@triton.jit
def count_kernel(product, bias, count, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = column < F
        value = tl.load(product + row * F + column, there, 0.0).to(tl.float32)
        value += tl.load(bias + column, there, 0.0)
        found += ((value > 0) & there).to(tl.int32)
    tl.store(count + row, tl.sum(found).to(tl.int64))


@triton.jit
def list_kernel(product, bias, start, values, rows, columns, F, room, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(start + row)
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = column < F
        value = tl.load(product + row * F + column, there, 0.0).to(tl.float32)
        value += tl.load(bias + column, there, 0.0)
        active = ((value > 0) & there).to(tl.int32)
        place = end + tl.cumsum(active, 0) - 1
        kept = (active > 0) & (place < room)
        tl.store(values + place, value, kept)
        tl.store(columns + place, column.to(tl.int64), kept)
        tl.store(rows + place, tl.zeros((BLOCK,), tl.int64) + row, kept)
        end += tl.sum(active)


@triton.jit
def sum_kernel(start, indices, values, dense, out, D, room, ENTRIES: tl.constexpr,
               WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = tl.minimum(tl.load(start + row), room)
    last = tl.minimum(tl.load(start + row + 1), room)
    total = tl.zeros((WIDTH,), tl.float32)
    for n in range(first, last, ENTRIES):
        entry = n + tl.arange(0, ENTRIES)
        index = tl.load(indices + entry, entry < last, 0)
        value = tl.load(values + entry, entry < last, 0.0)
        there = (entry < last)[:, None] & (d < D)[None, :]
        part = tl.load(dense + index[:, None] * D + d[None, :], there, 0.0)
        total += tl.sum(part.to(tl.float32) * value[:, None], 0)
    tl.store(out + row * D + d, total, d < D)


@triton.jit
def dot_kernel(start, indices, dense, own, out, D, room, ENTRIES: tl.constexpr,
               WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.minimum(tl.load(start + row), room)
    last = tl.minimum(tl.load(start + row + 1), room)
    for n in range(first, last, ENTRIES):
        entry = n + tl.arange(0, ENTRIES)
        index = tl.load(indices + entry, entry < last, 0)
        total = tl.zeros((ENTRIES,), tl.float32)
        for left in range(0, D, WIDTH):
            d = left + tl.arange(0, WIDTH)
            there = (entry < last)[:, None] & (d < D)[None, :]
            part = tl.load(dense + index[:, None] * D + d[None, :], there, 0.0).to(tl.float32)
            mine = tl.load(own + row * D + d, d < D, 0.0).to(tl.float32)
            total += tl.sum(part * mine[None, :], 1)
        tl.store(out + entry, total, entry < last)
