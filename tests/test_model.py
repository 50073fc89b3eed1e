"""The hook, the forest of questions and the buffer, on small models of both architectures."""

import dataclasses

import pytest
import torch
import transformers

import experiment as ex


class WordTokenizer:
    """Each word a token; enough for a model that was never trained."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[1 + sum(word.encode()) % 90 for word in t.split()] for t in texts]}

    def convert_tokens_to_ids(self, token):
        assert token == "<|endoftext|>"
        return 0


def make(kind, layer=1):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=91,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    if kind != "neox":
        config = transformers.LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape))
    for parameter in model.parameters():  # larger weights: attention that depends on its input
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    lm = ex.HookedLM(model, WordTokenizer(), layer, torch.device("cpu"))
    if kind == "plain products":
        model.set_attn_implementation("eager")
    return model, lm


KINDS = pytest.mark.parametrize("kind", ["llama", "neox", "plain products"])


@KINDS
def test_residual_is_the_blocks_whole_output(kind):
    """All rows of the batch, not element 0 of it; equal to the model's own hidden states."""
    model, lm = make(kind)
    tokens = torch.randint(0, 91, (3, 10))
    x = lm.residual(tokens)
    assert x.shape == (3, 10, 32)
    hidden = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(x, hidden[2])  # after blocks 0 and 1


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_in_bfloat16_plain_attention_is_as_near_as_the_fused_one(kind):
    model, lm = make(kind)
    assert model.config._attn_implementation == "sdpa"  # float32 keeps it
    tokens = torch.randint(0, 91, (4, 100))
    exact = lm.residual(tokens)
    model, lm = make(kind)
    lm = ex.HookedLM(model.bfloat16(), WordTokenizer(), 1, torch.device("cpu"))
    assert model.config._attn_implementation == "eager"
    plain = float((lm.residual(tokens) - exact).norm())
    model.set_attn_implementation("sdpa")
    fused = float((lm.residual(tokens) - exact).norm())
    assert 0 < fused < 0.1 * float(exact.norm())
    assert plain < 1.2 * fused


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no such products on this processor")


@needs_bfloat16
def test_packed_layers_give_the_plain_ones_bits():
    """Any number of rows, with a bias and without."""
    for bias in (True, False):
        layer = torch.nn.Linear(48, 80, bias=bias).bfloat16().requires_grad_(False)
        packed = ex.PackedLinear(layer)
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
    lm = ex.HookedLM(model, WordTokenizer(), 1, torch.device("cpu"))
    layers = [type(module) for module in model.base_model.modules()]
    assert layers.count(ex.PackedLinear) == per_block * len(model.base_model.layers)
    assert torch.nn.Linear not in layers
    assert torch.equal(lm.residual(tokens), expected)


@KINDS
def test_nothing_after_the_hook_is_run(kind):
    model, lm = make(kind)
    model.base_model.layers[2].register_forward_pre_hook(lambda *_: pytest.fail("past the hook"))
    lm.residual(torch.zeros(1, 4, dtype=torch.long))


@KINDS
def test_an_intervention_that_changes_nothing_changes_no_logit(kind):
    model, lm = make(kind)
    tokens = torch.randint(0, 91, (3, 10))
    h = lm.final(tokens, lm.residual(tokens))
    assert torch.equal(lm.head(h), model(tokens).logits)


@KINDS
def test_losses_are_the_models_own(kind):
    model, lm = make(kind)
    tokens = torch.randint(0, 91, (5, 12))
    losses = lm.losses(tokens, lm.residual(tokens), rows=2)
    assert float(losses.mean()) == pytest.approx(float(model(tokens, labels=tokens).loss), rel=1e-5)
    changed = lm.losses(tokens, lm.residual(tokens) * 0)
    assert not torch.allclose(losses, changed)


def test_log_probs_are_those_of_the_whole_vocabulary():
    """Vocabulary and states in blocks, targets that share a state: the same as log_softmax."""
    _, lm = make("llama")
    lm.head = torch.nn.Linear(32, 2500, bias=False)
    h = torch.randn(1100, 32)
    row, target = torch.randint(0, 1100, (3000,)), torch.randint(0, 2500, (3000,))
    expected = lm.head(h).log_softmax(-1)[row, target].detach()
    torch.testing.assert_close(lm.log_probs(h, row, target), expected, atol=1e-5, rtol=1e-5)
    assert len(lm.log_probs(h, row[:0], target[:0])) == 0
    assert len(lm.log_probs(h[:0], row[:0], target[:0])) == 0


