"""Ground truth: does each orthogonality mode find a dictionary that is known?

    python bench/ground_truth.py                 # the table: all modes, three seeds
    python bench/ground_truth.py --quick         # a small world, to see that it runs

Synthetic activations are sparse sums of known directions. True features come in planted groups
that fire together; some groups share a direction (their members are a common component plus parts
of their own, mutual cosine `World.common`), in the others directions are independent. Each group
serves one of two domains or both (general). A few general features of no group are dense: they fire
on most tokens. A sharing group of one domain has its direction in common with one of the other
domain: they never fire together, so this may stay, while the members of a group do and must be told
apart. Every mode trains on the same stream of tokens with the SAE and the trainer of experiment.py,
and is scored against the truth. Synthetic data flatter every method that assumes what was planted;
what fails here has no reason to work elsewhere.

Shapes as in experiment.py, and T true features.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment import ActivationBuffer, CustomSAEConfig, new_trainer
from lab.distributed import Processes
from lab.evaluations.reconstruction import DUPLICATE_COSINE, reconstruction_metrics
from lab.grouping import condition_numbers
from lab.results.statistics import mean_stderr
from lab.sparse import ExportedSAE
from lab.storage import randomness

GENERAL = 2  # the domain of true features that serve both; 0 and 1 serve one
RECOVERED = 0.9  # cosine from which a true feature counts as found
PURE = 0.9  # share of a feature's activation from which it serves one domain


@dataclasses.dataclass(frozen=True)
class World:
    """What is planted. Group and dictionary sizes keep the study's ratios M/D and F/D."""

    d_in: int = 128
    group_size: int = 16
    groups_specific: int = 6  # a domain, every second of them sharing
    groups_general: int = 8  # every second of them sharing
    common: float = 0.7  # mutual cosine of the members of a sharing group
    group_rate: float = 0.1  # a group is on, a token of a domain that it serves
    member_rate: float = 0.2  # a member fires, its group being on; times 0.25 … 1.75
    stray_rate: float = 0.005  # a member fires without its group
    dense: int = 4  # general features of no group, the last ones
    dense_rate: float = 0.7  # such a feature fires
    style: float = 1.0  # length of a constant of each domain: how its texts are written
    noise: float = 0.05  # norm of the isotropic part, in typical activations
    tokens: int = 200_000  # unique training tokens
    seed: int = 0

    @property
    def domain_T(self) -> Tensor:
        """Domain of every true feature: 0, 1 or GENERAL."""
        counts = torch.tensor([self.groups_specific, self.groups_specific, self.groups_general])
        return torch.arange(3).repeat_interleave(
            counts * self.group_size + torch.tensor([0, 0, self.dense]))

    @property
    def n_groups(self) -> int:
        return 2 * self.groups_specific + self.groups_general

    @property
    def sharing_G(self) -> Tensor:
        """Whether a group shares a direction: every second one does."""
        return torch.arange(self.n_groups) % 2 == 0

    @property
    def sharing_T(self) -> Tensor:
        """Whether a true feature's group shares a direction."""
        return nn.functional.pad(self.sharing_G.repeat_interleave(self.group_size),
                                 (0, self.dense))

    @property
    def dense_T(self) -> Tensor:
        """Whether a true feature fires on most tokens."""
        return torch.arange(len(self.domain_T)) >= self.n_groups * self.group_size

    def directions(self) -> Tensor:
        """Unit directions [T, D]. Members of a sharing group have a component in common, and the
        k-th group of one domain has it in common with the k-th of the other: a word of two
        meanings, which serves both domains unless the SAE tells them apart."""
        g = randomness("directions", self.seed)
        shape = self.n_groups, self.group_size, self.d_in
        own_GMD = nn.functional.normalize(torch.randn(shape, generator=g), dim=-1)
        common_GD = nn.functional.normalize(torch.randn(shape[0], shape[2], generator=g), dim=-1)
        common_GD[self.groups_specific : 2 * self.groups_specific] = (
            common_GD[: self.groups_specific]
        )
        own_part, common_part = math.sqrt(1 - self.common), math.sqrt(self.common)
        mixed_GMD = own_part * own_GMD + common_part * common_GD[:, None]
        grouped_TD = torch.where(self.sharing_G[:, None, None], mixed_GMD, own_GMD).flatten(0, 1)
        dense_TD = torch.randn(self.dense, self.d_in, generator=g)
        return nn.functional.normalize(torch.cat([grouped_TD, dense_TD]), dim=1)

    def styles(self) -> Tensor:
        """What every activation of a domain has added to it, [K, D]."""
        style_KD = torch.randn(2, self.d_in, generator=randomness("style", self.seed))
        return self.style * nn.functional.normalize(style_KD, dim=1)

    def sample(self, size: int, *causes: object, third: bool = False) -> tuple[Tensor, ...]:
        """Activations [B, D], their domains [B], and the true features' activations [B, T].

        `third` gives a text that no label ever named: what domain 1 says, written like domain 0.
        """
        g = randomness("tokens", self.seed, *causes)
        domain_T, G, M = self.domain_T, self.n_groups, self.group_size
        domain_B = torch.randint(0, 2, (size,), generator=g)
        style_B = domain_B
        if third:
            domain_B, style_B = torch.ones_like(domain_B), torch.zeros_like(domain_B)
        serves_BT = (domain_T == GENERAL) | (domain_T == domain_B[:, None])
        on_BG = torch.rand(size, G, generator=g) < self.group_rate
        often_T = 0.25 + 1.5 * torch.rand(G * M, generator=randomness("often", self.seed))
        rate_BT = on_BG.repeat_interleave(M, dim=1) * self.member_rate + self.stray_rate
        rate_BT = nn.functional.pad(rate_BT * often_T, (0, self.dense), value=self.dense_rate)
        fires_BT = serves_BT & (torch.rand(rate_BT.shape, generator=g) < rate_BT)
        a_BT = fires_BT * (0.5 + torch.rand(rate_BT.shape, generator=g))
        z_BD = a_BT @ self.directions()
        z_BD += self.styles()[style_B]
        z_BD += self.noise / math.sqrt(self.d_in) * torch.randn(z_BD.shape, generator=g)
        return z_BD, domain_B, a_BT

    def buffer(self) -> ActivationBuffer:
        """Training tokens in the study's own buffer."""
        z_ND, domain_N, _ = self.sample(self.tokens, "train")
        return ActivationBuffer([{"acts": z_ND.half(), "domain": domain_N}], len(z_ND))

    def l0(self) -> float:
        """True active features a token, and one for its style."""
        return 1 + float((self.sample(8192, "l0")[2] > 0).sum(1).float().mean())


