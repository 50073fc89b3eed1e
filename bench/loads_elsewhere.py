"""Do our exports and results load in the tools of this field, and do their metrics agree?

    bash bench/peers.sh
    python bench/loads_elsewhere.py [run_8/seed_0 ...]

1. SAEs at real size with random weights and biases, and any exported seed folder given, are
   loaded by SAELens and dictionary_learning. Features and reconstruction of raw activations must
   be ours to 1e-5 of the activations' scale sqrt(mean ‖x‖²).
2. Their metrics on the same activations, against ours. A difference must be one that a formula of
   theirs, computed here in float64, accounts for to 1e-4; it is printed with the reason.
3. Every study/run_*/final_info.json must pass SAEBench's own output class.

A given seed folder is tried on activations of the cache (SAE_CACHE_DIR). Exits 1 on a failure.
Not covered: metrics that splice the SAE into a language model, and the peers' training state.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from exchange import ask_peer

from experiment import ACTIVATIONS, CustomSAE, CustomSAEConfig
from lab.evaluations.reconstruction import reconstruction_metrics
from lab.results.exports import export_sae
from lab.sparse import ExportedSAE
from lab.substrates import quiet_libraries
from lab.substrates.standin import Standin
from lab.substrates.texts import Sizes

D_IN, D_SAE, TOKENS, BATCH, SCALE = 576, 4608, 4096, 1024, 37.0
TOLERANCE = 1e-5  # of sqrt(mean ‖x‖²)
AGREE, EXPLAINED = 1e-5, 1e-4  # relative
KEYS = {  # metric: its name in each peer
    "l0": {"sae_lens": "l0", "dictionary_learning": "l0", "sae_bench": "l0"},
    "l1": {"sae_lens": "l1", "dictionary_learning": "l1_loss", "sae_bench": "l1"},
    "error_norm": {"dictionary_learning": "l2_loss"},
    "mse": {"sae_lens": "mse", "sae_bench": "mse"},
    "explained_variance": {"sae_lens": "explained_variance", "sae_bench": "explained_variance",
                           "dictionary_learning": "frac_variance_explained"},
    "cosine": {"sae_lens": "cossim", "dictionary_learning": "cossim", "sae_bench": "cossim"},
    "l2_ratio": {"sae_lens": "l2_ratio", "dictionary_learning": "l2_ratio",
                 "sae_bench": "l2_ratio"},
    "frac_alive": {"dictionary_learning": "frac_alive"},
}
REASONS = {
    ("dictionary_learning", "explained_variance"):
        "variance of the error about its own mean, so a constant error is free; mean of batches",
    ("sae_bench", "explained_variance"): "squares of mean squares where squared means belong",
    ("sae_bench", "mse"): "divided by the batch's tokens once more",
}


def random_case(folder: Path, activation: str) -> tuple[ExportedSAE, Tensor]:
    """An untrained SAE with nothing at zero or tied, exported to `folder`, and raw activations:
    a mean, sparse sums of its decoder rows and noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sae = CustomSAE(D_IN, D_SAE, generator)
    codes_NF = noise(TOKENS, D_SAE).abs() * (torch.rand(TOKENS, D_SAE, generator=generator) < 0.005)
    z_ND = codes_NF @ sae.W_dec.detach() + 0.05 * noise(D_IN) + 0.01 * noise(TOKENS, D_IN)
    z_ND /= z_ND.square().sum(1).mean().sqrt()
    with torch.no_grad():
        sae.W_enc_FD += 0.3 * noise(D_SAE, D_IN) / D_IN**0.5
    sae.initialize_biases_(z_ND, 40.0)
    with torch.no_grad():
        sae.b_enc *= 1 + 0.1 * noise(D_SAE)
        sae.b_dec += 0.005 * noise(D_IN)
    exported = sae.exported(SCALE, 0.1 if activation == "batch_topk" else 0.0)
    export_sae(exported, folder, Standin, {**vars(CustomSAEConfig(activation=activation)),
                                           **vars(Sizes()), "seed": 0})
    return exported, z_ND * SCALE


def exported_case(folder: Path) -> tuple[ExportedSAE, Tensor]:
    """An exported SAE and a sample of raw cached activations."""
    sae = ExportedSAE.of(load_file(folder / "sae_lens" / "sae_weights.safetensors"))
    root = Path(os.environ.get("SAE_CACHE_DIR") or ".cache")
    for path in sorted(root.glob("*/activations/0000-*.safetensors")):
        x_ND = load_file(path)["acts"]
        if x_ND.shape[1] == sae.d_in and len(x_ND) >= TOKENS:
            return sae, x_ND[:TOKENS].float()
    raise SystemExit(f"no activations of width {sae.d_in} in {root}; SAE_CACHE_DIR names a cache")


def our_metrics(sae: ExportedSAE, x_ND: Tensor, x_hat_ND: Tensor) -> dict[str, float]:
    """`reconstruction_metrics`, and E‖x − x̂‖₂ beside them, in float64."""
    error_norm = (x_ND.double() - x_hat_ND.double()).norm(dim=1).mean()
    return {**reconstruction_metrics(sae, x_ND), "error_norm": float(error_norm)}


