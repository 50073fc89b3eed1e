"""The Triton kernels of a GPU's step, by Triton's interpreter, against the plain equations."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import planted_activations

from experiment import CustomSAE, CustomTrainer
from lab.sparse import DenseCode
from lab.storage import randomness

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels, and Triton's own, are defined
pytest.importorskip("triton")

from lab.kernels import (  # noqa: E402
    ListedAutoencode,
    PaddedCode,
    dot_rows,
    list_active,
    sum_rows,
)

ROOT = Path(__file__).resolve().parent.parent
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lab import kernels

LISTS = dict(start="*i64", indices="*i64", values="*fp32")
for half in ("*bf16", "*fp32"):
    screen = dict(product=half, bias="*fp32", F="i32")
    for kernel, types, sizes in (
        (kernels.count_kernel, {**screen, "count": "*i64"}, dict(BLOCK=1024)),
        (kernels.list_kernel, {**screen, "start": "*i64", "values": "*fp32", "rows": "*i64",
                               "columns": "*i64", "room": "i32"}, dict(BLOCK=1024)),
        (kernels.sum_kernel, {**LISTS, "dense": half, "out": "*fp32", "D": "i32", "room": "i32"},
         dict(ENTRIES=8, WIDTH=256)),
        (kernels.sum_kernel, {**LISTS, "dense": half, "out": "*fp32", "room": "i32"},
         dict(ENTRIES=8, WIDTH=16, D=1)),
        (kernels.dot_kernel, {**LISTS, "dense": half, "own": half, "out": "*fp32", "D": "i32",
                              "room": "i32"}, dict(ENTRIES=8, WIDTH=256)),
    ):
        types |= {name: "constexpr" for name in sizes}
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, sizes)
        assert len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000
        print(kernel.fn.__name__)
"""


@pytest.fixture
def problem(generator):
    """Inputs z [B, D], weights of an SAE [F, D], and slopes of its outputs. Neither D nor F fills
    whole blocks; one feature has nothing, one fires on all tokens."""
    B, D, F = 12, 40, 300
    z = torch.randn(B, D, generator=generator)
    W_enc, W_dec = (torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
                    for _ in range(2))
    b_enc = torch.full((F,), -1.2)
    b_enc[[0, 299]] = torch.tensor([-100.0, 9.0])
    weights = [part.requires_grad_() for part in (W_enc, b_enc, W_dec, torch.zeros(D))]
    return z, weights, torch.randn(B, D, generator=generator), torch.randn(
        B, F, generator=generator)


def plain(z, W_enc, b_enc, W_dec, b_dec):
    """f = ReLU((z − b_dec) W_enc + b_enc), ẑ = f W_dec + b_dec."""
    f = torch.relu((z - b_dec) @ W_enc.T + b_enc)
    return f @ W_dec + b_dec, f


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_the_listed_step_has_the_code_and_gradients_of_the_equations(problem, dtype, error):
    """In float64; in bfloat16 some entries are active for one precision alone."""
    z, weights, pull_BD, pull_BF = problem
    z_hat, value, row, column = ListedAutoencode.apply(z, *weights, dtype, 60)
    exact = [part.detach().double().requires_grad_() for part in weights]
    expected, f = plain(z.double(), *exact)
    n = int((value > 0).sum())
    assert 0 < n < len(value) == 12 * 60
    if dtype == torch.float32:
        assert torch.equal(torch.stack([row, column])[:, :n].T, (f > 0).nonzero())
        torch.testing.assert_close(value[:n].double(), f[f > 0], rtol=1e-4, atol=1e-5)
    assert float((z_hat - expected).detach().norm() / expected.detach().norm()) < error
    ours = torch.autograd.grad((pull_BD * z_hat).sum() + (pull_BF[row, column] * value).sum(),
                               weights)
    theirs = torch.autograd.grad((pull_BD * expected).sum() + (pull_BF * f).sum(), exact)
    for one, other in zip(ours, theirs):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < error