def train(config: CustomSAEConfig, buffer: ActivationBuffer, seed: int) -> ExportedSAE:
    """One SAE, for activations as they are; the seed decides its first weights and the order of
    tokens."""
    trainer = new_trainer(config, buffer, seed, Processes())
    for step in range(config.steps):
        trainer.step(*buffer.batch(seed, step, config.batch_size, config.forget_share))
    return trainer.exported(buffer.scale)


class Rows(NamedTuple):
    """An SAE's decoder rows beside the true features, on new tokens."""

    cosine_TF: Tensor  # −1 where a row never fires
    part_KF: Tensor  # how a row's activation divides over the domains
    best_T: Tensor  # largest cosine of a true feature with a row
    row_T: Tensor  # that row


def recovered(rows: Rows, world: World) -> dict[str, float]:
    """How well the truth is found, and how purely used: means over true features.

    recovery: the largest cosine with a decoder row that fires (1 is best), for all and for parts of
    them; found: those above RECOVERED. purity: of the rows of features of one domain, how much of
    their activation is on it; separated: such features that are found, and more than PURE.
    evenness: of the rows of general features, the smaller domain's part over a half. split: general
    features with two rows of cosine > DUPLICATE_COSINE that serve one domain each, which is how a
    use penalty cheats.
    """
    best_T, part_KF, domain_T = rows.best_T, rows.part_KF, world.domain_T
    general_T, found_T = domain_T == GENERAL, best_T > RECOVERED
    own_T = part_KF[domain_T.clamp(max=1), rows.row_T]
    close_TF = rows.cosine_TF > DUPLICATE_COSINE
    split_T = (close_TF & (part_KF[0] > PURE)).any(1) & (close_TF & (part_KF[1] > PURE)).any(1)
    return {
        "recovery": float(best_T.mean()),
        "sharing": float(best_T[world.sharing_T].mean()),
        "independent": float(best_T[~world.sharing_T & ~world.dense_T].mean()),
        **({"dense": float(best_T[world.dense_T].mean())} if world.dense else {}),
        "specific": float(best_T[~general_T].mean()),
        "general": float(best_T[general_T].mean()),
        "found": float(found_T.float().mean()),
        "purity": float(own_T[~general_T].mean()),
        "separated": float((found_T & (own_T > PURE))[~general_T].float().mean()),
        "evenness": float(2 * part_KF.min(0).values[rows.row_T][general_T].mean()),
        "split": float((split_T & general_T).sum()),
    }