QUESTIONS = [
    (
        ex.Question(
            "Definition: a tall thing that grows\nTerm:",
            "Term:",
            ["one tree", "a dog", "house of cards", "sea"],
            0,
        ),
        ex.FORGET,
    ),
    (
        ex.Question(
            "Definition: where one lives\nTerm:",
            "Term:",
            ["river", "fire and water", "home", "red"],
            2,
        ),
        ex.RETAIN,
    ),
    (ex.Question("Definition: short\nTerm:", "Term:", ["a", "b c", "d", "e f g h"], 1), ex.RETAIN),
]


def plain_scores(model, lm, question):
    """Each option in a sequence of its own, by the model's plain forward pass."""
    scores = []
    for option in question.options:
        total = 0.0
        for sign, prompt in ((1, question.prompt), (-1, question.empty)):
            head, tail = lm.tokenize([prompt])[0], lm.tokenize([" " + option])[0]
            tokens = torch.tensor([[0, *head, *tail]])
            log_probs = model(tokens).logits.log_softmax(-1)[0]
            for i, token in enumerate(tail):
                total += sign * float(log_probs[len(head) + i, token])
        scores.append(total)
    return torch.tensor(scores)


@KINDS
def test_forest_scores_equal_plain_sequences(kind):
    model, lm = make(kind)
    forest = ex.Questions.from_text(QUESTIONS, lm)
    expected = torch.stack([plain_scores(model, lm, question) for question, _ in QUESTIONS])
    torch.testing.assert_close(forest.scores(forest.base_S), expected, atol=2e-4, rtol=1e-4)
    assert forest.right(forest.base_S).tolist() == [
        int(row.argmax()) == question.answer for row, (question, _) in zip(expected, QUESTIONS)
    ]


@KINDS
def test_only_what_follows_from_a_change_is_run(kind, monkeypatch):
    """Any set of changed tokens: the saved path equals running everything anew."""
    model, lm = make(kind)
    forest = ex.Questions.from_text(QUESTIONS, lm)
    plain = dataclasses.replace(forest, memory={})
    everything = torch.ones(len(forest.token_N), dtype=torch.bool)
    forest.remember_(lm)
    run, final = [], lm.final
    monkeypatch.setattr(lm, "final", lambda tokens, *rest: run.append(tokens.numel())
                        or final(tokens, *rest))
    for seed in range(6):
        touched = torch.rand(len(everything), generator=ex.randomness(seed)) < 0.15
        changed = torch.where(touched[:, None], forest.x_ND * 0.3, forest.x_ND)
        run.clear()
        saved = forest.log_probs(lm, changed, touched)
        assert sum(run) == int(forest.reached(touched).sum()) < len(everything)  # one row
        whole = plain.log_probs(lm, changed, everything)
        torch.testing.assert_close(saved, whole, atol=1e-4, rtol=1e-4)
        seen = forest.reached(touched)[forest.before_S]
        assert torch.equal(saved[~seen], forest.base_S[~seen])
        assert not torch.isclose(saved[seen], forest.base_S[seen]).all()
    assert not plain.memory
    assert torch.equal(forest.log_probs(lm, forest.x_ND, ~everything), forest.base_S)


@KINDS
def test_forest_under_an_intervention_equals_plain_sequences(kind):
    """Scale every residual at the hook: the packed path and a hook on the plain model agree."""
    model, lm = make(kind)
    forest = ex.Questions.from_text(QUESTIONS, lm)
    everything = torch.ones(len(forest.token_N), dtype=torch.bool)
    scores = forest.scores(forest.log_probs(lm, forest.x_ND * 0.5, everything))
    handle = model.base_model.layers[1].register_forward_hook(lambda _m, _i, out: out * 0.5)
    expected = torch.stack([plain_scores(model, lm, question) for question, _ in QUESTIONS])
    handle.remove()
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(scores, forest.scores(forest.base_S), atol=1e-2)


