"""Texts as trees: a prompt and what may follow it, run once from the hook on."""

import dataclasses
import hashlib
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from lab.language_model import LanguageModel, log_probs
from lab.substrates.texts import Question

OPTIONS = 4  # continuations of a question's prompt
BRANCHES = 1 + OPTIONS  # of a tree: the prompt, then what may follow it


class Batch(NamedTuple):
    """Tokens to run, packed by trees into rows, as flat indices; -1 where there is none."""

    run_RT: Tensor
    rest_RP: Tensor  # the other tokens of these trees


class Ran(NamedTuple):
    """Some tokens of a batch after the language model."""

    index_n: Tensor
    h_nD: Tensor  # last hidden states
    memory: dict[int, tuple[Tensor, Tensor]]  # their keys and values by block


@dataclass
class PromptTrees:
    """Texts as trees that share a prompt between its continuations, to be run from the hook on.

    Tree t has branch BRANCHES·t, the prompt, and the OPTIONS branches after it, what may follow.
    A token sees its own branch and its prompt, no future. So a prompt is run once. Where residuals
    change, only what can see the change is run: the rest enters by the keys and values it had.
    """

    token_N: Tensor  # what the model reads
    branch_N: Tensor
    place_N: Tensor  # position in the sequence prompt + branch
    target_S: Tensor  # tokens that are scored
    branch_S: Tensor
    before_S: Tensor  # index among N of the token that predicts this one
    x_ND: Tensor  # residuals at the hook, in the language model's precision
    base_S: Tensor  # log-probability of every target, unmodified
    memory: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, kw_only=True)
    # by block after the hook: unmodified keys and values of all tokens, [N, heads, head width]
    known: dict[bytes, Tensor] = dataclasses.field(default_factory=dict, kw_only=True)
    # by changed residuals of a tree: log-probabilities of its targets

    @property
    def n_trees(self) -> int:
        return int(self.branch_N[-1]) // BRANCHES + 1 if len(self.branch_N) else 0

    def tensors(self) -> dict[str, Tensor]:
        """All but what is remembered, which is made anew."""
        return {name: part for name, part in vars(self).items() if torch.is_tensor(part)}

    def reached(self, touched_N: Tensor) -> Tensor:
        """Tokens that see one of `touched_N`, bool [N]."""
        first_B = torch.full((BRANCHES * self.n_trees,), torch.iinfo(torch.long).max)
        first_B.scatter_reduce_(0, self.branch_N[touched_N], self.place_N[touched_N], "amin")
        prompt_B = first_B.view(-1, BRANCHES)[:, 0].repeat_interleave(BRANCHES)
        return self.place_N >= torch.minimum(first_B, prompt_B)[self.branch_N]

    def batches(self, run_N: Tensor, width: int = 128, per_batch: int = 8) -> Iterator[Batch]:
        """Tokens to run in rows of about `width`, the trees of a row side by side.

        Rows are as equal as trees allow, so that few places are empty: the largest tree that is
        left goes to the shortest row.
        """
        tree_N = self.branch_N // BRANCHES
        sizes = torch.bincount(tree_N[run_N], minlength=self.n_trees)
        rows = [(0, row) for row in range(math.ceil(len(run_N.nonzero()) / width))]
        row_of_tree = torch.full((self.n_trees,), -1)
        for tree in sizes.argsort(descending=True, stable=True)[: int((sizes > 0).sum())].tolist():
            size, row = rows[0]
            heapq.heapreplace(rows, (size + int(sizes[tree]), row))
            row_of_tree[tree] = row
        row_N = row_of_tree[tree_N]
        order = [row for size, row in sorted(rows) if size]  # alike ones share a batch
        for start in range(0, len(order), per_batch):
            lists = ([(among_N & (row_N == row)).nonzero().squeeze(1)
                      for row in order[start : start + per_batch]]
                     for among_N in (run_N, ~run_N))
            yield Batch(*(nn.utils.rnn.pad_sequence(indices, batch_first=True, padding_value=-1)
                          for indices in lists))

    def layout(self, batch: Batch) -> dict[str, Tensor]:
        """What is added to attention scores [R, 1, T, P + T], nothing for own branch and its
        prompt, and positions [R, T]."""
        seen_RK = torch.cat([batch.rest_RP, batch.run_RT], 1)
        branch, other = (self.branch_N[i].where(i >= 0, -1) for i in (batch.run_RT, seen_RK))
        place = self.place_N[batch.run_RT]
        sees = (branch[:, :, None] == other[:, None]) | (
            (branch // BRANCHES * BRANCHES)[:, :, None] == other[:, None])
        sees &= place[:, :, None] >= self.place_N[seen_RK][:, None]
        dtype = self.x_ND.dtype
        hidden = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        return {"attention_mask": hidden[:, None], "position_ids": place}

    def run(self, lm: LanguageModel, x_ND: Tensor, run_N: Tensor) -> Iterator[Ran]:
        """Some tokens from the hook on, a batch at a time."""
        for batch in self.batches(run_N):
            past = transformers.DynamicCache()
            for block, pair in self.memory.items():
                past.update(*(part[batch.rest_RP].transpose(1, 2) for part in pair), block)
            h_RTD = lm.final(self.token_N[batch.run_RT], x_ND[batch.run_RT], self.layout(batch),
                             past)
            real, P = batch.run_RT >= 0, batch.rest_RP.shape[1]
            yield Ran(batch.run_RT[real], h_RTD[real], {
                block: tuple(part[:, :, P:].transpose(1, 2)[real]
                             for part in (kept.keys, kept.values))
                for block, kept in enumerate(past.layers) if block > lm.layer})

    def remember_(self, lm: LanguageModel) -> None:
        """Keep the unmodified keys and values of all tokens."""
        for ran in self.run(lm, self.x_ND, torch.ones_like(self.token_N, dtype=torch.bool)):
            for block, pair in ran.memory.items():
                if block not in self.memory:
                    shape = (len(self.token_N), *pair[0].shape[1:])
                    self.memory[block] = tuple(part.new_empty(shape) for part in pair)
                for whole, part in zip(self.memory[block], pair):
                    whole[ran.index_n] = part

    def log_probs(self, lm: LanguageModel, x_ND: Tensor, touched_N: Tensor) -> Tensor:
        """Log-probability in nats of every target [S] when the residuals are `x_ND`, which differ
        from the unmodified ones at most where `touched_N`; only what sees these is run, and no tree
        twice with the same residuals."""
        tree_N, tree_S = self.branch_N // BRANCHES, self.branch_S // BRANCHES
        keys = self.keys(x_ND, touched_N)
        fresh = [tree for tree, key in keys.items() if key not in self.known]
        fresh_N = torch.isin(tree_N, torch.tensor(fresh, dtype=torch.long))
        reached_N = self.reached(touched_N & fresh_N)
        if not (self.memory or reached_N.all()):
            self.remember_(lm)
        h_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=lm.device)
        for ran in self.run(lm, x_ND, reached_N):
            h_ND[ran.index_n] = ran.h_nD
        due = reached_N[self.before_S].nonzero().squeeze(1)
        before, row = self.before_S[due].unique(return_inverse=True)
        result = self.base_S.clone()
        result[due] = log_probs(lm, h_ND[before], row, self.target_S[due])
        for tree, key in keys.items():
            of_tree = tree_S == tree
            result[of_tree] = self.known.setdefault(key, result[of_tree])
        return result

    def keys(self, x_ND: Tensor, touched_N: Tensor) -> dict[int, bytes]:
        """By tree with touched tokens: a digest of which they are, and of their residuals."""
        places = touched_N.nonzero().squeeze(1)
        trees, sizes = (self.branch_N[places] // BRANCHES).unique_consecutive(return_counts=True)
        return {tree: hashlib.sha256(part.numpy().tobytes() + bits_of(x_ND[part])).digest()
                for tree, part in zip(trees.tolist(), places.split(sizes.tolist()))}


def bits_of(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@dataclass
class Questions(PromptTrees):
    """Four-way cloze questions. Each is two trees: its prompt, and the empty prompt for the
    unconditional scores, both with the four options as branches. An option's last token is scored
    and never run."""

    answer_Q: Tensor
    domain_Q: Tensor

    def __len__(self) -> int:
        return len(self.answer_Q)

    @property
    def owner_N(self) -> Tensor:
        """Which question a token is of."""
        return self.branch_N // (2 * BRANCHES)

    @property
    def is_empty_N(self) -> Tensor:
        """Whether a token is of the tree of the empty prompt."""
        return self.branch_N // BRANCHES % 2 == 1

    @classmethod
    def from_text(cls, questions: list[tuple[Question, int]], lm: LanguageModel) -> "Questions":
        """Tokenise and lay out (question, domain) pairs, read residuals, answer unmodified."""
        read: list[tuple[int, int, int]] = []  # token, branch, place
        scored: list[tuple[int, int, int]] = []  # token, branch, before
        for q, (question, _) in enumerate(questions):
            options = lm.tokenize([" " + text.strip() for text in question.options])
            for tree, prompt in enumerate((question.prompt, question.empty)):
                root = BRANCHES * (2 * q + tree)
                ids = [lm.separator, *lm.tokenize([prompt])[0][-160:]]
                read += [(token, root, place) for place, token in enumerate(ids)]
                last = len(read) - 1
                for branch, option in enumerate((option[:40] for option in options), root + 1):
                    steps = range(len(read) - 1, len(read) - 1 + len(option))
                    before = [last, *steps[1:]]
                    scored += [(token, branch, i) for token, i in zip(option, before)]
                    read += [(token, branch, len(ids) + i) for i, token in enumerate(option[:-1])]
        laid_out = cls(
            *torch.tensor(read, dtype=torch.long).view(-1, 3).T.contiguous(),
            *torch.tensor(scored, dtype=torch.long).view(-1, 3).T.contiguous(),
            torch.zeros(len(read), lm.d_in, dtype=lm.head.weight.dtype),
            torch.zeros(len(scored)),
            torch.tensor([question.answer for question, _ in questions], dtype=torch.long),
            torch.tensor([domain for _, domain in questions], dtype=torch.long),
        )
        laid_out.read_(lm)
        return laid_out

    def only(self, chosen_Q: Tensor) -> "Questions":
        """The questions of these ascending places, as they were read and answered."""
        place_Q = torch.zeros(len(self), dtype=torch.long)
        place_Q[chosen_Q] = torch.arange(len(chosen_Q))
        keep_N, keep_S = (torch.isin(branch // (2 * BRANCHES), chosen_Q)
                          for branch in (self.branch_N, self.branch_S))
        branch_N, branch_S = (2 * BRANCHES * place_Q[kept // (2 * BRANCHES)] + kept % (2 * BRANCHES)
                              for kept in (self.branch_N[keep_N], self.branch_S[keep_S]))
        return Questions(self.token_N[keep_N], branch_N, self.place_N[keep_N],
                         self.target_S[keep_S], branch_S,
                         (keep_N.cumsum(0) - 1)[self.before_S[keep_S]], self.x_ND[keep_N],
                         self.base_S[keep_S], self.answer_Q[chosen_Q], self.domain_Q[chosen_Q])

    def read_(self, lm: LanguageModel) -> None:
        """Residuals and unmodified log-probabilities."""
        everything = torch.ones(len(self.token_N), dtype=torch.bool)
        for batch in self.batches(everything):
            x_RTD, real = lm.residual(self.token_N[batch.run_RT], self.layout(batch)).cpu(), (
                batch.run_RT >= 0)
            self.x_ND[batch.run_RT[real]] = x_RTD[real]
        self.base_S = self.log_probs(lm, self.x_ND, everything)

    def scores(self, log_prob_S: Tensor) -> Tensor:
        """Conditional minus unconditional log-probability of each option in nats, [Q, 4]."""
        total_B = torch.zeros(2 * BRANCHES * len(self)).index_add_(0, self.branch_S, log_prob_S)
        given, anyway = total_B.view(-1, 2, BRANCHES)[:, :, 1:].unbind(1)
        return given - anyway

    def right(self, log_prob_S: Tensor) -> Tensor:
        """Whether the option of the highest score is the answer, bool [Q]."""
        return self.scores(log_prob_S).argmax(dim=1) == self.answer_Q

    def margins(self) -> Tensor:
        """How far the answer's score is above the next one's, unmodified, in nats [Q]."""
        scores_QO = self.scores(self.base_S)
        answer_Q1 = self.answer_Q[:, None]
        others_QO = scores_QO.scatter(1, answer_Q1, -math.inf)
        return (scores_QO.gather(1, answer_Q1) - others_QO.amax(1, keepdim=True)).squeeze(1)
