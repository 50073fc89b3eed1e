"""Controls on the real substrate: what the study's numbers are worth.

    python bench/controls.py        # beside a finished run_8

On six seeds that no choice had seen, run_10's and three more: the rows of runs 8, 4, 9, 7 and 3;
then runs 8 and 4 again on these seeds and on text that the study does not use, the next 24 contexts
of each kind, and with a text of a fourth kind (Python's reference) in the third's place.
On the runs' own seeds, run_4's row with the use term alone (no pull on directions), the same with
every stretch of text given another's domain (labels as steady as the true ones but without meaning:
what the labels gained must vanish), and SAEs that were never trained (what random features give).
Last, why unlearning ends where it does. On run_10's seeds, once a feature may only be clamped if it
is as rare on the third text (its learn half) as on retain text: is it the SAE that limits
unlearning, or that the choice of features does not know what else must be spared? And on all six,
broad labels: SAEs trained, and features chosen, with as much third text in the retain text as was
there before. What if the labels name all that is to stay? Or, with two glossaries of computing in
its place, something of the same manner but not the third text itself? Beside each kind of label,
what it gives without an SAE: one direction, found by the labels, in the place of features.

Printed are means ± standard errors and, below each line, paired differences with 95 % intervals, as
in final_info.json, to the vanilla SAEs of the same seeds. Everything is kept in the cache as runs
keep it: what one of them has left there is not computed again, nor what an interrupted call of this
command has. Environment variables are those of experiment.py.
"""

import copy
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import experiment as ex

FIRST_SEEDS = (100, 103)  # of three fresh seeds each; 100 is run_10's
FAINT = 1e-6  # an α that leaves directions alone
USE_ALONE = {"alpha": FAINT, "eta": ex.RUNS["run_4"]["alpha"] * ex.CustomSAEConfig.eta / FAINT}
FRESH = {"vanilla (run_8), fresh seeds": "run_8", "regroup 100 (run_4), fresh seeds": "run_4",
         "OrtSAE (run_9), fresh seeds": "run_9", "fixed (run_7), fresh seeds": "run_7",
         "α 0.01 (run_3), fresh seeds": "run_3"}
TWO = "run_8", "run_4"  # the rows that are measured in further ways
FURTHER = 24  # contexts of each kind of text
HOPELESS = 2.0  # nats of cost on the study's text, far beyond the envelope that is averaged
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "use term alone (run_4)": ("run_4", USE_ALONE),
    "labels shuffled (run_4)": ("run_4", {"shuffle_domains": True}),
    "not trained": ("run_8", {"steps": 0}),
}
COLUMNS = {
    "explained_variance": "explained variance", "kappa_median": "κ median",
    "kappa_p90": "κ p90", "l_use": "L_use", "duplicates": "duplicates",
    "unlearning_area": "area", "unlearning_area_labelled": "area, retain text alone",
    "accuracy_area": "accuracy area", "unlearning_score": "score",
    "sae_top_1_test_accuracy": "probe, 1", "sae_top_5_test_accuracy": "probe, 5",
    "sae_test_accuracy": "probe, all",
}
Results = dict[int, dict[str, Any]]  # by seed, its evaluations
Find = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Glossaries(ex.Standin):
    """Two glossaries of computing, from the package index like the stand-in substrate."""

    requirements = Path(__file__).parent / "requirements-glossaries.txt"

    def texts(self) -> list[str]:
        """Term and definition, of the Jargon File and of the Common Weakness Enumeration."""
        (slang,) = self.read("jargon-file", r"jargon\.json$").values()
        texts = [(entry["term"], " ".join(sense["definition"] for sense in entry["senses"]))
                 for entry in json.loads(slang)]
        (weaknesses,) = self.read("cwe2", r"cwec_v[\d.]+\.xml$").values()
        root = ElementTree.fromstring(weaknesses)
        space = root.tag.removesuffix("Weakness_Catalog")
        for entry in root.iter(f"{space}Weakness"):
            parts = (entry.find(space + name) for name in ("Description", "Extended_Description"))
            definition = " ".join(" ".join(part.itertext()) for part in parts if part is not None)
            texts.append((entry.get("Name"), definition))
        colour = r"\x1b\[\d+m"
        return [" ".join(re.sub(colour, "", f"{term}: {definition}").split())
                for term, definition in texts]