def their_formulas(x_ND: Tensor, x_hat_ND: Tensor) -> dict[tuple[str, str], float]:
    """Peers' formulas that differ from ours, as their code has them, in float64."""
    x, error = x_ND.double(), (x_ND - x_hat_ND).double()
    pairs = list(zip(x.split(BATCH), error.split(BATCH)))
    ratios = [float(1 - e.var(0).sum() / part.var(0).sum()) for part, e in pairs]
    mse = float(error.square().sum(1).mean())
    per_dimension = x.square().mean(0)  # equal batches: their mean of means is this mean
    not_variance = float(per_dimension.sum() - per_dimension.mean() ** 2)
    return {
        ("dictionary_learning", "explained_variance"): sum(ratios) / len(ratios),
        ("sae_bench", "explained_variance"): 1 - mse / not_variance,
        ("sae_bench", "mse"): mse / BATCH,
    }


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-12)


def metric_rows(ours: dict[str, float], replies: dict[str, dict[str, Any]],
                formulas: dict[tuple[str, str], float]) -> list[tuple[bool, str]]:
    """One line a metric and peer: both values, and whether or why not they agree."""
    rows = []
    for metric, peers in KEYS.items():
        for peer, key in peers.items():
            theirs = replies[peer]["metrics"][key]
            gap, formula = relative(ours[metric], theirs), formulas.get((peer, metric))
            good, verdict = gap < AGREE, "agrees"
            if not good and formula is not None:
                good = relative(formula, theirs) < EXPLAINED
                verdict = f"{REASONS[peer, metric]}: {formula:.6g}"
            verdict = verdict if good else f"UNEXPLAINED ({verdict})"
            rows.append((good, f"  {metric:19}{peer:20}{ours[metric]:>12.6g}{theirs:>13.6g}"
                               f"{gap:>10.1e}  {verdict}"))
    return rows


def check_case(name: str, sae: ExportedSAE, x_ND: Tensor, folder: Path) -> bool:
    """Print how the peers read the SAE exported to `folder`, and their metrics; True if good."""
    x_hat_ND, good = sae.reconstruct(x_ND), True
    with tempfile.TemporaryDirectory() as scratch:
        ours = str(Path(scratch) / "ours.pt")
        torch.save({"x": x_ND, "f": sae.encode(x_ND), "x_hat": x_hat_ND}, ours)
        request = {"task": "check", "folder": str(folder.resolve()), "ours": ours, "batch": BATCH}
        replies = {peer: ask_peer(peer, request)
                   for peer in ("sae_lens", "dictionary_learning", "sae_bench")}
    scale = replies["sae_lens"]["scale"]
    print(f"\n{name}: D {sae.d_in}, F {sae.d_sae}, {len(x_ND)} tokens, "
          f"scale sqrt(mean ‖x‖²) = {scale:.4g}")
    for reply in replies.values():
        good &= max(reply["features"], reply["reconstruction"]) <= TOLERANCE
        print(f"  {reply['loaded']}: largest difference / scale: features "
              f"{reply['features']:.1e}, reconstruction {reply['reconstruction']:.1e} "
              f"(allowed {TOLERANCE:.0e}); on for one side only {reply['on_for_one_side_only']} "
              f"of {reply['entries_on']}")
    print(f"  {'metric':19}{'peer':20}{'ours':>12}{'theirs':>13}{'rel. gap':>10}")
    rows = metric_rows(our_metrics(sae, x_ND, x_hat_ND), replies,
                       their_formulas(x_ND, x_hat_ND))
    print("\n".join(text for _, text in rows))
    return good and all(fine for fine, _ in rows)


def check_results() -> bool:
    """Print what SAEBench's output class makes of each result here; True if it takes all."""
    study = Path(__file__).resolve().parent.parent / "study"
    paths = sorted(str(path) for path in study.glob("run_*/final_info.json"))
    reply = ask_peer("sae_bench", {"task": "validate", "paths": paths})
    print(f"\nSparseProbingEvalOutput of sae-bench {reply['version']}")
    good = bool(paths)
    for path, found in reply["results"].items():
        good &= found["valid"] and not found["missing"] and found["refuses_broken"]
        print(f"  {Path(path).parent.name}: {'valid' if found['valid'] else 'NOT VALID'}, keys "
              f"missing {found['missing'] or 'none'}, {len(found['extra'])} keys beyond the "
              f"schema, which it {'ignores' if found['valid'] else 'may refuse'}; without "
              f"accuracies {'refused' if found['refuses_broken'] else 'NOT REFUSED'}")
    return good


def main() -> int:
    quiet_libraries()
    good = True
    for activation in ACTIVATIONS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "seed_0"
            case = random_case(folder, activation)
            good &= check_case(f"random weights, {activation}", *case, folder)
    for given in map(Path, sys.argv[1:]):
        good &= check_case(f"{given.parent.name}/{given.name}", *exported_case(given), given)
    good &= check_results()
    print("\nall good" if good else "\nFAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
