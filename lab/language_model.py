"""The language model around its hook: the only place where nnsight appears."""

from typing import Any

import torch
import transformers
from nnsight import NNsight
from torch import Tensor, nn


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products are much faster in it on this device, else float32.

    On processors with products in bfloat16 it wins two to five times over, on others it loses. The
    processor is asked, not timed: a repetition must get the same answer.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN's products in bfloat16 read them.

    Bit for bit the plain one's output, and a sixth faster: that one lays them out anew at every
    call. The two functions are those to which torch's own compiler lowers such a layer.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linear_(module: nn.Module) -> None:
    """Put a PackedLinear in the place of every linear layer inside `module`."""
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, PackedLinear(layer))


class LanguageModel:
    """The language model around its hook point: the one place where nnsight appears.

    `residual` reads the output of block `layer` and stops there; `final` puts given residuals in
    its place and runs only what comes after. Residuals that are put back unchanged give the
    unmodified model's output to the last bit, because the same blocks see the same numbers.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, layer: int, device: torch.device):
        model = model.to(device).eval().requires_grad_(False)
        if device.type == "cpu" and model.dtype == torch.bfloat16:
            model.set_attn_implementation("eager")  # 1.7 times as fast as torch's fused one
            if torch.ops.mkldnn._is_mkldnn_bf16_supported():
                pack_linear_(model.base_model)
        self.tokenizer, self.layer, self.device = tokenizer, layer, device
        self.base = NNsight(model.base_model)
        self.head = model.get_output_embeddings()
        self.separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.d_in = model.config.hidden_size

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def inputs(self, tokens_BT: Tensor, layout: dict[str, Tensor] | None) -> dict[str, Any]:
        moved = {name: part.to(self.device) for name, part in (layout or {}).items()}
        return dict(input_ids=tokens_BT.long().to(self.device), use_cache=False, **moved)

    @torch.no_grad()
    def residual(self, tokens_BT: Tensor, layout: dict[str, Tensor] | None = None) -> Tensor:
        """Residual stream after block `layer`, [B, T, D]; no work is done past it."""
        with self.base.trace(**self.inputs(tokens_BT, layout)) as tracer:
            out = self.base.layers[self.layer].output.save()
            tracer.stop()
        return out if torch.is_tensor(out) else out[0]

    @torch.no_grad()
    def final(self, tokens_BT: Tensor, x_BTD: Tensor, layout: dict | None = None,
              past: transformers.Cache | None = None) -> Tensor:
        """Last hidden states [B, T, D] when the residual stream at the hook is `x_BTD`.

        `past` holds keys and values that these tokens see besides their own, for every block after
        the hook; theirs are appended to it.
        """
        x_BTD = x_BTD.to(self.device)
        with self.base.trace(**self.inputs(tokens_BT, layout), past_key_values=past):
            for block in self.base.layers[: self.layer + 1]:
                block.skip(x_BTD)
            out = self.base.output.last_hidden_state.save()
        return out


@torch.no_grad()
def log_probs(lm: LanguageModel, h_ND: Tensor, row_S: Tensor, target_S: Tensor) -> Tensor:
    """Log-probability of each target token given the last hidden state in its row, float32 [S].

    The vocabulary is taken a thousand words at a time, so that logits stay in the cache.
    """
    row_S, target_S = row_S.to(lm.device), target_S.to(lm.device)
    W_VD = lm.head.weight
    logit_S = torch.linalg.vecdot(h_ND[row_S].float(), W_VD[target_S].float())
    total_N = torch.cat([
        torch.stack([(h @ W.T).float().logsumexp(1) for W in W_VD.split(1024)]).logsumexp(0)
        for h in h_ND.split(1024)])
    return (logit_S - total_N[row_S]).cpu()


def losses(lm: LanguageModel, tokens_BT: Tensor, x_BTD: Tensor, rows: int = 8) -> Tensor:
    """Next-token cross-entropy [B, T - 1] in nats with the residuals `x_BTD` at the hook."""
    parts = []
    for tokens, x in zip(tokens_BT.split(rows), x_BTD.split(rows)):
        h = lm.final(tokens[:, :-1], x[:, :-1])  # the last token is scored, not run
        target = tokens[:, 1:].flatten().long()
        flat = log_probs(lm, h.flatten(0, 1), torch.arange(len(target)), target)
        parts.append(-flat.view(len(tokens), -1))
    return torch.cat(parts)