@torch.no_grad()
def score(sae: ExportedSAE, world: World, tokens: int = 16384) -> dict[str, float]:
    """Compare an SAE with the truth on new tokens: `recovered`, and

    correlation: of a true feature's activation with that of its row. style: over rows that serve
    domain 0 only, the activation on a third text, which says nothing of domain 0 but is written
    like it, over that on domain 0. kappa: of the different rows of a planted group.
    """
    z_ND, domain_N, a_NT = world.sample(tokens, "test")
    f_NF = sae.encode(z_ND)
    use_KF = torch.stack([f_NF[domain_N == k].mean(0) for k in range(2)])
    cosine_TF = (world.directions() @ sae.W_dec.T).masked_fill(use_KF.sum(0) == 0, -1)
    rows = Rows(cosine_TF, use_KF / use_KF.sum(0).clamp(min=1e-12), *cosine_TF.max(dim=1))
    third_F = sae.encode(world.sample(tokens, "third", third=True)[0]).mean(0)
    style_F = (third_F / use_KF[0].clamp(min=1e-12)).clamp(max=1)[rows.part_KF[0] > PURE]
    kappa_G = torch.cat([condition_numbers(sae.W_dec, row_M.unique()[None])
                         for row_M in rows.row_T[~world.dense_T].view(-1, world.group_size)])
    centred = a_NT - a_NT.mean(0), f_NF[:, rows.row_T] - f_NF[:, rows.row_T].mean(0)
    metrics = reconstruction_metrics(sae, z_ND)
    return {
        **recovered(rows, world),
        "correlation": float(nn.functional.cosine_similarity(*centred, dim=0).mean()),
        "style": float(style_F.mean()),
        "explained_variance": metrics["explained_variance"], "l0": metrics["l0"],
        "frac_alive": metrics["frac_alive"],
        "kappa_median": float(kappa_G.median()), "kappa_p90": float(kappa_G.quantile(0.9)),
    }


def settings(alphas: tuple[float, ...]) -> dict[str, dict]:
    """What each line of the table trains with; max_cosine has a strength of its own."""
    lines = {"off": dict(orthogonality="off", alpha=0.0)}
    for mode in ("gram_encoder", "fixed", "adaptive"):
        lines |= {f"{mode} {alpha}": dict(orthogonality=mode, alpha=alpha) for alpha in alphas}
    for alpha in alphas:
        lines[f"adaptive {alpha}, every 100"] = lines[f"adaptive {alpha}"] | {"regroup_every": 100}
    for alpha in alphas:
        lines[f"adaptive, η = 0, {alpha}"] = dict(orthogonality="adaptive", alpha=alpha, eta=0.0)
    lines["max_cosine 0.25"] = dict(orthogonality="max_cosine", alpha=0.25)
    return lines


def measure(world: World, base: CustomSAEConfig, lines: dict[str, dict],
            seeds: list[int]) -> dict[str, list[dict[str, float]]]:
    """Scores of every line at every seed."""
    buffer, scores = world.buffer(), {}
    base = dataclasses.replace(base, group_size=world.group_size, target_l0=world.l0())
    for name, changes in lines.items():
        config = dataclasses.replace(base, **changes)
        scores[name] = [score(train(config, buffer, seed), world) for seed in seeds]
        print(f"{name}: recovery {scores[name][0]['recovery']:.3f}", file=sys.stderr, flush=True)
    return scores


def table(scores: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard error over seeds, a line a setting, as Markdown."""
    columns = list(next(iter(scores.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in scores.items():
        cells = []
        for column in columns:
            values = [one[column] for one in seeds]
            digits = 1 if max(map(abs, values)) >= 2 else 3
            mean, error = mean_stderr(values)
            cells.append(f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if values[1:] else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


FULL = World(), CustomSAEConfig(expansion=4, steps=800, batch_size=1024, learning_rate=3e-3)
QUICK = World(d_in=64, group_size=8, groups_specific=4, groups_general=4, group_rate=0.2, dense=0,
              tokens=50_000), (
    dataclasses.replace(FULL[1], steps=300, batch_size=512, warmup_steps=20, regroup_every=50,
                        resample_every=50, sparsity_penalty=0.2, sparsity_rate=0.03)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small world and short training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.01, 0.05, 0.1])
    parser.add_argument("--only", default="", help="only lines whose name begins so")
    arguments = parser.parse_args()
    world, base = QUICK if arguments.quick else FULL
    lines = {name: changes for name, changes in settings(tuple(arguments.alphas)).items()
             if name.startswith(arguments.only)}
    print(table(measure(world, base, lines, arguments.seeds)))


if __name__ == "__main__":
    main()
