"""Held-out text: what all evaluations of all SAEs are measured on, computed once a substrate."""

import functools
from typing import Any

import torch
from torch import Tensor

from lab.console import progress
from lab.evaluations.prompt_trees import BRANCHES, PromptTrees, Questions
from lab.language_model import LanguageModel, losses
from lab.storage import code_digest, digest
from lab.substrates import Substrate
from lab.substrates.texts import DOMAINS, OTHER, Question


class HeldOut:
    """Ask-half contexts with their residuals and the unmodified model's losses, and questions.

    tokens [N, T], domain [N], x [N, T, D] raw residuals, keep [N, T] (no attention sink). Losses
    [R, T - 1] in nats are of the R frontier contexts, whose indices are `rows`: `base` unmodified,
    `zero` with all kept residuals set to zero.
    """

    def __init__(self, substrate: Substrate):
        self.substrate = substrate

    @functools.cached_property
    def causes(self) -> tuple:
        """What determines everything here."""
        substrate, sizes = self.substrate, self.substrate.sizes
        return (*substrate.causes, substrate.ask.checksum(), sizes.frontier_contexts,
                substrate.sink_norm, sizes.question_candidates, sizes.questions,
                digest(substrate.corpus["questions"]), code_digest(HeldOut, LanguageModel))

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        ask, n_frontier = self.substrate.ask, self.substrate.sizes.frontier_contexts

        def build() -> tuple[dict[str, Tensor], Any]:
            lm = self.substrate.lm
            parts = list(ask.tokens_NT.split(32))
            x = torch.cat([lm.residual(part) for part in progress(parts, "held-out residuals")])
            keep = self.substrate.is_plain(x)
            rows = torch.cat([(ask.domain_N == k).nonzero()[:n_frontier, 0]
                              for k in range(len(DOMAINS))])
            tokens, ablated = ask.tokens_NT[rows], x[rows] * ~keep[rows][..., None]
            return {"x": x.cpu(), "keep": keep.cpu(), "rows": rows,
                    "base": losses(lm, tokens, x[rows]), "zero": losses(lm, tokens, ablated)}, None

        kept = self.substrate.cached("heldout", build, self.causes)[0]
        return {"tokens": ask.tokens_NT, "domain": ask.domain_N, **kept}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def domain_R(self) -> Tensor:
        """Domains of the frontier contexts."""
        return self["domain"][self["rows"]]

    def residuals(self) -> Tensor:
        """Raw residuals [N, D] of forget and retain text, sinks left out."""
        named = self["keep"] & (self["domain"] != OTHER)[:, None]
        return self["x"][named].float()

    @functools.cached_property
    def frontier(self) -> PromptTrees:
        """The contexts whose cross-entropy is measured, each a prompt without continuations."""
        rows = self["rows"]
        tokens_RT = self["tokens"][rows].long()
        n, T = tokens_RT.shape
        index_RT = torch.arange(n * T).view(n, T)
        branch_RT, place_RT = BRANCHES * (index_RT // T), index_RT % T
        return PromptTrees(tokens_RT.flatten(), branch_RT.flatten(), place_RT.flatten(),
                           tokens_RT[:, 1:].flatten(), branch_RT[:, 1:].flatten(),
                           index_RT[:, :-1].flatten(), self["x"][rows].flatten(0, 1),
                           -self["base"].flatten())

    @functools.cached_property
    def asked(self) -> tuple[Questions, dict[str, Any]]:
        """The first `questions` of each domain that the unmodified model answers correctly, and
        how many were asked and survived."""
        sizes = self.substrate.sizes

        def build() -> tuple[dict[str, Tensor], Any]:
            lm = self.substrate.lm
            kept, counts = [], {}
            for domain, name in enumerate(DOMAINS[:OTHER]):
                candidates = self.substrate.corpus["questions"][name][: sizes.question_candidates]
                pairs = [(Question(*question), domain) for question in candidates]
                questions = Questions.from_text(pairs, lm)
                right = questions.right(questions.base_S).nonzero()[:, 0]
                counts[name] = {"asked": len(pairs), "correct": len(right)}
                kept += [pairs[q] for q in right.tolist()[: sizes.questions]]
            return Questions.from_text(kept, lm).tensors(), counts

        tensors, counts = self.substrate.cached("questions", build, self.causes)
        return Questions(**tensors), counts