def test_too_many_active_features_are_no_number_and_never_a_wrong_one(problem):
    z, weights, *_ = problem
    f = plain(z, *weights)[1]
    room = int((f > 0).sum()) // 12
    z_hat, value, *_ = ListedAutoencode.apply(z, *weights, torch.float32, room)
    assert len(value) == 12 * room < int((f > 0).sum())
    assert bool(z_hat.isnan().all())
    assert not bool(ListedAutoencode.apply(z, *weights, torch.float32, room + 1)[0].isnan().any())


def test_a_list_holds_what_is_active_in_order_and_ends_at_its_room(generator):
    """Rows of more than one block, one of them with nothing."""
    product = torch.randn(7, 2100, generator=generator)
    product[3] = -9
    bias = torch.full((2100,), -2.5)
    start, *whole = list_active(product, bias, 1000)
    value = (product + bias).relu()
    n = int(start[-1])
    assert torch.equal(start.diff(), (value > 0).sum(1))
    assert torch.equal(torch.stack(whole[1:])[:, :n].T, value.nonzero())
    assert torch.equal(whole[0], torch.cat([value[value > 0], torch.zeros(1000 - n)]))
    begins, *cut = list_active(product, bias, n // 2)
    assert torch.equal(begins, start)
    for one, other in zip(whole, cut):
        assert torch.equal(one[: n // 2], other)


def test_rows_are_summed_and_multiplied_where_the_pattern_has_entries(generator):
    """Rows with none, one, and more entries than are taken at a time; entries that end early."""
    start = torch.tensor([0, 0, 1, 12, 12, 15])
    index = torch.randint(0, 9, (15,), generator=generator)
    value, dense = (torch.randn(*size, generator=generator) for size in ((15,), (9, 300)))
    own = torch.randn(5, 300, generator=generator)
    row = torch.repeat_interleave(torch.arange(5), start.diff())
    expected = torch.zeros(5, 300).index_add(0, row, value[:, None] * dense[index])
    torch.testing.assert_close(sum_rows(start, index, value, dense), expected)
    torch.testing.assert_close(dot_rows(start, index, dense, own), (dense[index] * own[row]).sum(1),
                               rtol=1e-4, atol=1e-4)
    short = sum_rows(start, index[:11], value[:11], dense)  # lists have less room than the pattern
    torch.testing.assert_close(short, expected.index_add(0, row[11:], -value[11:, None]
                                                         * dense[index[11:]]))


def test_a_padded_code_counts_and_sums_what_a_listed_one_does(problem, generator):
    z, weights, *_ = problem
    f = plain(z, *(part.detach() for part in weights))[1]
    code = PaddedCode(*ListedAutoencode.apply(z, *weights, torch.float32, 60))
    domain = torch.randint(0, 2, (12,), generator=generator)
    assert torch.equal(code.counts(300), (f > 0).sum(0))
    total_KF, total = code.totals(domain, 2, 300)
    torch.testing.assert_close(total_KF, torch.stack([f[domain == k].sum(0) for k in (0, 1)]))
    torch.testing.assert_close(total, f.sum())
    for room in (300, int((f > 0).sum(1).max()) - 1):
        listed, dense = (one.lists(room).sort().values for one in (code, DenseCode(f, f, f.sign())))
        assert torch.equal(listed, dense)


def test_training_by_the_kernels_takes_the_path_of_the_dense_products(small_config, monkeypatch):
    config = dataclasses.replace(small_config, batch_size=32, steps=2, log_every=1)
    z, domain = planted_activations(64)
    paths = []
    monkeypatch.setattr(CustomTrainer, "code", lambda self, z: self.sae.gpu_code(z))
    for room in (0, 64):
        sae = CustomSAE(32, 128, randomness("weights", 0))
        sae.initialize_biases_(z, 16.0)
        sae.room = room
        trainer = CustomTrainer(config, sae, 0)
        paths.append([dict(trainer.step(*batch)) for batch in zip(z.split(32), domain.split(32))])
    for one, other in zip(*paths):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_kernels_compile_for_a_card(tmp_path):
    """To machine code of an H100; whether they are right and fast there only a card can tell."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert len(done.stdout.split()) == 10