def test_rows_hold_every_token_once():
    """However trees are packed: each token to run in one place, beside the rest of its tree."""
    _, lm = make("llama")
    forest = ex.Questions.from_text(QUESTIONS, lm)
    wanted = torch.arange(len(forest.token_N)) % 3 > 0
    for width in (1, 20, 500):
        found, rest = (torch.cat([part.flatten() for part in parts])
                       for parts in zip(*forest.rows(wanted, width, 2)))
        assert found[found >= 0].sort().values.tolist() == wanted.nonzero()[:, 0].tolist()
        assert rest[rest >= 0].sort().values.tolist() == (~wanted).nonzero()[:, 0].tolist()


def test_no_questions_are_no_crash():
    _, lm = make("llama")
    forest = ex.Questions.from_text([], lm)
    assert len(forest.margins()) == len(forest.right(forest.base_S)) == 0
    nothing = torch.zeros(0, dtype=torch.bool)
    assert len(forest.log_probs(lm, forest.x_ND, nothing)) == 0


def test_margins_by_hand():
    forest = ex.Questions.from_text(QUESTIONS[:1], make("llama")[1])
    for option, score in enumerate((2.0, -1.0, 1.5, 0.0)):
        index = (forest.branch_S == 1 + option).nonzero()[:, 0]
        forest.base_S[index] = score / len(index)
        forest.base_S[forest.branch_S == 6 + option] = 0
    assert forest.margins().tolist() == [pytest.approx(0.5)]


def test_contexts_are_packed_without_padding_or_loss():
    contexts = ex.pack_contexts([[1, 2, 3], [4], [5, 6, 7, 8]], 0, 4)
    assert contexts.tolist() == [[0, 1, 2, 3], [0, 4, 0, 5]]  # the rest is less than a context


class TinySubstrate:
    """A substrate of a handful of texts on the small random model."""

    name, model_name, layer, fingerprint = "tiny", "tiny", 1, "0"

    def load_model(self, dtype):
        model, lm = make("llama")
        return model.to(dtype), lm.tokenizer

    def corpus(self, config):
        g = torch.Generator().manual_seed(0)

        def texts(n, salt):
            return [
                " ".join(f"{salt}{int(i)}" for i in torch.randint(0, 50, (40,), generator=g))
                for _ in range(n)
            ]

        halves = {
            half: {"forget": texts(40, "b"), "retain": texts(40, "r"), "other": texts(9, "o")}
            for half in ("learn", "ask")
        }
        return {**halves, "questions": {"forget": [], "retain": []}, "probes": {}, "skipped": {}}


@pytest.fixture
def tiny(tmp_path, processor):
    """In float32, so that what must be equal is; `test_main` has the other precision."""
    processor(bfloat16=False)
    config = dataclasses.replace(
        ex.CustomSAEConfig(),
        context_length=16,
        learn_tokens=1600,
        heldout_contexts=8,
        frontier_contexts=4,
        group_size=8,
        expansion=4,
    )
    return ex.Material(TinySubstrate(), config, ex.Cache(tmp_path), ex.Team())


def test_buffer_carries_domains_and_half_precision(tiny):
    buffer = tiny.activations(shard_tokens=256)
    tokens, domain = tiny.contexts("learn")
    assert buffer.acts_ND.dtype == torch.float16
    assert len(buffer) == tokens.numel()  # no sinks in a random model
    x = tiny.lm.residual(tokens)
    torch.testing.assert_close(buffer.acts_ND.float(), x.reshape(-1, 32), atol=1e-2, rtol=2e-3)
    assert torch.equal(buffer.domain_N.view(len(tokens), -1)[:, 0], domain)
    assert 0 < float(domain.float().mean()) < 1
    assert not torch.equal(domain, domain.sort().values)  # documents are mixed


def test_activations_come_from_the_cache_the_second_time(tiny, monkeypatch):
    first = tiny.activations(shard_tokens=256)
    again = ex.Material(tiny.substrate, tiny.config, tiny.cache, tiny.team)
    monkeypatch.setattr(TinySubstrate, "load_model", lambda *_: pytest.fail("the model was run"))
    second = again.activations(shard_tokens=256)
    assert torch.equal(first.acts_ND, second.acts_ND)
    assert first.scale == second.scale


