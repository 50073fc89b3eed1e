"""Held-out text: what all evaluations of all SAEs are measured on, computed once a substrate."""

import functools
import re
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from lab.console import progress
from lab.evaluations.prompt_trees import BRANCHES, OPTIONS, PromptTrees, Questions
from lab.language_model import LanguageModel, losses
from lab.storage import code_digest, digest
from lab.substrates import Substrate
from lab.substrates.texts import FORGET, NAMED, RETAIN, Question


class HeldOut:
    """Ask-half contexts with their residuals and the unmodified model's losses, and questions.

    tokens [N, T], domain [N], x [N, T, D] raw residuals, keep [N, T] (no attention sink). Losses
    [R, L - 1] in nats are of the first L tokens of the R frontier contexts, whose indices are
    `rows`: `base` unmodified, `zero` with all kept residuals set to zero, `blank` with all set to
    their mean on learn retain text, which is what a model that knows nothing of a context at the
    hook would have. `guard_x` and `guard_keep` are of as many tokens of learn retain contexts.
    """

    def __init__(self, substrate: Substrate):
        self.substrate = substrate

    @functools.cached_property
    def text_causes(self) -> tuple:
        """What determines residuals and losses."""
        substrate = self.substrate
        return (*substrate.causes, substrate.ask.checksum(), substrate.learn.checksum(),
                substrate.sizes.frontier_contexts, substrate.sizes.frontier_length,
                substrate.sizes.guard_contexts,
                substrate.sink_norm, code_digest(read_text, LanguageModel, Substrate))

    @functools.cached_property
    def question_causes(self) -> tuple:
        """What determines the questions."""
        substrate, sizes = self.substrate, self.substrate.sizes
        return (*substrate.causes, sizes.question_candidates, sizes.questions,
                digest(substrate.corpus["questions"]), code_digest(filter_questions, LanguageModel))

    @property
    def causes(self) -> tuple:
        """What determines everything here."""
        return *self.text_causes, *self.question_causes, code_digest(HeldOut)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        kept = self.substrate.cached("heldout", lambda: (read_text(self.substrate), None),
                                     self.text_causes)[0]
        return {"tokens": self.substrate.ask.tokens_NT, "domain": self.substrate.ask.domain_N,
                **kept}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def domain_R(self) -> Tensor:
        """Domains of the frontier contexts."""
        return self["domain"][self["rows"]]

    def of_frontier(self, name: str) -> Tensor:
        """Tokens, residuals or `keep` of the first L tokens of the frontier contexts, [R, L, …]."""
        return self[name][self["rows"], : self.substrate.sizes.frontier_length]

    def residuals(self, *domains: int) -> Tensor:
        """Raw residuals [N, D] of these domains' text, forget and retain unless told, sinks left
        out."""
        chosen = torch.isin(self["domain"], torch.tensor(domains or (FORGET, RETAIN)))
        return self["x"][self["keep"] & chosen[:, None]].float()

    @functools.cached_property
    def frontier(self) -> PromptTrees:
        """The contexts whose cross-entropy is measured, each a prompt without continuations. Their
        last token is scored and never run."""
        tokens_RT, x_RTD = self.of_frontier("tokens").long(), self.of_frontier("x")[:, :-1]
        n, T = x_RTD.shape[:2]
        index_RT = torch.arange(n * T).view(n, T)
        branch_N, place_N = (BRANCHES * (index_RT // T)).flatten(), (index_RT % T).flatten()
        return PromptTrees(tokens_RT[:, :-1].flatten(), branch_N, place_N,
                           tokens_RT[:, 1:].flatten(), branch_N, index_RT.flatten(),
                           x_RTD.flatten(0, 1), -self["base"].flatten())

    @functools.cached_property
    def asked(self) -> tuple[Questions, dict[str, Any]]:
        """The questions that are asked, and by domain what the filter let through."""
        tensors, counts = self.substrate.cached(
            "questions", lambda: filter_questions(self.substrate), self.question_causes)
        return Questions(**tensors), counts


def read_text(substrate: Substrate) -> dict[str, Tensor]:
    """Residuals of all ask-half contexts; the frontier contexts, the first of each domain, and
    their losses."""
    lm, ask, learn, sizes = substrate.lm, substrate.ask, substrate.learn, substrate.sizes
    guards = learn.tokens_NT[learn.domain_N >= RETAIN][: sizes.guard_contexts]
    x, guard_x = (torch.cat([lm.residual(part) for part in progress(tokens.split(32), what)])
                  for tokens, what in ((ask.tokens_NT, "held-out residuals"),
                                       (guards[:, : sizes.frontier_length], "guard residuals")))
    keep, guard_keep = substrate.is_plain(x), substrate.is_plain(guard_x)
    rows = torch.cat([(ask.domain_N == k).nonzero()[: sizes.frontier_contexts, 0]
                      for k in range(len(substrate.domains))])
    tokens, read, kept = (part[rows, : sizes.frontier_length]
                          for part in (ask.tokens_NT, x, keep[..., None]))
    mean_D = guard_x[guard_keep].float().mean(0).to(x.dtype)
    return {"x": x.cpu(), "keep": keep.cpu(), "guard_x": guard_x.cpu(),
            "guard_keep": guard_keep.cpu(), "rows": rows, "base": losses(lm, tokens, read),
            "zero": losses(lm, tokens, read * ~kept),
            "blank": losses(lm, tokens, torch.where(kept, mean_D, read))}


def filter_questions(substrate: Substrate) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The first `questions` of each domain that the unmodified model answers correctly in both of
    two wordings, laid out in the first; and by domain what was let through."""
    lm, sizes = substrate.lm, substrate.sizes
    pairs = [(Question(*question), domain) for domain, name in enumerate(NAMED)
             for question in substrate.corpus["questions"][name][: sizes.question_candidates]]
    first, again = (Questions.from_text(part, lm) for part in (
        pairs, [(paraphrased(question), domain) for question, domain in pairs]))
    right_Q, again_Q = (asked.right(asked.base_S) for asked in (first, again))
    chosen, counts = [], {}
    for domain, name in enumerate(NAMED):
        of_Q = first.domain_Q == domain
        chosen.append((of_Q & right_Q & again_Q).nonzero()[: sizes.questions, 0])
        counts[name] = {**survival(right_Q[of_Q], again_Q[of_Q]), "kept": len(chosen[-1])}
    return first.only(torch.cat(chosen)).tensors(), counts


def paraphrased(question: Question) -> Question:
    """The same in other words: 'Definition: …, Term:' becomes 'Read this definition: …, The term
    is', each in two lines. Raises ValueError where the prompt has another form."""
    form = re.fullmatch(r"(\w[\w ]*): (.*)\n(\w[\w ]*):", question.prompt, re.S)
    if not form:
        raise ValueError(f"the prompt {question.prompt!r} is not two lines 'Label: …' and 'Cue:'")
    empty = f"The {form[3].lower()} is"
    return question._replace(prompt=f"Read this {form[1].lower()}: {form[2]}\n{empty}", empty=empty)


def survival(right_Q: Tensor, again_Q: Tensor) -> dict[str, Any]:
    """What the filter let through, beside what a model that guesses would.

    `right` of `asked` under the first wording, `again` under the second, `survived` under both.
    Guessing gets `expected_by_chance` right under a wording, and no more under both. `p_value` is
    the chance that it gets `right` or more (binomial).
    """
    asked, right = len(right_Q), int(right_Q.sum())
    return {"asked": asked, "right": right, "again": int(again_Q.sum()),
            "survived": int((right_Q & again_Q).sum()), "expected_by_chance": asked / OPTIONS,
            "p_value": float(scipy.stats.binom.sf(right - 1, asked, 1 / OPTIONS))}
