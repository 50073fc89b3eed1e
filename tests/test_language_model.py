"""The language model around its hook, in both architectures, against its plain forward pass."""

import shutil
import subprocess
import sys
import trace
from pathlib import Path

import pytest
import torch
from random_models import KINDS, around_hook, make
from tiny_substrate import WIDTH

from lab.language_model import PackedLinear, faster_dtype, log_probs, losses

ROOT = Path(__file__).resolve().parent.parent


@KINDS
def test_the_residual_is_the_blocks_whole_output(kind):
    """All rows of the batch, not element 0 of it; equal to the model's own hidden states."""
    model, lm = make(kind)
    tokens = torch.randint(0, 91, (3, 10))
    x = lm.residual(tokens)
    assert x.shape == (3, 10, WIDTH)
    hidden = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(x, hidden[2])  # after blocks 0 and 1


@KINDS
def test_nothing_after_the_hook_is_run(kind):
    model, lm = make(kind)
    model.base_model.layers[2].register_forward_pre_hook(lambda *_: pytest.fail("past the hook"))
    lm.residual(torch.zeros(1, 4, dtype=torch.long))


@KINDS
def test_nothing_before_the_hook_is_run_again(kind):
    model, lm = make(kind)
    tokens = torch.randint(0, 91, (3, 10))
    x = lm.residual(tokens)
    run = []
    for i, block in enumerate(model.base_model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: run.append(i))
    lm.final(tokens, x)
    assert run == [2, 3]


@KINDS
def test_residuals_put_back_unchanged_change_no_logit(kind):
    model, lm = make(kind)
    tokens = torch.randint(0, 91, (3, 10))
    h = lm.final(tokens, lm.residual(tokens))
    assert torch.equal(lm.head(h), model(tokens).logits)


@KINDS
def test_losses_are_the_models_own(kind):
    model, lm = make(kind)
    tokens = torch.randint(0, 91, (5, 12))
    unmodified = losses(lm, tokens, lm.residual(tokens), rows=2)
    assert unmodified.shape == (5, 11)
    assert float(unmodified.mean()) == pytest.approx(float(model(tokens, labels=tokens).loss),
                                                     rel=1e-5)
    assert not torch.allclose(unmodified, losses(lm, tokens, lm.residual(tokens) * 0))


@KINDS
def test_the_last_token_of_a_context_is_scored_and_not_run(kind, monkeypatch):
    _, lm = make(kind)
    tokens, run, final = torch.randint(0, 91, (5, 12)), [], lm.final
    monkeypatch.setattr(lm, "final", lambda *inputs: run.append(inputs[0]) or final(*inputs))
    assert losses(lm, tokens, lm.residual(tokens), rows=2).shape == (5, 11)
    assert sum(part.numel() for part in run) == 5 * 11


def test_log_probabilities_are_those_of_the_whole_vocabulary():
    """Vocabulary and states in blocks, targets that share a state: the same as log_softmax."""
    _, lm = make("llama")
    lm.head = torch.nn.Linear(WIDTH, 2500, bias=False)
    h = torch.randn(1100, WIDTH)
    row, target = torch.randint(0, 1100, (3000,)), torch.randint(0, 2500, (3000,))
    expected = lm.head(h).log_softmax(-1)[row, target].detach()
    torch.testing.assert_close(log_probs(lm, h, row, target), expected, atol=1e-5, rtol=1e-5)
    assert len(log_probs(lm, h, row[:0], target[:0])) == 0
    assert len(log_probs(lm, h[:0], row[:0], target[:0])) == 0


def test_no_text_has_no_tokens():
    assert make("llama")[1].tokenize([]) == []


# -- bfloat16 ------------------------------------------------------------------------------------


def test_bfloat16_is_chosen_where_the_processor_has_its_products(processor):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        processor(bfloat16=has)
        assert faster_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_in_bfloat16_plain_attention_is_as_near_as_the_fused_one(kind):
    model, lm = make(kind)
    assert model.config._attn_implementation == "sdpa"  # float32 keeps it
    tokens = torch.randint(0, 91, (4, 100))
    exact = lm.residual(tokens)
    model, _ = make(kind)
    lm = around_hook(model.bfloat16())
    assert model.config._attn_implementation == "eager"
    plain = float((lm.residual(tokens) - exact).norm())
    model.set_attn_implementation("sdpa")
    fused = float((lm.residual(tokens) - exact).norm())
    assert 0 < fused < 0.1 * float(exact.norm())
    assert plain < 1.2 * fused


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no such products on this processor")


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_the_plain_ones_bits_for_any_number_of_rows(bias):
    layer = torch.nn.Linear(48, 80, bias=bias).bfloat16().requires_grad_(False)
    packed = PackedLinear(layer)
    for shape in ((1, 48), (3, 7, 48), (2048, 48)):
        x = torch.randn(shape).bfloat16()
        assert torch.equal(packed(x), layer(x))


@needs_bfloat16
@pytest.mark.parametrize(("kind", "per_block"), [("llama", 7), ("neox", 4)])
def test_in_bfloat16_all_layers_are_packed_and_no_bit_changes(kind, per_block):
    model, _ = make(kind)
    model.bfloat16().set_attn_implementation("eager")
    tokens = torch.randint(0, 91, (4, 100))
    expected = model(tokens, output_hidden_states=True).hidden_states[2]
    lm = around_hook(model)
    layers = [type(module) for module in model.base_model.modules()]
    assert layers.count(PackedLinear) == per_block * len(model.base_model.layers)
    assert torch.nn.Linear not in layers
    assert torch.equal(lm.residual(tokens), expected)


# -- nnsight, which reads its own source lines ---------------------------------------------------

EDITED = """
import linecache, sys
from pathlib import Path
import torch
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "tests")]
from random_models import make  # imports the laboratory
source = Path("lab/language_model.py")
source.write_text("import os  # a line more at the top\\n" * 3 + source.read_text())
linecache.checkcache()  # as every traceback that is printed does
model, lm = make("llama")
tokens = torch.randint(0, 91, (3, 10))
x = lm.residual(tokens)
assert torch.equal(x, model(tokens, output_hidden_states=True).hidden_states[2])
assert torch.equal(lm.head(lm.final(tokens, x)), model(tokens).logits)
"""


def test_a_source_file_edited_while_the_program_runs_does_not_disturb_the_language_model(tmp_path):
    shutil.copytree(ROOT / "lab", tmp_path / "lab")
    for name in ("experiment.py", "tests/random_models.py", "tests/tiny_substrate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run([sys.executable, "-c", EDITED], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_language_model_works_under_pythons_own_tracer():
    _, lm = make("llama")
    tokens = torch.randint(0, 91, (3, 10))
    x = lm.residual(tokens)
    tracer = trace.Trace(count=1, trace=0, ignoredirs=[sys.prefix, sys.base_prefix])
    assert torch.equal(tracer.runfunc(lm.residual, tokens), x)
    assert torch.equal(tracer.runfunc(lm.final, tokens, x), lm.final(tokens, x))
