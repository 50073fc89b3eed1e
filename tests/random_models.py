"""Small random language models of both architectures, around their hook."""

import pytest
import torch
import transformers
from tiny_substrate import WIDTH, TinySource, WordTokenizer, random_model

from lab.language_model import LanguageModel

KINDS = pytest.mark.parametrize("kind", ["llama", "neox", "plain attention"])


def neox():
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=91, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=512))
    for parameter in model.parameters():  # large weights: attention depends on its input
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model


def around_hook(model, layer=TinySource.layer):
    return LanguageModel(model, WordTokenizer(), layer, torch.device("cpu"))


def make(kind):
    """The plain model, and the same one around its hook."""
    model = neox() if kind == "neox" else random_model()
    lm = around_hook(model)
    if kind == "plain attention":
        model.set_attn_implementation("eager")
    return model, lm