def test_a_damaged_shard_is_rebuilt_alone(tiny):
    first = tiny.activations(shard_tokens=256)
    shards = sorted((tiny.cache.root / "tiny" / "activations").iterdir())
    times = [path.stat().st_mtime_ns for path in shards]
    data = bytearray(shards[2].read_bytes())
    data[-5] ^= 1
    shards[2].write_bytes(bytes(data))
    again = ex.Material(tiny.substrate, tiny.config, tiny.cache, tiny.team)
    assert torch.equal(again.activations(shard_tokens=256).acts_ND, first.acts_ND)
    after = [path.stat().st_mtime_ns for path in shards]
    assert [a == b for a, b in zip(times, after)].count(False) == 1


def test_sinks_are_left_out(tiny):
    plain = ex.HookedLM.residual

    def with_sink(lm, tokens, layout=None):
        x = plain(lm, tokens, layout)
        x[:, 0] *= 1000
        return x

    ex.HookedLM.residual = with_sink
    try:
        buffer = tiny.activations(shard_tokens=256)
    finally:
        ex.HookedLM.residual = plain
    tokens, _ = tiny.contexts("learn")
    assert len(buffer) == tokens.numel() - len(tokens)


def test_splicing_identity_scores_one_and_zeros_score_zero(tiny):
    tiny.activations(shard_tokens=256)
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    for weight, score in ((1.0, 1.0), (0.0, 0.0)):
        sae = ex.CustomSAE(32, 64, ex.randomness(0))
        with torch.no_grad():
            sae.W_dec.copy_(both * weight)
            sae.W_enc.copy_(both.T)
        found = ex.evaluate_reconstruction(ex.TrainedSAE(sae, 3.0), tiny, torch.ones(2, 64))
        assert found["ce_score"] == pytest.approx(score, abs=1e-4)


def test_saved_path_equals_plain_intervention(tiny, monkeypatch):
    """Skipping what sees no change changes no number: the same as clamping and running it all."""
    buffer = tiny.activations(shard_tokens=256)
    questions = ex.Questions.from_text(QUESTIONS, tiny.lm)
    questions.answer_Q = (questions.scores(questions.base_S).argmax(1) + torch.arange(3) % 2) % 4
    tiny.__dict__["questions"] = questions, {}
    monkeypatch.setattr(ex, "RETAINED", 0.0)
    sae = ex.CustomSAE(32, 128, ex.randomness(0))
    sae.initialize_biases_(buffer.batch(0, 0, 512)[0], 1.0)
    trained = ex.TrainedSAE(sae, buffer.scale)
    chosen, targets = torch.arange(6), torch.full((6,), -3.0)
    effect = ex.apply_setting(trained, tiny, chosen, targets, ask=True)
    rows = tiny.heldout["rows"]
    tokens, x = tiny.heldout["tokens"][rows], tiny.heldout["x"][rows]
    f = sae.encode(x / buffer.scale)
    clamped = f.clone()
    clamped[..., chosen] = torch.where(f[..., chosen] > 0, targets, f[..., chosen])
    with torch.no_grad():
        plain = x + (sae.decode(clamped) - sae.decode(f)) * buffer.scale
    rise = (tiny.lm.losses(tokens, plain) - tiny.heldout["base"]).mean(1)
    everything = torch.ones(len(questions.token_N), dtype=torch.bool)
    changed = ex.clamp(trained, chosen, targets, questions.x_ND, everything)
    right = dataclasses.replace(questions, memory={}).log_probs(tiny.lm, changed, everything)
    assert effect.asked
    assert torch.equal(effect.right_Q, questions.right(right))
    assert 0 < int(effect.right_Q.sum()) < 3
    torch.testing.assert_close(effect.rise_R, rise, atol=1e-4, rtol=1e-3)
    untouched = (f[..., chosen] == 0).all(-1).all(-1)
    assert 0 < int(untouched.sum()) < len(rows), "the case must have both kinds"
    assert torch.equal(effect.rise_R[untouched], torch.zeros(int(untouched.sum())))
