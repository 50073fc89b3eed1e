"""A substrate of a handful of texts on a small random model, and SAEs whose features are known."""

import torch
import transformers

from lab.distributed import Processes
from lab.language_model import LanguageModel
from lab.sparse import ExportedSAE
from lab.storage import Cache, randomness
from lab.substrates import Substrate
from lab.substrates.texts import FORGET, RETAIN, Question, Sizes

WIDTH = 32  # D
QUESTIONS = [
    (Question("Definition: a tall thing that grows\nTerm:", "Term:",
              ["one tree", "a dog", "house of cards", "sea"], 0), FORGET),
    (Question("Definition: where one lives\nTerm:", "Term:",
              ["river", "fire and water", "home", "red"], 2), RETAIN),
    (Question("Definition: short\nTerm:", "Term:", ["a", "b c", "d", "e f g h"], 1), RETAIN),
]
SIZES = dict(context_length=16, learn_tokens=1600, heldout_contexts=8, frontier_contexts=4,
             guard_contexts=12, question_candidates=12, questions=5, least_questions=1)


class WordTokenizer:
    """Each word a token; enough for a model that was never trained."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[1 + sum(word.encode()) % 90 for word in t.split()] for t in texts]}

    def convert_tokens_to_ids(self, token):
        assert token == "<|endoftext|>"
        return 0


def random_model():
    """A Llama of four blocks with large weights, so that attention depends on its input."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=91, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512,
        tie_word_embeddings=True))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model


def language_model():
    return LanguageModel(random_model(), WordTokenizer(), TinySource.layer, torch.device("cpu"))


class TinySource:
    name = model_name = "tiny"
    loadable_name = dataset_path = None
    text, unnamed = "random words", ("other",)
    layer, d_in, fingerprint = 1, WIDTH, "0"

    def __init__(self, probes=None, questions=()):
        self.probes, self.questions = probes or {}, questions

    def sources(self):
        return {"words": self.text}

    def load_model(self, dtype):
        return random_model().to(dtype), WordTokenizer()

    def corpus(self, sizes):
        g = torch.Generator().manual_seed(0)

        def texts(n, salt):
            return [" ".join(f"{salt}{int(i)}" for i in torch.randint(0, 50, (40,), generator=g))
                    for _ in range(n)]

        halves = {half: {"forget": texts(40, "b"), "retain": texts(40, "r"), "other": texts(9, "o")}
                  for half in ("learn", "ask")}
        del halves["learn"]["other"]
        halves["learn"]["retain too"] = texts(12, "s")  # a second kind of retain text
        questions = {name: [question for question, domain in self.questions if domain == k]
                     for k, name in enumerate(("forget", "retain"))}
        counts = {half: {name: len(part) for name, part in parts.items()}
                  for half, parts in halves.items()}
        return {**halves, "questions": questions, "skipped": {}, "documents": counts,
                "probes": {name: {"rows": rows} for name, rows in self.probes.items()}}


def tiny_substrate(folder, probes=None, questions=(), **sizes):
    """`probes` are rows (part, class, text) by data set; `questions` are (question, domain)."""
    return Substrate(TinySource(probes, questions), Sizes(**{**SIZES, **sizes}), Cache(folder),
                     Processes())


def identity_sae(d=8):
    """Reconstructs perfectly: features are the positive and negative parts of each coordinate."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    return ExportedSAE(both.T.contiguous(), torch.zeros(2 * d), both, torch.zeros(d))


def random_sae(d=WIDTH, f=128, bias=-0.5, seed=0):
    g = randomness("sae", seed)
    W_enc, W_dec = (torch.nn.functional.normalize(torch.randn(f, d, generator=g), dim=1)
                    for _ in range(2))
    return ExportedSAE(W_enc.T.contiguous(), torch.full((f,), bias), W_dec,
                       0.1 * torch.randn(d, generator=g))


class KnowingSource(TinySource):
    """Its model is sure of what comes next."""

    def load_model(self, dtype):
        model, tokenizer = super().load_model(dtype)
        model.model.norm.weight.data.mul_(6)
        return model, tokenizer


def knowing_substrate(folder, questions=QUESTIONS, **sizes):
    """All of its text is written by its model, which so loses by any change of its residuals."""
    substrate = Substrate(KnowingSource(questions=questions), Sizes(**{**SIZES, **sizes}),
                          Cache(folder), Processes())
    for half in ("learn", "ask"):
        contexts = getattr(substrate, half)
        tokens_NT, g = contexts.tokens_NT.long(), randomness("knowing", half)
        for t in range(1, tokens_NT.shape[1]):
            before = tokens_NT[:, :t]
            h_ND = substrate.lm.final(before, substrate.lm.residual(before))[:, -1]
            chance_NV = (h_ND @ substrate.lm.head.weight.T).float().softmax(1)
            tokens_NT[:, t] = torch.multinomial(chance_NV, 1, generator=g)[:, 0]
        substrate.__dict__[half] = contexts._replace(tokens_NT=tokens_NT.int())
    return substrate


def rare_sae(x, quantile=0.97, seed=0, scale=1.0):
    """Each feature fires on the residuals x [N, D] where it is above this quantile."""
    sae = random_sae(bias=0.0, seed=seed)
    before_NF = (x - sae.b_dec) @ sae.W_enc
    return ExportedSAE(sae.W_enc, -before_NF.quantile(quantile, dim=0), scale * sae.W_dec,
                       sae.b_dec)