class Bench:
    """A substrate's material, and what the SAEs of a row measure on it."""

    def __init__(self) -> None:
        ex.quiet_libraries()
        self.budget = os.environ.get("SAE_BUDGET", "full")
        cache = ex.Cache(Path(os.environ.get("SAE_CACHE_DIR") or ".cache"))
        substrate = ex.choose_substrate(os.environ.get("SAE_SUBSTRATE", "auto"), cache)
        substrate.fetch()
        self.material = ex.Material(substrate, self.row("run_8"), cache, ex.Team())
        self.buffer = self.material.activations()

    def row(self, run: str, **changes: Any) -> ex.CustomSAEConfig:
        return dataclasses.replace(ex.resolve_config(run, self.budget, Path()), **changes)

    def as_row(self, config: ex.CustomSAEConfig) -> tuple[ex.Material, str]:
        """The material as a run of this row has it, and the run's name in the cache."""
        material = copy.copy(self.material)  # shares the language model and all that was read
        material.config = config
        key = ex.digest(config, material.causes, len(self.buffer), ex.TRAINING_CODE)
        return material, f"{material.substrate.name}/runs/{key}"

    def trained(self, config: ex.CustomSAEConfig) -> dict[int, ex.TrainedSAE]:
        material, name = self.as_row(config)
        return {seed: ex.TrainedSAE(ex.train_sae(
                    config, self.buffer, seed, material.cache.path(f"{name}/train-{seed}"),
                    ex.Interrupts(), lambda line: None, material.team).sae, self.buffer.scale)
                for seed in config.seeds}

    def evaluated(self, config: ex.CustomSAEConfig) -> Results:
        material, name = self.as_row(config)
        return ex.evaluate_all(self.trained(config), material, self.buffer, name, ex.Clock())

    def fresh(self, run: str, measure: Callable[..., dict[str, Any]] | None = None,
              *of: Any) -> dict[str, Any]:
        """A row's evaluations, or what `measure` gives, on the six fresh seeds."""
        rows = [self.row(run, first_seed=first) for first in FIRST_SEEDS]
        return joined(measure(row, *of) if measure else as_info(self.evaluated(row))
                      for row in rows)

    def kept(self, kind: str, config: ex.CustomSAEConfig, seed: int, trained: ex.TrainedSAE,
             build: Callable[[], Any], *causes: Any) -> Any:
        """A measurement of an SAE beyond the runs' own, from the cache if it is there."""
        material, name = self.as_row(config)
        weights = ex.checksum(dict(trained.sae.state_dict()), str(trained.scale))
        return material.cache.get(
            f"{name}/{kind}-{seed}",
            (weights, config, material.causes, ex.EVALUATION_CODE, *causes),
            lambda: ({}, build()))[1]

    def further_text(self) -> ex.Material:
        """The material with the next `FURTHER` contexts of the ask half as those it measures."""
        material, known = copy.copy(self.material), self.material.config.frontier_contexts
        material.config = dataclasses.replace(material.config, frontier_contexts=known + FURTHER)
        for name in ("heldout", "frontier"):
            vars(material).pop(name, None)
        held = material.heldout
        new_R = torch.cat([(held["domain"][held["rows"]] == k).nonzero()[known:, 0]
                           for k in range(len(ex.DOMAINS))])
        material.heldout = {**held, **{name: held[name][new_R] for name in ("rows", "base")}}
        return material

    def unnamed_text(self) -> ex.Material:
        """The material with a text of a fourth kind for what it measures, under the third's name:
        the Python language reference, as this Python carries it."""
        material, lm, config = copy.copy(self.material), self.material.lm, self.material.config
        documents = lm.tokenize(list(topics.values()))
        contexts_RT = ex.pack_contexts(documents, lm.separator, config.context_length)
        order = torch.randperm(len(contexts_RT), generator=ex.randomness("unnamed"))
        tokens_RT = contexts_RT[order[:FURTHER]]
        x_RTD = lm.residual(tokens_RT)
        vars(material).pop("frontier", None)
        material.heldout = {"tokens": tokens_RT, "x": x_RTD.cpu(), "rows": torch.arange(FURTHER),
                            "domain": torch.full((FURTHER,), ex.OTHER),
                            "base": lm.losses(tokens_RT, x_RTD)}
        return material

    def elsewhere(self, config: ex.CustomSAEConfig, other: ex.Material) -> dict[str, Any]:
        """Areas of the row's SAEs by the texts of `other`, and by the study's own where it has none
        of a kind; of all settings that are not hopeless on the study's."""
        held, evaluated, seeds, samples = other.heldout, self.evaluated(config), [], []
        domain_R = held["domain"][held["rows"]].numpy()
        contents = ex.checksum({"tokens": held["tokens"][held["rows"]]}, "")
        for seed, trained in self.trained(config).items():
            before = evaluated[seed]["unlearning"]

            def build(before: dict = before, trained: ex.TrainedSAE = trained) -> dict:
                use = ex.feature_statistics(trained, self.buffer, config.frequency_tokens)
                rises = rises_of(trained, other, use, before["settings"])
                return {str(place): rise_R.tolist() for place, rise_R in rises.items()}

            rises = self.kept("elsewhere", config, seed, trained, build, contents, HOPELESS)
            rise_SR, places = np.array(list(rises.values())), [int(place) for place in rises]
            sample = {}
            for k, name in enumerate(ex.DOMAINS):
                known = before["samples"][f"{name}_rise"]
                known = [*known, [0.0] * len(known[0])]  # at -1, doing nothing
                sample[f"{name}_rise"] = (rise_SR[:, domain_R == k].tolist() if k in domain_R
                                          else [known[place] for place in places])
            texts = [np.array(sample[f"{name}_rise"]) for name in ex.DOMAINS]
            seeds.append({"seed": seed, "unlearning_area": ex.unlearning_area(*texts),
                          "unlearning_area_labelled": ex.unlearning_area(*texts[: ex.OTHER])
                          if ex.RETAIN in domain_R else None})
            samples.append({"samples": sample})
        return {"seeds": seeds, "unlearning": {"per_seed": samples}}

    def third_text(self) -> torch.Tensor:
        """Residuals [N, D] of `frequency_tokens` of the third text's learn half, no sinks."""
        lm, config = self.material.lm, self.material.config
        texts = self.material.corpus["learn"]["other"]
        texts = ex.shuffled(texts, "third")  # a dictionary is in order
        documents = lm.tokenize(texts[: config.frequency_tokens // 8])
        contexts_RT = ex.pack_contexts(documents, lm.separator, config.context_length)
        contexts_RT = contexts_RT[: config.frequency_tokens // config.context_length]
        parts = ex.progress(contexts_RT.split(32), "third text")
        x_ND = torch.cat([lm.residual(part).flatten(0, 1) for part in parts])
        return x_ND[x_ND.float().norm(dim=1) < self.material.sink_norm]

    def broad(self, name: str, more: list[str]) -> "Bench":
        """The bench of a study whose retain text, in training and in the choice of features, is
        retain text and up to as much of `more`, with one label; it is measured on the same texts
        and questions. `name` distinguishes what comes of it in the cache."""
        bench, material = copy.copy(self), copy.copy(self.material)
        for part in ("heldout", "frontier", "questions", "probe_sets"):
            getattr(material, part)  # as all rows have them
        learn, sink_norm = material.corpus["learn"], material.sink_norm
        more = ex.shuffled(more, "third")  # a dictionary is in order
        ends = np.cumsum([len(text) for text in more])
        more = more[: int(np.searchsorted(ends, sum(map(len, learn["retain"]))))]
        retain = [*learn["retain"], *more]
        vars(material)["corpus"] = {**material.corpus, "learn": {**learn, "retain": retain}}
        bench.material, bench.buffer = material, material.activations()
        material.sink_norm = sink_norm
        material.causes = (*material.causes, name)
        return bench

    def without_sae(self, find: Find, other: ex.Material | None = None) -> dict[str, Any]:
        """Unlearning by one direction, clamped and measured as a feature is. `find` gives it from
        forget and retain tokens [N, D] of the learn text by which features are chosen. With `other`
        only the area, by the text there in the third's place, as `elsewhere` has it."""
        config, cache = self.row("run_8"), self.material.cache
        name = f"{self.material.substrate.name}/{find.__name__}"
        settings = [*itertools.product(range(len(ex.THRESHOLDS)), ex.MULTIPLIERS)]
        causes = (config, self.material.causes, len(self.buffer), ex.EVALUATION_CODE,
                  ex.source_of(find, labelled_features))

        def effects(material: ex.Material, places: Iterable[int], ask: bool) -> list[ex.Effect]:
            samples = [self.buffer.sample(domain, config.frequency_tokens)
                       for domain in (ex.FORGET, ex.RETAIN)]
            trained = ex.TrainedSAE(labelled_features(*samples, find(*samples)), self.buffer.scale)
            size_F = ex.feature_statistics(trained, self.buffer, config.frequency_tokens).size_F
            return [ex.apply_setting(trained, material, torch.tensor([feature]),
                                     -multiplier * size_F[[feature]], ask)
                    for feature, multiplier in (settings[place] for place in places)]

        def build() -> tuple[dict, dict[str, Any]]:
            records = [dict(threshold=ex.THRESHOLDS[feature], n_features=1, n_selected=1,
                            multiplier=multiplier) for feature, multiplier in settings]
            every = ex.progress(range(len(settings)), "direction")
            return {}, ex.summarize_unlearning(
                records, effects(self.material, every, ask=True), self.material)

        study = cache.get(name, causes, build)[1]
        if not other:
            return study
        places = [place for place, setting in enumerate(study["settings"])
                  if max(setting["retain_ce_rise"], setting["other_ce_rise"] or 0.0) <= HOPELESS]

        def build_other() -> tuple[dict, list[list[float]]]:
            return {}, [effect.rise_R.tolist() for effect in effects(other, places, ask=False)]

        contents = ex.checksum({"tokens": other.heldout["tokens"]}, "")
        rises = cache.get(f"{name}-elsewhere", (*causes, contents, places), build_other)[1]
        texts = [np.array(study["samples"][f"{domain}_rise"])[places]
                 for domain in ex.DOMAINS[: ex.OTHER]] + [np.array(rises)]
        return {"area": ex.unlearning_area(*texts),
                "area_interval": ex.bootstrap(ex.unlearning_area, *texts)}

    def informed(self, config: ex.CustomSAEConfig, x_ND: torch.Tensor) -> Results:
        """The row's evaluations, but in unlearning a feature must be rare on `x_ND` too."""
        material, _ = self.as_row(config)
        found = self.evaluated(config)
        contents = ex.checksum({"x": x_ND}, "")
        for seed, trained in self.trained(config).items():

            def build(seed: int = seed, trained: ex.TrainedSAE = trained) -> dict:
                use = ex.feature_statistics(trained, self.buffer, config.frequency_tokens)
                forget_F, retain_F = use.rate_KF
                most_F = torch.maximum(retain_F, firing_rate(trained, x_ND))
                use = use._replace(rate_KF=torch.stack([forget_F, most_F]))
                return ex.evaluate_unlearning(trained, material, use, seed)

            unlearning = self.kept("informed", config, seed, trained, build, contents)
            found[seed] = {**found[seed], "unlearning": unlearning}
        return found


def mean_difference(forget_ND: torch.Tensor, retain_ND: torch.Tensor) -> torch.Tensor:
    return forget_ND.mean(0) - retain_ND.mean(0)


def logistic_regression(forget_ND: torch.Tensor, retain_ND: torch.Tensor) -> torch.Tensor:
    labels = np.repeat([True, False], [len(forget_ND), len(retain_ND)])
    tokens_ND = torch.cat([forget_ND, retain_ND]).numpy()
    fitted = LogisticRegression(max_iter=1000).fit(tokens_ND, labels)
    return torch.from_numpy(fitted.coef_[0]).float()


def labelled_features(forget_ND: torch.Tensor, retain_ND: torch.Tensor,
                      direction_D: torch.Tensor) -> ex.CustomSAE:
    """An SAE of one feature for each of `ex.THRESHOLDS`, the part of retain tokens it fires on. All
    read along `direction_D` and write along what the forget tokens on which they fire have more
    than retain text, in units in which their mean activation there is how much that is."""
    sae = ex.CustomSAE(len(direction_D), len(ex.THRESHOLDS), ex.randomness("labelled"))
    middle_D = retain_ND.mean(0)
    forget_N, retain_N = ((part - middle_D) @ direction_D for part in (forget_ND, retain_ND))
    with torch.no_grad():
        sae.b_dec.copy_(middle_D)
        for place, threshold in enumerate(ex.THRESHOLDS):
            cut = retain_N.quantile(1 - threshold)
            more_D = forget_ND[forget_N > cut].mean(0) - middle_D
            gain = more_D.norm() / (forget_N[forget_N > cut] - cut).mean()
            sae.W_dec[place] = more_D / more_D.norm()
            sae.W_enc_FD[place], sae.b_enc[place] = gain * direction_D, -gain * cut
    return sae


def rises_of(trained: ex.TrainedSAE, material: ex.Material, use: ex.FeatureStatistics,
             before: list[dict[str, Any]]) -> dict[int, torch.Tensor]:
    """Cross-entropy rises by context of each setting, none twice, that was not hopeless `before`,
    by its place there; -1 is doing nothing."""
    rises, seen = {-1: torch.zeros(len(material.heldout["rows"]))}, set()
    for place, setting in enumerate(ex.progress(before, "further text")):
        if max(setting["retain_ce_rise"], setting["other_ce_rise"] or 0.0) > HOPELESS:
            continue
        features = ex.select_features(use.rate_KF, setting["threshold"], setting["n_features"])
        key = (*features.tolist(), setting["multiplier"])
        if len(features) and key not in seen:
            seen.add(key)
            targets = -setting["multiplier"] * use.size_F[features]
            rises[place] = ex.apply_setting(trained, material, features, targets, ask=False).rise_R
    return rises


@torch.no_grad()
def firing_rate(trained: ex.TrainedSAE, x_ND: torch.Tensor) -> torch.Tensor:
    fired_F = torch.zeros(trained.sae.d_sae)
    for x in x_ND.split(4096):
        code = trained.sae.sparse_code(x.float() / trained.scale)
        fired_F += torch.bincount(code.column_N, minlength=len(fired_F))
    return fired_F / len(x_ND)


def as_info(found: Results) -> dict[str, Any]:
    """What `ex.compare` reads of a final_info.json."""
    return {"seeds": [{"seed": seed, **ex.flat_metrics(parts)} for seed, parts in found.items()],
            "unlearning": {"per_seed": [parts["unlearning"] for parts in found.values()]}}


def joined(infos: Iterable[dict[str, Any]]) -> dict[str, Any]:
    infos = list(infos)
    return {"seeds": [row for info in infos for row in info["seeds"]],
            "unlearning": {"per_seed": [one for info in infos
                                        for one in info["unlearning"]["per_seed"]]}}


def compared(rows: dict[str, str], measure: Callable[[str], dict[str, Any]],
             how: str = "") -> None:
    """Show what `measure` gives for each row, beside the first of them."""
    vanilla = None
    for name, run in rows.items():
        info = measure(run)
        show(name + how, info, vanilla)
        vanilla = vanilla or info


def show(name: str, info: dict[str, Any], vanilla: dict[str, Any] | None = None) -> None:
    """A row's means, and its paired differences to the vanilla SAEs of the same seeds."""
    numbers = [{key: row.get(key) for key in COLUMNS} for row in info["seeds"]]
    means, stderrs = ex.mean_and_stderr(numbers)
    line(f"{name} ({len(numbers)})", (
        "-" if means[key] is None else f"{means[key]:.3f} ± {stderrs[key]:.3f}" for key in COLUMNS))
    if vanilla:
        samples = [part["samples"] for part in info["unlearning"]["per_seed"]]
        show_gaps("minus vanilla", ex.compare(info["seeds"], samples, vanilla))


def show_gaps(name: str, gaps: dict[str, Any]) -> None:
    line(name, ("{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**gaps[key])
                if key in gaps else "-" for key in COLUMNS))


def show_without_sae(bench: Bench, how: str = "", other: ex.Material | None = None) -> None:
    """What one labelled direction does: the number and its 95 % interval by texts or questions,
    and on the study's texts how it differs from the adaptive SAEs."""
    names = {"unlearning_area": "area", "unlearning_area_labelled": "area_labelled",
             "accuracy_area": "accuracy_area", "unlearning_score": "score"}
    for find in (mean_difference, logistic_regression):
        found, cells = bench.without_sae(find, other), []
        for key in COLUMNS:
            interval = found.get(f"{names.get(key)}_interval")
            cells.append("{:.3f} ({:.3f} to {:.3f})".format(found[names[key]], *interval)
                         if interval else "-")
        line(f"no SAE, {find.__name__.replace('_', ' ')}{how}", cells)
        if not other:
            adaptive = bench.fresh(TWO[1])
            same = {key: found[name] for key, name in names.items()}
            rows = [{"seed": row["seed"], **same} for row in adaptive["seeds"]]
            gaps = ex.compare(rows, [found["samples"]] * len(rows), adaptive)
            show_gaps(f"minus {TWO[1]}", gaps)


def line(name: str, cells: Iterable[str]) -> None:
    print("|", " | ".join((name, *cells)), "|", flush=True)


def main() -> None:
    bench = Bench()
    vanilla = ex.read_result(Path("run_8"))
    if not vanilla or vanilla["budget"] != bench.budget:
        sys.exit(f"error: no run_8 of budget {bench.budget!r} is finished here; run it first")
    pair = {name: run for name, run in FRESH.items() if run in TWO}
    line("row (seeds)", COLUMNS.values())
    line("---", itertools.repeat("---", len(COLUMNS)))
    compared(FRESH, bench.fresh)
    show_without_sae(bench)
    further, unnamed = bench.further_text(), bench.unnamed_text()
    compared(pair, lambda run: bench.fresh(run, bench.elsewhere, further), ", further text")
    compared(pair, lambda run: bench.fresh(run, bench.elsewhere, unnamed), ", fourth text")
    show_without_sae(bench, ", fourth text", unnamed)
    for name, (run, changes) in CHANGED.items():
        show(name, as_info(bench.evaluated(bench.row(run, **changes))), vanilla)
    if not bench.material.corpus["learn"]["other"]:
        return  # this substrate's third text has no learn half
    x_ND = bench.third_text()
    compared(pair, lambda run: as_info(
        bench.informed(bench.row(run, first_seed=FIRST_SEEDS[0]), x_ND)), ", informed choice")
    broad = bench.broad("broad", bench.material.corpus["learn"]["other"])
    four = {name: run for name, run in FRESH.items() if run != "run_3"}
    compared(four, broad.fresh, ", broad labels")
    show_without_sae(broad, ", broad labels")
    compared(pair, lambda run: broad.fresh(run, broad.elsewhere, unnamed),
             ", broad labels, fourth text")
    show_without_sae(broad, ", broad labels, fourth text", unnamed)
    near = bench.broad("glossaries", Glossaries(bench.material.cache).texts())
    compared(four, near.fresh, ", glossaries")
    show_without_sae(near, ", glossaries")
    compared(pair, lambda run: near.fresh(run, near.elsewhere, further),
             ", glossaries, further text")


if __name__ == "__main__":
    try:
        main()
    except (ex.UserError, OSError) as error:
        sys.exit(f"error: {error}")
