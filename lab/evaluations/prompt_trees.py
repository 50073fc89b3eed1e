"""Texts as trees: a prompt and what may follow it, run once from the hook on."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from lab.language_model import HookedLM
from lab.substrates.texts import Question


@dataclass
class Forest:
    """Texts as trees that share a prompt between its continuations, to be run from the hook on.

    Tree t has branch 5t, the prompt, and branches 5t + 1 … 5t + 4, what may follow it. A token
    sees its own branch and its prompt, no future. So a prompt is run once, and where residuals
    change, only what can see the change: the rest enters by the keys and values it had.
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

    @property
    def n_trees(self) -> int:
        return int(self.branch_N[-1]) // 5 + 1 if len(self.branch_N) else 0

    def reached(self, touched_N: Tensor) -> Tensor:
        """Tokens that see one of `touched_N`, bool [N]."""
        first_B = torch.full((5 * self.n_trees,), torch.iinfo(torch.long).max)
        first_B.scatter_reduce_(0, self.branch_N[touched_N], self.place_N[touched_N], "amin")
        first_B = torch.minimum(first_B, first_B.view(-1, 5)[:, 0].repeat_interleave(5))
        return self.place_N >= first_B[self.branch_N]

    def rows(self, run_N: Tensor, width: int = 128, per_batch: int = 8) -> Iterator[tuple]:
        """Tokens to run, packed by trees into rows, and the rest of these trees: flat indices
        [R, T] and [R, P], -1 where there is none."""
        tree_N = self.branch_N // 5
        sizes = torch.bincount(tree_N[run_N])
        row_of_tree = torch.full((self.n_trees,), -1)
        row, room = -1, 0
        for tree in sizes.nonzero().squeeze(1).tolist():
            size = int(sizes[tree])
            if size > room:
                row, room = row + 1, max(width, size)
            row_of_tree[tree] = row
            room -= size
        row_N = row_of_tree[tree_N]
        for start in range(0, row + 1, per_batch):
            batch = range(start, min(start + per_batch, row + 1))
            lists = ([(among_N & (row_N == r)).nonzero().squeeze(1) for r in batch]
                     for among_N in (run_N, ~run_N))
            yield tuple(nn.utils.rnn.pad_sequence(indices, batch_first=True, padding_value=-1)
                        for indices in lists)

    def layout(self, index_RT: Tensor, rest_RP: Tensor) -> dict[str, Tensor]:
        """What is added to attention scores [R, 1, T, P + T], nothing for own branch and its
        prompt, and positions [R, T]."""
        seen_RK = torch.cat([rest_RP, index_RT], 1)
        branch, other = (self.branch_N[i].where(i >= 0, -1) for i in (index_RT, seen_RK))
        place = self.place_N[index_RT]
        sees = (branch[:, :, None] == other[:, None]) | (
            (branch // 5 * 5)[:, :, None] == other[:, None])
        sees &= place[:, :, None] >= self.place_N[seen_RK][:, None]
        dtype = self.x_ND.dtype
        hidden = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        return {"attention_mask": hidden[:, None], "position_ids": place}

    def run(self, lm: HookedLM, x_ND: Tensor, run_N: Tensor) -> Iterator[tuple]:
        """Some tokens from the hook on, in parts: flat indices [n], last hidden states [n, D],
        and keys and values by block."""
        for index_RT, rest_RP in self.rows(run_N):
            past = transformers.DynamicCache()
            for block, pair in self.memory.items():
                past.update(*(part[rest_RP].transpose(1, 2) for part in pair), block)
            h_RTD = lm.final(self.token_N[index_RT], x_ND[index_RT],
                             self.layout(index_RT, rest_RP), past)
            real, P = index_RT >= 0, rest_RP.shape[1]
            yield index_RT[real], h_RTD[real], {
                block: [part[:, :, P:].transpose(1, 2)[real] for part in (kept.keys, kept.values)]
                for block, kept in enumerate(past.layers) if block > lm.layer}

    def remember_(self, lm: HookedLM) -> None:
        for index, _, pairs in self.run(lm, self.x_ND, torch.ones_like(self.token_N, dtype=bool)):
            for block, pair in pairs.items():
                if block not in self.memory:
                    shape = (len(self.token_N), *pair[0].shape[1:])
                    self.memory[block] = tuple(part.new_empty(shape) for part in pair)
                for whole, part in zip(self.memory[block], pair):
                    whole[index] = part

    def log_probs(self, lm: HookedLM, x_ND: Tensor, touched_N: Tensor) -> Tensor:
        """Log-probability in nats of every target [S] when the residuals are `x_ND`, which differ
        from the unmodified ones at most where `touched_N`; only what sees these is run."""
        reached_N = self.reached(touched_N)
        if not (self.memory or reached_N.all()):
            self.remember_(lm)
        h_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=lm.device)
        for index, h, _ in self.run(lm, x_ND, reached_N):
            h_ND[index] = h
        due = reached_N[self.before_S].nonzero().squeeze(1)
        before, row = self.before_S[due].unique(return_inverse=True)
        result = self.base_S.clone()
        result[due] = lm.log_probs(h_ND[before], row, self.target_S[due])
        return result


@dataclass
class Questions(Forest):
    """Four-way cloze questions. Each is two trees: its prompt, and the empty prompt for the
    unconditional scores, both with the four options as branches; an option's last token is scored
    and never run."""

    answer_Q: Tensor
    domain_Q: Tensor

    def __len__(self) -> int:
        return len(self.answer_Q)

    @classmethod
    def from_text(cls, questions: list[tuple[Question, int]], lm: HookedLM) -> "Questions":
        """Tokenise and lay out (question, domain) pairs, read residuals, answer unmodified."""
        read: list[tuple[int, int, int]] = []  # token, branch, place
        scored: list[tuple[int, int, int]] = []  # token, branch, before
        for q, (question, _) in enumerate(questions):
            options = lm.tokenize([" " + text.strip() for text in question.options])
            for tree, prompt in enumerate((question.prompt, question.empty)):
                root, ids = 10 * q + 5 * tree, [lm.separator, *lm.tokenize([prompt])[0][-160:]]
                read += [(token, root, place) for place, token in enumerate(ids)]
                last = len(read) - 1
                for branch, option in enumerate((option[:40] for option in options), root + 1):
                    steps = range(len(read) - 1, len(read) - 1 + len(option))
                    before = [last, *steps[1:]]
                    scored += [(token, branch, i) for token, i in zip(option, before)]
                    read += [(token, branch, len(ids) + i) for i, token in enumerate(option[:-1])]
        forest = cls(
            *torch.tensor(read, dtype=torch.long).view(-1, 3).T.contiguous(),
            *torch.tensor(scored, dtype=torch.long).view(-1, 3).T.contiguous(),
            torch.zeros(len(read), lm.d_in, dtype=lm.head.weight.dtype),
            torch.zeros(len(scored)),
            torch.tensor([question.answer for question, _ in questions], dtype=torch.long),
            torch.tensor([domain for _, domain in questions], dtype=torch.long),
        )
        everything = torch.ones(len(read), dtype=torch.bool)
        for index_RT, rest_RP in forest.rows(everything):
            layout = forest.layout(index_RT, rest_RP)
            x_RTD, real = lm.residual(forest.token_N[index_RT], layout).cpu(), index_RT >= 0
            forest.x_ND[index_RT[real]] = x_RTD[real]
        forest.base_S = forest.log_probs(lm, forest.x_ND, everything)
        return forest

    def scores(self, log_prob_S: Tensor) -> Tensor:
        """Conditional minus unconditional log-probability of each option in nats, [Q, 4]."""
        branch_B = torch.zeros(10 * len(self)).index_add_(0, self.branch_S, log_prob_S)
        given, anyway = branch_B.view(-1, 2, 5)[:, :, 1:].unbind(1)
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
